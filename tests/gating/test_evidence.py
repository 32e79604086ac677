"""Results files: refused if they were edited, or hold what no run writes."""

import pytest

import lora_diag
from lora_diag.errors import InputError
from tests.conftest import ROOT
from tests.gating.making import LAYERS, spectrum, write
from tests.messages import assert_names, raises_naming

SAMPLES = ROOT / "sample_checkpoints"


@pytest.mark.parametrize(
    ("change", "text"),
    [({"fro": -1.0}, "fro"), ({"base_fro": -1.0}, "base_fro"), ({"energy": {"4": 7.0, "8": 1.0, "16": 1.0}}, "energy")],
)
def test_impossible_norm_or_fraction_is_refused(tmp_path, change, text):
    path = write(tmp_path / "r.jsonl", [spectrum(LAYERS[0]) | change])
    with raises_naming(InputError, "line 2", text):
        lora_diag.read_results(path)


def test_edited_file_is_refused_by_its_hash(loradiag, tmp_path):
    results = lora_diag.spectrum(SAMPLES / "base", SAMPLES / "lora_r4", layers="layers.0", output=tmp_path / "s.jsonl")
    assert results.end.sha256
    content = (tmp_path / "s.jsonl").read_text()
    (tmp_path / "s.jsonl").write_text(content.replace('"method":"factored"', '"method":"gram"', 1))
    ran = loradiag("gate", "--policy", "adapter-basic", "s.jsonl")
    assert (ran.code, ran.out) == (3, "")
    assert_names(ran.err, "s.jsonl", "SHA-256")
