"""Adapters on the command line."""

import json

import pytest

from tests.adapters.making import adapter, base, normal
from tests.messages import assert_names

pytestmark = pytest.mark.slow

A, B, W = normal(2, 12), normal(8, 2, seed=1), normal(8, 12, seed=2)
PAIR = {"fc.lora_A.weight": A, "fc.lora_B.weight": B}


@pytest.fixture
def model(tmp_path):
    return base(tmp_path, {"model.fc.weight": W, "model.norm.weight": normal(8)})


def test_spectrum_of_base_and_adapter(tmp_path, loradiag, model):
    ran = loradiag("spectrum", model, adapter(tmp_path, PAIR), "-o", "r.jsonl", "--json")
    assert ran.code == 0
    run, record, *_ = ran.records
    assert [item["role"] for item in run["inputs"]] == ["base", "adapter"]
    assert_names(run["inputs"][1]["notes"], 1, "2 tensors", "BASE")
    assert (record["layer"], record["shape"]) == ("model.fc.weight", [8, 12])
    assert record["base_fro"] == pytest.approx(float((W**2).sum() ** 0.5))
    assert loradiag("inspect", "r.jsonl").code == 0


def test_unmatched_weights_are_refused_or_listed(tmp_path, loradiag, model):
    path = adapter(tmp_path, PAIR | {"gone.lora_A.weight": A, "gone.lora_B.weight": B})
    ran = loradiag("spectrum", model, path)
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert "gone.weight" in ran.err
    ran = loradiag("spectrum", model, path, "--allow-unmatched", "--json")
    assert ran.code == 0
    assert [(r["layer"], r["reason"]) for r in ran.records if r["record"] == "left_out"] == [
        ("gone.weight", "not_in_base")
    ]


def test_inspect_describes_adapter_and_scaling(tmp_path, loradiag):
    ran = loradiag("inspect", adapter(tmp_path, PAIR, rank_pattern={"nothing": 4}))
    assert ran.code == 0
    for words in (
        "PEFT LoRA, r=2, alpha=3",
        "lora_alpha / r, from adapter_config.json",
        "'nothing' matches no module",
    ):
        assert words in " ".join(ran.out.split())
    inventory = json.loads(loradiag("inspect", tmp_path / "adapter", "--json").out)
    assert inventory["adapts"] == [
        {
            "layer": "fc.weight", "shape": [8, 12], "form": "factored", "dtype": "float32", "rank": 2, "scaling": 1.5,
            "needs_base": "",
        }
    ]  # fmt: skip
