"""``loradiag intruders`` as a user runs it."""

import json

import pytest

from tests.conftest import ROOT
from tests.messages import assert_names

pytestmark = pytest.mark.slow

BASE, R4 = (ROOT / "sample_checkpoints" / name for name in ("base", "lora_r4"))


def test_table_and_summary_of_records(loradiag, tmp_path):
    ran = loradiag("intruders", BASE, R4, "-o", "i.jsonl")
    assert ran.code == 0, ran.err
    records = [json.loads(line) for line in (tmp_path / "i.jsonl").read_text().splitlines()]
    layers = [record for record in records if record["record"] == "intruders"]
    text = " ".join(ran.out.split())
    result = sum(record["intruders"] for record in layers)
    hit = sum(record["intruders"] > 0 for record in layers)
    assert result > 0
    assert f"Intruders {result} of 280 directions, in {hit} of 28 layers" in text
    assert_names(text, sum(record["count"] for record in layers))
    assert_names(text, "random direction")
    assert_names(text, "inspect i.jsonl --per layer")
