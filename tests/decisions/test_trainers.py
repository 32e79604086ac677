"""Ranks in the configurations of trainers, read back as each trainer hands them to PEFT."""

import dataclasses
import json
import types

import pytest
import yaml

from lora_diag.decisions.allocate.peft_config import make_config
from lora_diag.decisions.trainers import TRAINERS, format_settings
from lora_diag.errors import UsageError
from tests.messages import raises_naming
from tests.served import ROOT

SPECTRUM = ROOT / "docs" / "examples" / "spectrum.jsonl"
UNIFORM = make_config(["up_proj", "q_proj"], 8, 16.0, task="CAUSAL_LM") | {
    "modules_to_save": ["classifier"]
}
LAYER = "layers.0.mlp.up_proj"
CONFIG = UNIFORM | {"rank_pattern": {LAYER: 4}, "alpha_pattern": {LAYER: 8.0}}

# A trainer's key -> that of PEFT's LoraConfig, as the trainer passes it on.
AXOLOTL = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "lora_modules_to_save": "modules_to_save",
}


def test_axolotl_settings_keep_rank_pattern():
    result = yaml.safe_load(format_settings("axolotl", CONFIG))
    assert result.pop("adapter") == "lora"
    assert {AXOLOTL[key]: value for key, value in result.items()} == {
        key: CONFIG[key] for key in AXOLOTL.values()
    }


def test_unsloth_call_has_the_arguments_of_peft():
    given = {}
    model = types.SimpleNamespace(
        get_peft_model=lambda _model, **arguments: given.update(arguments)
    )
    exec(format_settings("unsloth", CONFIG), {"FastLanguageModel": model, "model": None})
    assert given == {key: value for key, value in CONFIG.items() if key in given}
    assert {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"} <= given.keys()
    assert "use_dora=True" in format_settings("unsloth", CONFIG | {"use_dora": True})


def test_trl_and_llamafactory_take_one_rank():
    trl, factory = (
        yaml.safe_load(format_settings(name, UNIFORM)) for name in ("trl", "llamafactory")
    )
    assert (trl["lora_r"], trl["lora_alpha"], trl["lora_target_modules"]) == (
        8,
        16,
        ["up_proj", "q_proj"],
    )
    assert (factory["lora_rank"], factory["lora_alpha"], factory["lora_target"]) == (
        8,
        16,
        "up_proj,q_proj",
    )
    assert factory["additional_target"] == "classifier"
    dora = [
        yaml.safe_load(format_settings(name, {**UNIFORM, "use_dora": True}))
        for name in ("trl", "llamafactory")
    ]
    assert [each["use_dora"] for each in dora] == [True, True]
    assert "use_dora" not in trl


def test_trl_schema_accepts_its_settings():
    trl = pytest.importorskip("trl")
    settings = yaml.safe_load(format_settings("trl", UNIFORM))
    assert set(settings) <= {field.name for field in dataclasses.fields(trl.ModelConfig)}
    assert trl.get_peft_config(trl.ModelConfig(**settings)).r == 8


@pytest.mark.parametrize("trainer", ["trl", "llamafactory"])
def test_trainer_of_one_rank_refuses_several(trainer):
    with pytest.raises(UsageError, match="--portable"):
        format_settings(trainer, CONFIG)


@pytest.mark.parametrize("trainer", sorted(set(TRAINERS) - {"unsloth"}))
def test_trainer_of_whole_alphas_refuses_others(trainer):
    with raises_naming(UsageError, "lora_alpha", "integer"):
        format_settings(trainer, {**UNIFORM, "lora_alpha": 12.5})


def test_allocate_writes_axolotl_settings(loradiag, tmp_path):
    words = ("allocate", SPECTRUM, "--params", "80k", "-q")
    assert loradiag(*words, "-o", "adapter_config.json").code == 0
    assert loradiag(*words, "--format", "axolotl", "-o", "lora.yaml").code == 0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    result = yaml.safe_load((tmp_path / "lora.yaml").read_text())
    assert result["lora_rank_pattern"] == config["rank_pattern"]
    assert result["lora_target_modules"] == config["target_modules"]
    assert (
        loradiag(*words, "--format", "axolotl", "-o", "lora.yaml").code == 0
    )  # its own file is replaced
    (tmp_path / "lora.yaml").write_text("mine: 1\n")
    for wrong in ("axolotl -o lora.yaml", "axolotl -o lora.json", "axolotl", "trl -o trl.yaml"):
        assert loradiag(*words, "--format", *wrong.split()).code == 2
    assert not (tmp_path / "trl.yaml").exists()
