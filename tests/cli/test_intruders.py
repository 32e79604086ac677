"""``loradiag intruders`` as a user runs it."""

import json

import pytest

from tests.conftest import ROOT
from tests.messages import assert_names

pytestmark = pytest.mark.slow

BASE, TUNED, R4 = (ROOT / "sample_checkpoints" / name for name in ("base", "full_ft", "lora_r4"))
ONE = "--layers", r"layers\.0"


def test_table_and_summary_of_records(loradiag, tmp_path):
    ran = loradiag("intruders", BASE, R4, "-o", "i.jsonl")
    assert ran.code == 0, ran.err
    assert max(map(len, ran.out.splitlines())) <= 80
    records = [json.loads(line) for line in (tmp_path / "i.jsonl").read_text().splitlines()]
    layers = [record for record in records if record["record"] == "intruders"]
    text = " ".join(ran.out.split())
    result = sum(record["intruders"] for record in layers)
    hit = sum(record["intruders"] > 0 for record in layers)
    assert result > 0
    assert f"Intruders {result} of 280 directions, in {hit} of 28 layers" in text
    assert_names(text, sum(record["count"] for record in layers))
    assert_names(text, "random direction")
    assert loradiag("inspect", "i.jsonl").out == ran.out[: ran.out.index("\nNext ")] + "\n"
    assert_names(text, "inspect i.jsonl --per layer")
    assert loradiag("inspect", "i.jsonl", "--per", "layer").code == 0
    for rule, code in (("intruders <= 10", 0), ("intruders <= 2", 1), ("median intruders.share <= 0.9", 0)):
        (tmp_path / "p.toml").write_text(f'[[rule]]\nname = "r"\nrequire = "{rule}"\n')
        judged = loradiag("gate", "p.toml", "i.jsonl")
        assert judged.code == code, rule + judged.out + judged.err


def test_json_and_resume(loradiag, tmp_path):
    words = "intruders", BASE, TUNED, *ONE
    ran = loradiag(*words, "--json", "-o", "i.jsonl")
    assert ran.code == 0, ran.err
    text = (tmp_path / "i.jsonl").read_text()
    assert ran.out == text
    (tmp_path / "i.jsonl").write_text("".join(text.splitlines(keepends=True)[:4]))
    assert loradiag(*words, "-o", "i.jsonl", "--resume", "-q").code == 0
    assert (tmp_path / "i.jsonl").read_text() == text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((BASE, TUNED, "--epsilon", "1"), 2, "--epsilon"),
        ((BASE, TUNED, "--window", "-1"), 2, "--window"),
        ((BASE, TUNED, "--top", "0"), 2, "--top"),
        ((BASE, TUNED, "--resume"), 2, "-o"),
        ((R4, BASE), 2, "give BASE first"),
        ((BASE, "nowhere"), 3, "nowhere"),
    ],
)
def test_error_is_one_message_with_exit_code(loradiag, tmp_path, words, code, message):
    ran = loradiag("intruders", *words)
    assert ran.code == code, ran.err
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
