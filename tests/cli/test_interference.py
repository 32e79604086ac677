"""``loradiag interference`` as a user runs it."""

import json
import math

import pytest

from tests.conftest import ROOT
from tests.messages import assert_names

pytestmark = pytest.mark.slow

BASE, TUNED, R4, R16 = (ROOT / "sample_checkpoints" / name for name in ("base", "full_ft", "lora_r4", "lora_r16"))
ONE = "--layers", r"layers\.0\.(mlp\.up|self_attn\.q)"


def test_adapters_alone_tables_and_summary_of_records(loradiag, tmp_path):
    ran = loradiag("interference", R4, R16, "-o", "i.jsonl", "--spectrum", "u.jsonl")
    assert ran.code == 0, ran.err
    records = [json.loads(line) for line in (tmp_path / "i.jsonl").read_text().splitlines()]
    pairs = [record for record in records if record["record"] == "interference"]
    unions = [record for record in records if record["record"] == "union"]
    assert len(pairs) == len(unions) == 28
    text = " ".join(ran.out.split())
    along = sum(r["cosine"] * r["first_fro"] * r["second_fro"] for r in pairs)
    norms = [math.sqrt(sum(r[key] ** 2 for r in pairs)) for key in ("first_fro", "second_fro")]
    assert f"cosine {along / norms[0] / norms[1]:.3g}" in text
    together = sum(r["spectrum"]["rank_at"]["0.9"] for r in unions)
    apart = sum(r["parts_rank_at"]["0.9"] for r in unions)
    assert_names(text, f"Σr = {together}", f"{together / apart:.3g}", apart)
    energy = sum(r["fro"] ** 2 for r in unions)
    lost = sum((r["recompressed"]["8"] * r["fro"]) ** 2 for r in unions) / energy
    assert f"{lost:.0%} at r = 8" in text
    assert "loradiag allocate u.jsonl" in text


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
    wrong = loradiag("interference", R4, BASE, TUNED)
    assert wrong.code == 2
    assert_names(wrong.err, "BASE", "first")


def test_spectrum_file_never_overwrites_something_else(loradiag, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    ran = loradiag("interference", R4, R16, "--spectrum", "notes.txt")
    assert ran.code == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"
