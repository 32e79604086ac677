"""``loradiag overlap`` and ``spectrum --gradients`` as a user runs them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import save_model, weights
from tests.messages import assert_names
from tests.test_gradients import save_step

pytestmark = pytest.mark.slow


@pytest.fixture
def inputs(tmp_path):
    before, change = weights(1), weights(2)
    save_model(tmp_path / "base", before)
    save_model(tmp_path / "tuned", {name: value + change[name] for name, value in before.items()})
    for step in (0, 10, 20):
        save_step(tmp_path / "g" / f"{step}.safetensors", weights(step + 3), step)
    return "base", "tuned", "g"


def test_non_finite_gradient_exits_3_after_others(loradiag, inputs, tmp_path):
    file = tmp_path / "g" / "10.safetensors"
    bad = load_file(file)
    bad["lm_head.weight"][0, 1] = torch.inf
    save_file(bad, file, {"step": "10"})
    ran = loradiag("overlap", *inputs, "--ranks", "2", "-o", "o.jsonl")
    assert ran.code == 3
    assert_names(ran.err, "Error:", "lm_head.weight", "step 10", "inf at [0, 1]")
    assert "Not measured" in ran.out
    assert json.loads((tmp_path / "o.jsonl").read_text().splitlines()[-1])["layers"] == 10


def test_control_characters_from_files_are_escaped(loradiag, inputs, tmp_path):
    name = "evil\x1b[2J.weight"
    for folder, scale in (("base", 0.0), ("tuned", 1.0)):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        save_model(tmp_path / folder, tensors | {name: scale * torch.eye(4)})
    save_step(tmp_path / "g" / "30.safetensors", {name: torch.full((4, 4), torch.nan)}, 30)
    ran = loradiag("overlap", *inputs, "--ranks", "2")
    assert ran.code == 3
    assert "\x1b" not in ran.out + ran.err


def test_ranks_are_allocated_from_gradients(loradiag, inputs):
    assert loradiag("spectrum", "--gradients", "g", "-q", "-o", "s.jsonl").code == 0
    ran = loradiag("allocate", "s.jsonl", "--total-rank", "12", "--json")
    assert ran.code == 0, ran.err
    allocated = [record for record in ran.records if record["record"] == "allocation"]
    assert sum(record["rank"] for record in allocated) <= 12
    assert {record["source"] for record in allocated} == {"gradients"}
