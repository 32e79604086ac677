"""Configurations of trainers: what each says, and what a hostile file cannot do."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from lora_diag.errors import InputError, LoradiagError
from lora_diag.linting.configs import TRAINING_ARGS, name_optimizer, read_settings
from tests.linting.making import PEFT, make_adapter, write_config
from tests.linting.recipes import RECIPES, SEVEN
from tests.messages import raises_naming

# Recipe -> family, method, lr, dtype, optimizer, r, alpha, targets; as the trainer's documentation
# says.
SAID = {
    "axolotl examples/llama-3/lora-1b.yml": (
        "axolotl",
        "lora",
        2e-4,
        "float32",
        "adamw8bit",
        16,
        32,
        SEVEN,
    ),
    "axolotl examples/llama-3/qlora.yml": (
        "axolotl",
        "lora",
        2e-4,
        "float32",
        "adamw32bit",
        32,
        16,
        "all-linear",
    ),
    "axolotl examples/llama-3/fft-8b.yaml": (
        "axolotl",
        "full",
        2e-5,
        "bfloat16",
        "adamw8bit",
        None,
        None,
        None,
    ),
    "LLaMA-Factory examples/train_lora/qwen3_lora_sft.yaml": (
        *("llamafactory", "lora", 1e-4, "float32", None, 8, 16, "all-linear"),
    ),
    "torchtune recipes/configs/llama3_2/1B_lora_single_device.yaml": (
        *("torchtune", "lora", 3e-4, "bfloat16", "adamw", 64, 128),
        ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "TRL docs, PEFT integration": ("trl", "lora", 2e-4, "float32", None, 32, 16, None),
    "PEFT docs, Quicktour": ("peft", "lora", None, "float32", None, 8, 32, ["q_proj"]),
}


def read(folder, values, name="c.yaml"):
    return read_settings(write_config(folder / name, values))


@pytest.mark.parametrize("name", SAID)
def test_recipe_is_read_as_its_trainer_does(name, tmp_path):
    found = read(tmp_path, RECIPES[name])
    factors = [found.peft.values.get(key) for key in ("r", "lora_alpha", "target_modules")]
    assert (
        found.family,
        found.finetuning_type,
        found.lr,
        found.dtype,
        found.optimizer,
        *factors,
    ) == SAID[name]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({"base_model": "x", "bf16": True, "deepspeed": "z.json"}, "float32"),
        ({"base_model": "x", "bf16": False, "fp16": True}, "float16"),
        (
            {
                "base_model": "x",
                "bf16": True,
                "adapter": "lora",
                "peft_autocast_adapter_dtype": False,
            },
            "bfloat16",
        ),
        ({"finetuning_type": "full", "pure_bf16": True}, "bfloat16"),
        ({"finetuning_type": "full", "bf16": True}, "float32"),
        ({"model_name_or_path": "x", "dtype": "bfloat16", "learning_rate": 1e-6}, "bfloat16"),
        ({"model_name_or_path": "x", "torch_dtype": "auto", "learning_rate": 1e-6}, "auto"),
        ({"model_name_or_path": "x", "use_peft": True, "load_in_4bit": True}, "bfloat16"),
        (
            {"learning_rate": 1e-6, "bf16": True},
            None,
        ),  # a Trainer's arguments do not load the model
    ],
)
def test_dtype_of_trained_weights(values, dtype, tmp_path):
    assert read(tmp_path, values).dtype == dtype


def test_setting_is_located_in_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "# learning_rate: 1\nbase_model: x\nlearning_rate: 2e-5\nunknown_key: {a: [1]}\n"
    )
    found = read_settings(path)
    assert (found.lr, found.locate("lr")) == (2e-5, (f"{path}:3 learning_rate", 3))
    nested = {
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": "1e-5"},
        "model": {"_component_": "m"},
    }
    where, line = read(tmp_path, nested, "t.yaml").locate("lr")
    assert where.endswith(" optimizer.lr")
    assert (tmp_path / "t.yaml").read_text().splitlines()[line - 1].strip().startswith("lr:")


class Trapped:
    """Arguments of a Trainer whose pickle would create a file if it were run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Arguments:
    """Arguments of a Trainer."""


def test_training_args_are_read_as_data(tmp_path):
    folder, args = make_adapter(tmp_path / "a"), Arguments()
    args.learning_rate, args.optim, args.max_steps, args.adam_beta2 = 1e-4, "adamw_torch", 100, 0.95
    args.callback, args.others = Trapped(tmp_path / "run"), OrderedDict(a=1)
    torch.save(args, folder / TRAINING_ARGS)
    found = read_settings(folder)
    assert (found.family, found.lr, found.optimizer, found.steps, found.beta2) == (
        "peft",
        1e-4,
        "adamw",
        100,
        0.95,
    )
    assert found.peft.values["r"] == PEFT["r"]
    assert not (tmp_path / "run").exists()


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{x}: &{x} [{', '.join([f'*{y}'] * 8)}]\n" for y, x in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("learning_rate: fast\nbase_model: x", "learning_rate"),
        ("learning_rate: .inf\nbase_model: x", "learning_rate"),
        ("- a\n- b", "list"),
        ("", "is empty"),
        ("a: [", "YAML"),
        ("a: !!python/object/apply:os.system ['true']", "YAML"),
        ("a: &a [*a]", "not a training configuration"),
        (BOMB + "base_model: x", "aliases"),
        ("[" * 1500, "YAML"),
        ("color: red", "not a training configuration"),
        ("a: 2020-99-99", "YAML"),
        ("\x00", "YAML"),
        ("finetuning_type: lora\nlora_rank: [8]", "lora_rank"),
    ],
)
def test_malformed_file_is_one_message(text, fact, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with raises_naming(InputError, str(path), fact):
        read_settings(path)


@pytest.mark.parametrize("name", ["none.yaml", "folder", "c.json", "training_args.bin"])
def test_unreadable_path_is_one_message(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "c.json").write_bytes(b"\xff{")
    (tmp_path / "training_args.bin").write_bytes(b"PK\x03\x04")
    with raises_naming(LoradiagError, str(tmp_path / name)):
        read_settings(tmp_path / name)


def test_large_file_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("# " + "x" * 1_000_000)
    with raises_naming(InputError, "100,000"):
        read_settings(path)


# Trainer's name -> ours; the dtype of the state is from the source of each optimizer.
OPTIMIZERS = {
    "adamw": ["torch.optim.AdamW", "adam", "adamw_torch_fused", "adamw_hf", "galore_adamw"],
    "adamw8bit": [
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "torchao.optim.AdamW8bit",
        "q_galore_adamw8bit",
    ],
    "adamw32bit": [
        *("paged_adamw_32bit", "adamw_bnb_32bit", "adamw_apex_fused", "adamw_anyprecision"),
        *(
            f"bitsandbytes.optim.{name}"
            for name in ("Adam", "AdamW", "AdamW32bit", "PagedAdam", "PagedAdamW")
        ),
    ],
    "adamw_torch_4bit": ["adamw_torch_4bit"],
    "ao_adamw_fp8": ["ao_adamw_fp8"],
    "adamax": ["torch.optim.Adamax"],
    "paged_lion_32bit": ["paged_lion_32bit"],
    "sgd": ["SGD"],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_names_are_normalized(name):
    assert {name_optimizer(text) for text in OPTIMIZERS[name]} == {name}
