"""Adapters that a gate measures and must not pass: updates that are zero where they are served, or
subtracted.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.messages import assert_names
from tests.served import ROOT

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "sample_checkpoints"


@pytest.fixture
def adapter(tmp_path):
    return shutil.copytree(SAMPLES / "lora_r4", tmp_path / "adapter")


def configure(adapter, **settings):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def scale(adapter, factor):
    """Multiply the factors, and return whether every product is zero in float32."""
    file = adapter / "adapter_model.safetensors"
    factors = {
        name: (value.astype(np.float64) * factor).astype(np.float32)
        for name, value in load_file(file).items()
    }
    save_file(factors, file, {"format": "pt"})
    pairs = [
        (factors[name.replace("lora_A", "lora_B")], factors[name])
        for name in factors
        if "lora_A" in name
    ]
    return not any((b @ a).any() for b, a in pairs)


def judged(run, adapter):
    ran = run(
        "gate",
        "--policy",
        "adapter-basic",
        "--base",
        SAMPLES / "base",
        "--adapter",
        adapter,
        "--json",
    )
    return ran.code, {
        (record["rule"], record["status"])
        for record in ran.records
        if record["record"] == "verdict"
    }


@pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e-23])
def test_update_that_underflows_fails_as_dead(run, adapter, factor):
    assert scale(adapter, factor)
    code, verdicts = judged(run, adapter)
    assert code == 1
    assert ("dead", "failed") in verdicts


def test_small_update_is_not_dead(run, adapter):
    assert not scale(adapter, 1e-17)
    assert ("dead", "passed") in judged(run, adapter)[1]


@pytest.mark.parametrize(
    "settings",
    [{"lora_alpha": -8}, {"alpha_pattern": {"q_proj": -8}}, {"lora_alpha": -8, "use_rslora": True}],
)
def test_negative_alpha_fails(run, adapter, settings):
    configure(adapter, **settings)
    code, verdicts = judged(run, adapter)
    assert (code, ("negative", "failed") in verdicts) == (1, True)


def test_negative_alpha_of_kohya_fails(run, tmp_path):
    rng = np.random.default_rng(0)
    tensors = {}
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors[f"{name}.lora_down.weight"] = rng.normal(size=(4, 320)).astype(np.float32)
    tensors[f"{name}.lora_up.weight"] = rng.normal(size=(320, 4)).astype(np.float32)
    tensors[f"{name}.alpha"] = np.array(-4, np.float32)
    save_file(tensors, tmp_path / "kohya.safetensors")
    assert run("spectrum", tmp_path / "kohya.safetensors", "-q", "-o", "r.jsonl").code == 0
    ran = run("gate", "--policy", "adapter-basic", "r.jsonl", "--json")
    assert ran.code == 1
    assert ("negative", "failed") in {
        (each["rule"], each["status"]) for each in ran.records if "rule" in each
    }


@pytest.mark.parametrize("key", ["lora_alpha", "r", "target_modules"])
def test_key_given_twice_is_refused(run, adapter, key):
    file = adapter / "adapter_config.json"
    value = json.loads(file.read_text())[key]
    file.write_text(
        file.read_text().rstrip().removesuffix("}") + f', "{key}": {json.dumps(value)}}}'
    )
    for words in (
        ["gate", "--policy", "adapter-basic", "--base", SAMPLES / "base", "--adapter", adapter],
        ["inspect", adapter],
    ):
        ran = run(*words)
        assert (ran.code, ran.out) == (3, "")
        assert_names(ran.err, "adapter_config.json", key, "twice")
