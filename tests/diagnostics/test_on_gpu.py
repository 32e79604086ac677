"""Commands on a stand-in for a GPU: the records are those of the CPU."""

import pytest

import lora_diag
from benchmarks.gpu import EXCEEDED, fields
from tests.served import ROOT
from tests.standin import GPU, counted

SAMPLES = ROOT / "sample_checkpoints"
BASE, TUNED, ADAPTER = (SAMPLES / name for name in ("base", "full_ft", "lora_r16"))
HERE = {"layers": r"layers\.0\..*(q_proj|down_proj)"}
RUNS = {
    "diagnostics.spectrum": lambda _: lora_diag.spectrum(BASE, TUNED, recover=True, **HERE),
    "diagnostics.residual": lambda _: lora_diag.residual(BASE, TUNED, [ADAPTER], **HERE),
    "diagnostics.overlap": lambda _: lora_diag.overlap(
        BASE, TUNED, [SAMPLES / "gradients"], **HERE
    ),
    "diagnostics.interference": lambda _: lora_diag.interference(
        [ADAPTER, TUNED], base=BASE, **HERE
    ),
    "diagnostics.intruders": lambda _: lora_diag.intruders(BASE, TUNED, **HERE),
    "diagnostics.geometry": lambda _: lora_diag.geometry(BASE, TUNED, draws=1, **HERE),
    "decisions.extract": lambda folder: lora_diag.extract(BASE, TUNED, folder, rank=8, **HERE),
    "decisions.recover": lambda _: lora_diag.recover(BASE, TUNED, **HERE),
}


def on_stand_in(compute, device):
    with counted():
        return compute(GPU), ""


@pytest.mark.parametrize("feature", RUNS)
def test_records_of_a_gpu_are_those_of_the_cpu(feature, monkeypatch, tmp_path):
    there = list(RUNS[feature](tmp_path / "cpu"))
    for module in ("layers.change", f"{feature}.measure"):
        name = f"lora_diag.{module}.compute_on_device"
        monkeypatch.setattr(name, on_stand_in, raising=False)
    result = list(RUNS[feature](tmp_path / "gpu"))
    assert result
    assert EXCEEDED not in fields(result, there)
