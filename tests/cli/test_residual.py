"""``loradiag residual`` as a user runs it."""

import json

import pytest

from tests.conftest import ROOT
from tests.messages import assert_names

pytestmark = pytest.mark.slow

BASE, TUNED, R4, R16 = (ROOT / "sample_checkpoints" / name for name in ("base", "full_ft", "lora_r4", "lora_r16"))


def test_table_adapter_and_summary(loradiag, tmp_path):
    ran = loradiag("residual", BASE, TUNED, R4, R16, "-o", "r.jsonl")
    assert ran.code == 0
    assert max(map(len, ran.out.splitlines())) <= 80
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    layers = [record for record in records if record["record"] == "residual"]
    assert {record["adapter"] for record in layers} == {str(R4), str(R16)}
    text = " ".join(ran.out.split())
    for name in ("lora_r4", "lora_r16"):
        mine = [record for record in layers if record["adapter"].endswith(name)]
        fro = sum(record["fro"] ** 2 for record in mine)
        epsilon = (sum((record["epsilon"] * record["fro"]) ** 2 for record in mine) / fro) ** 0.5
        assert_names(text, name, f"{epsilon:.3g}")
        still = sum(record["fro"] ** 2 for record in mine if record["limited_by"] == "not adapted") / fro
        assert_names(text, name, 28, "28 tensors", "11 tensors", f"{still:.0%}", "‖ΔW‖²")
    assert "not quality" in text


def test_inspect_shows_residual_and_json_has_records(loradiag, tmp_path):
    words = "residual", BASE, TUNED, R4, "--layers", r"layers\.0"
    shown = loradiag(*words, "-o", "r.jsonl").out
    repeated = loradiag("inspect", "r.jsonl").out
    assert repeated == shown[: shown.index("\nNext ")] + "\n"
    assert loradiag(*words, "--json").out == (tmp_path / "r.jsonl").read_text()
    assert "layers.0.mlp.up_proj " in loradiag("inspect", "r.jsonl", "--per", "layer", env={"COLUMNS": "140"}).out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((BASE, TUNED), 2, "at least one ADAPTER"),
        ((BASE, TUNED, TUNED), 2, "TUNED itself"),
        ((BASE, TUNED, R4, "--layers", "("), 2, "not a valid regular expression"),
        ((BASE, TUNED, R4, "--layers", "lm_head"), 4, "no weight of the adapter can be measured"),
        ((BASE, TUNED, "nowhere"), 3, "nowhere"),
        ((R4, TUNED, R16), 2, "give BASE first"),
    ],
)
def test_error_is_one_message_with_exit_code(loradiag, tmp_path, words, code, message):
    ran = loradiag("residual", *words, "-o", "r.jsonl")
    assert ran.code == code
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_resume_needs_file(loradiag):
    ran = loradiag("residual", BASE, TUNED, R4, "--resume")
    assert ran.code == 2
    assert "-o" in ran.err
