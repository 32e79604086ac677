"""``loradiag interference`` as a user runs it."""

import json

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

BASE, TUNED, R4, R16 = (
    ROOT / "sample_checkpoints" / name for name in ("base", "full_ft", "lora_r4", "lora_r16")
)
ONE = "--layers", r"layers\.0\.(mlp\.up|self_attn\.q)"


def test_allocate_accepts_spectrum_of_sum(loradiag, tmp_path):
    assert loradiag("interference", R4, R16, "-q", "--spectrum", "u.jsonl").code == 0
    ran = loradiag("allocate", "u.jsonl", "--energy", "0.9", "-o", "a.jsonl")
    assert ran.code == 0, ran.err
    ranks = {
        record["layer"]: record["rank"]
        for record in map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
        if record["record"] == "allocation"
    }
    spectra = [json.loads(line) for line in (tmp_path / "u.jsonl").read_text().splitlines()]
    assert ranks == {r["layer"]: r["rank_at"]["0.9"] for r in spectra if r["record"] == "spectrum"}
    assert loradiag("inspect", "u.jsonl").code == 0


def test_mixed_updates_require_base_first(loradiag):
    ran = loradiag("interference", BASE, R4, TUNED, *ONE, "--json")
    assert ran.code == 0, ran.err
    assert [record["record"] for record in ran.records].count("interference") == 2
