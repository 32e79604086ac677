"""Damaged quantized checkpoints: every input ends in tensors of their shape, or in one
InputError.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.errors import InputError
from lora_diag.storage import open_checkpoint
from lora_diag.storage.hub import parse
from lora_diag.storage.reading import plain_names
from tests.conftest import save_model, weights
from tests.robustness.mutate import damaged_bytes
from tests.storage.quantizing import as_bytes, eight_bit, four_bit, scaled

pytestmark = pytest.mark.slow

W = "a.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"
CONFIG = {
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]},
    "tie_word_embeddings": True,
}
MODELS = {
    "nf4": four_bit(W, (5, 13))[0],
    "nf4 double": four_bit(W, (5, 13), block=8, nested=4)[0],
    "int8": eight_bit("a", (4, 6))[0],
    "fp8": scaled(W, (9, 7), (3, 2), (4, 4))[0],
    "plain": weights(1),
    "fp8 rows": scaled(W, (5, 6), (5,), (1, 6), suffix="_scale")[0],
}


def tensors_or_one_error(path) -> bool:
    """Open and read everything, whole and in a piece from the middle."""
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint:
            info = checkpoint[name]
            middle = info.numel // 2
            assert checkpoint.read(name).shape == (info.numel,)
            assert checkpoint.read(name, middle, info.numel).shape == (info.numel - middle,)
            steps = checkpoint.read_steps(name)
            assert steps is None if info.stored is None else steps.shape == (info.numel,)
    except InputError as error:
        problem = str(error)
    else:
        return True
    assert str(path.parent) in problem
    assert "\n" not in problem
    return False


def assert_mutants_are_read_or_refused(
    path: Path, opened: Path | None = None, rounds: int = 200
) -> None:
    """Damage a file again and again, and open it or the checkpoint ``opened``: some mutants are
    read, some refused.
    """
    good, rng = path.read_bytes(), random.Random(0)
    count = 0
    for _ in range(rounds):
        path.write_bytes(damaged_bytes(good, rng))
        count += tensors_or_one_error(opened or path)
    assert 0 < count < rounds


@pytest.mark.parametrize("kind", MODELS)
def test_mutated_files_are_read_or_refused(tmp_path, kind):
    assert_mutants_are_read_or_refused(save_model(tmp_path, MODELS[kind]) / "model.safetensors")


def test_mutated_settings_of_four_bit_weight(tmp_path):
    """The header is right, the JSON in the tensor is not."""
    tensors = dict(MODELS["nf4 double"])
    good = bytes(tensors[STATE].tolist())
    rng = random.Random(0)
    opened = 0
    for _ in range(200):
        tensors[STATE] = torch.tensor(list(damaged_bytes(good, rng)) or [0], dtype=torch.uint8)
        opened += tensors_or_one_error(save_model(tmp_path, tensors) / "model.safetensors")
    assert 0 < opened < 200


def test_mutated_configs_are_read_or_refused(tmp_path):
    folder = save_model(tmp_path, MODELS["fp8"], CONFIG)
    assert_mutants_are_read_or_refused(folder / "config.json", folder / "model.safetensors")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    key=st.sampled_from(["quant_type", "blocksize", "shape", "nested_blocksize", "nested_offset"]),
    value=json_values,
)
def test_arbitrary_setting_is_read_or_refused(tmp_path_factory, key, value):
    tensors = dict(MODELS["nf4 double"])
    tensors[STATE] = as_bytes(json.loads(bytes(tensors[STATE].tolist())) | {key: value})
    tensors_or_one_error(save_model(tmp_path_factory.mktemp("any"), tensors) / "model.safetensors")


@settings(max_examples=60, deadline=None)
@given(
    key=st.sampled_from(
        ["quantization_config", "compression_config", "tie_word_embeddings", "text_config"]
    ),
    inner=st.sampled_from([None, "quant_method", "weight_block_size"]),
    value=json_values,
)
def test_arbitrary_config_value_is_read_or_refused(tmp_path_factory, key, inner, value):
    folder = save_model(
        tmp_path_factory.mktemp("any"), MODELS["fp8"], {key: {inner: value} if inner else value}
    )
    tensors_or_one_error(folder / "model.safetensors")


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    grid=st.lists(st.integers(0, 5), max_size=4),
    suffix=st.sampled_from(["_scale", "_scale_inv"]),
)
def test_any_shape_of_scales(tmp_path_factory, shape, grid, suffix):
    tensors = {W: torch.zeros(shape).to(torch.float8_e4m3fn), W + suffix: torch.ones(grid)}
    tensors_or_one_error(save_model(tmp_path_factory.mktemp("any"), tensors) / "model.safetensors")


@given(st.text(alphabet="ab/@.-_ :\\", max_size=20))
def test_arbitrary_hub_id_is_accepted_or_refused(words):
    result = parse(words)
    assert result is None or str(result) == words


@given(
    st.lists(
        st.text(alphabet="._abmodule", max_size=20) | st.just("module._orig_mod.a"), max_size=4
    )
)
def test_plain_names_stay_unique(names):
    plain = plain_names(names)
    assert len(plain) == len(names)
    assert plain_names(plain) == plain
