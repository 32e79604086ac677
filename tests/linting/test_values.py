"""Values of configurations: the types of settings, and files that ask for much or are not what they
seem.
"""

import json
import sys
from collections import OrderedDict

import pytest
import torch
import yaml

from lora_diag.errors import InputError
from lora_diag.linting import values as reading
from lora_diag.linting.configs import TRAINING_ARGS, read_settings
from lora_diag.linting.values import MAX_ALIASES, MAX_DEPTH, MAX_YAML_BYTES, Values
from tests.conftest import time_limit
from tests.linting.making import PEFT, make_adapter
from tests.messages import raises_naming

LORA = "base_model: x\nadapter: lora\nlora_r: 8\nlora_alpha: 16\n"

# Seconds for a hostile file of the largest size; PyYAML without libyaml takes 3 s.
PATIENCE = 20


@pytest.fixture(params=["libyaml", "Python"])
def parser(request, monkeypatch):
    """Read YAML by either of PyYAML's parsers."""
    if request.param == "Python":
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    elif not hasattr(yaml, "CSafeLoader"):
        pytest.skip("PyYAML is built without libyaml")


@pytest.fixture
def read(tmp_path):
    """Return the settings in a text."""

    def from_text(text, name="c.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return read_settings(path)

    return from_text


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("!!int ''", ["line 5"]),
        ("!!float ''", ["line 5"]),
        ("!!bool maybe", ["maybe", "line 5"]),
        ("!!timestamp x", ["line 5"]),
        ("2001-01-01 00:00:00 +99:99", ["line 5"]),
        ("!!binary A", []),
        ("!!pairs [1]", ["line 5"]),
        ("9" * 5000, ["line 5"]),
        ("0x" + "f" * 90_000, ["learning_rate"]),
        ("1" + ":1" * 400 + ".5", ["learning_rate"]),
        ("1:30", ["learning_rate", "1:30"]),
        ("[1, 2]", ["learning_rate"]),
        ("{a: 1}", ["learning_rate"]),
        ("-1", ["learning_rate"]),
        ("1e300", ["learning_rate"]),
    ],
)
def test_scalar_is_one_short_message(read, parser, text, facts):
    with raises_naming(InputError, "c.yaml", *facts) as caught:
        read(f"{LORA}learning_rate: {text}\n")
    assert len(str(caught.value)) < 700


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "[" * MAX_YAML_BYTES,
        "{a: " * (MAX_YAML_BYTES // 4),
        "- " * (MAX_YAML_BYTES // 2),
        "? " * (MAX_YAML_BYTES // 2),
        f"{LORA}learning_rate: 1{':1' * 49_000}",
        f"{LORA}learning_rate: !!float 1{':1' * 49_000}",
        "[" * 990_000,
    ],
    ids=["brackets", "braces", "dashes", "questions", "base 60", "float of base 60", "large"],
)
def test_deep_or_large_yaml_is_refused_at_once(read, parser, text):
    with time_limit(PATIENCE), raises_naming(InputError, "c.yaml"):
        read(text)


@pytest.mark.slow
def test_limits_of_yaml_admit_their_value(read, parser):
    assert read(LORA + "x: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)).peft.values["r"] == 8
    assert (
        read(LORA + "x: &x 1\n" + f"y: [{', '.join(['*x'] * MAX_ALIASES)}]").peft.values["r"] == 8
    )
    assert read((LORA + "#").ljust(MAX_YAML_BYTES, "x")).peft.values["r"] == 8
    for text in ("x: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH, "#".ljust(MAX_YAML_BYTES, "x")):
        with raises_naming(InputError, "c.yaml"):
            read(LORA + text)


@pytest.mark.parametrize(
    "text",
    [
        "learning_rate: 1e-4\nlearning_rate: 1e-1\n",
        "learning_rate: 1e-4\n'learning_rate': 1e-1\n",
        "learning_rate: 1e-4\n? learning_rate\n: 1e-1\n",
        "&a learning_rate: 1e-4\n*a : 1e-1\n",
    ],
)
def test_yaml_key_given_twice_is_refused(read, parser, text):
    with raises_naming(InputError, "c.yaml", "learning_rate", "twice", "line 6"):
        read(LORA + text)
    with raises_naming(InputError, "c.yaml", "'lr'", "twice", "line 6"):
        read(LORA + "optimizer:\n  {lr: 1, lr: 2}\n")


def test_merged_keys_are_read(read, parser):
    text = (
        "common: &c {_component_: torch.optim.AdamW, lr: 1e-5}\nx: &x {}\nmodel: {<<: *x, "
        "_component_: m}\n"
    )
    found = read(f"{text}optimizer:\n  <<: *c\n  <<: *x\n  lr: 2e-5\nlist: [{{a: 1}}, {{a: 1}}]\n")
    assert (found.family, found.lr, found.optimizer) == ("torchtune", 2e-5, "adamw")


PEFT_KEYS = {
    "peft_type": ["LORA"], "r": {"a": 1}, "lora_alpha": [], "lora_dropout": "high", "target_modules": {},
    "task_type": 5, "exclude_modules": [1], "modules_to_save": [None], "use_rslora": "maybe", "use_dora": [True],
    "layers_pattern": 7, "target_parameters": [[]],
}  # fmt: skip
TRAINER_KEYS = {
    "lora_r": [8], "lora_alpha": {}, "lora_target_modules": 5, "lora_modules_to_save": {"a": 1}, "optimizer": [1],
    "learning_rate": True, "max_steps": "many", "sequence_len": 1.5, "adam_beta2": 7, "load_in_4bit": "yes please",
    "adapter": ["lora"], "lora_target_linear": [True], "peft_use_dora": 2,
}  # fmt: skip


@pytest.mark.parametrize("key", PEFT_KEYS)
def test_wrong_type_in_adapter_config_names_key(read, key):
    with raises_naming(InputError, "adapter_config.json", key):
        read(json.dumps({**PEFT, key: PEFT_KEYS[key]}), "adapter_config.json")


@pytest.mark.parametrize("key", TRAINER_KEYS)
def test_wrong_type_in_yaml_names_key(read, key):
    with raises_naming(InputError, "c.yaml", key):
        read(yaml.safe_dump({"base_model": "x", "lora_r": 8, key: TRAINER_KEYS[key]}))


@pytest.mark.parametrize(
    "key", ["lora_attn_modules", "lora_rank", "lora_alpha", "apply_lora_to_mlp"]
)
def test_wrong_type_in_nested_table_names_key(read, key):
    with raises_naming(InputError, "c.yaml", f"model.{key}"):
        read(yaml.safe_dump({"model": {"_component_": "m", key: {"q": 1}}}))


@pytest.mark.parametrize("value", [None, "auto", "${ref}"])
def test_value_left_open_is_not_known(read, value):
    keys = ("learning_rate", "lora_r", "max_steps", "sequence_len", "adam_beta2", "load_in_8bit")
    found = read(
        yaml.safe_dump({"base_model": "x", "adapter": "lora", **dict.fromkeys(keys, value)})
    )
    known = (
        found.lr,
        found.peft.values.get("r"),
        found.steps,
        found.length,
        found.beta2,
        found.quantized,
    )
    assert known == (None, None, None, None, None, False)


def test_method_of_reference_is_not_known(read):
    assert read("base_model: x\nadapter: ${ADAPTER}\n").finetuning_type is None
    assert read("base_model: x\nadapter: ''\n").finetuning_type == "full"
    assert read("finetuning_type: ${TYPE}\n").finetuning_type is None


@pytest.mark.parametrize(
    ("value", "known"), [("true", True), ("False", False), (1, True), (0, False), (None, None)]
)
def test_flag_is_read(tmp_path, value, known):
    assert Values(tmp_path, {"use_dora": value}).flag("use_dora") is known


def test_long_whole_number_is_described_by_its_size(read):
    with raises_naming(InputError, "adapter_config.json", "r", "13,288 bits") as caught:
        read(json.dumps({**PEFT}).replace("16", "9" * 4000), "adapter_config.json")
    assert len(str(caught.value)) < 300


class Arguments:
    """Arguments of a Trainer."""


def write_arguments(folder, **values):
    args = Arguments()
    args.__dict__.update(values)
    torch.save(args, folder / TRAINING_ARGS)
    return folder


def make_leaves(levels):
    """Return a list of lists that are one list, with 10 ** levels leaves."""
    value = ["a"]
    for _ in range(levels):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    "key", ["learning_rate", "optim", "dtype", "torch_dtype", "max_steps", "lora_r"]
)
def test_shared_lists_of_pickle_are_not_formatted(tmp_path, key):
    folder = write_arguments(make_adapter(tmp_path / "a"), **{key: make_leaves(6)})
    with time_limit(PATIENCE), raises_naming(InputError, TRAINING_ARGS, key) as caught:
        read_settings(folder)
    assert len(str(caught.value)) < 500


def test_only_plain_values_leave_pickle(tmp_path):
    given = {"a": 1, "b": "x", "c": 1.5, "d": None, "e": True, "f": ["x", 1]}
    others = {
        "g": [["x"]],
        "h": {"a": 1},
        "i": OrderedDict(a=1),
        "j": torch.ones(2),
        "k": Arguments(),
        "l": (1,),
    }
    others["m"] = [1] * (reading.MAX_LIST + 1)
    path = write_arguments(tmp_path, **given, **others) / TRAINING_ARGS
    table = Values.read(path).table
    assert {key: table[key] for key in given} == given
    assert {type(table[key]) for key in others} == {type}


def test_large_pickle_is_refused(tmp_path):
    write_arguments(tmp_path, notes="x" * reading.MAX_BYTES)
    with raises_naming(InputError, TRAINING_ARGS, f"{reading.MAX_BYTES:,}"):
        read_settings(tmp_path / TRAINING_ARGS)


def test_long_integer_of_pickle_is_one_message(tmp_path):
    write_arguments(make_adapter(tmp_path), learning_rate=2**1_000_000)
    assert sys.get_int_max_str_digits() < 300_000
    with raises_naming(InputError, TRAINING_ARGS, "learning_rate", "bits"):
        read_settings(tmp_path)


def test_pickle_without_arguments_is_named(tmp_path):
    torch.save([1, 2], make_adapter(tmp_path) / TRAINING_ARGS)
    with raises_naming(InputError, TRAINING_ARGS):
        read_settings(tmp_path)
    torch.save({"learning_rate": 1e-4}, tmp_path / TRAINING_ARGS)
    assert read_settings(tmp_path).lr == 1e-4
