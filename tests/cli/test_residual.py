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
