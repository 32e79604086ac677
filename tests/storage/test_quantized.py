"""Quantized weights are read as the floats they stand for, in any range; what does not fit is
named.
"""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from lora_diag.errors import InputError
from lora_diag.storage import Checkpoint, open_checkpoint
from lora_diag.storage.safetensors import SafetensorsFile
from lora_diag.storage.scaled import ScaleGrid, grid_of
from tests.conftest import as_numpy, save_model, save_sharded
from tests.storage import quantizing
from tests.storage.quantizing import (
    FLOAT8,
    TABLES,
    as_bytes,
    eight_bit,
    four_bit,
    replaced,
    scaled,
    without,
)
from tests.storage.sharding import save_dcp

W = "model.layers.0.mlp.up_proj.weight"

E8M0 = torch.float8_e8m0fnu if hasattr(torch, "float8_e8m0fnu") else torch.float32


def exponents(tensors, weight):
    """Store scales of float8_e8m0fnu as the integers that they are, as compressed-tensors does."""
    return {
        name: value.view(torch.uint8) if value.dtype == E8M0 else value
        for name, value in tensors.items()
    }, weight


# What is stored -> (tensors, weight), the word for the storage format.
KINDS = {
    "nf4": (four_bit(W, (24, 40)), "nf4"),
    "nf4, shorter than a block": (four_bit(W, (3, 5)), "nf4"),
    "nf4, odd, ragged last block": (four_bit(W, (9, 33)), "nf4"),
    "nf4, double": (four_bit(W, (40, 35), nested=4), "nf4"),
    "fp4": (four_bit(W, (24, 40), kind="fp4", block=32), "fp4"),
    "fp4, double": (four_bit(W, (24, 40), kind="fp4", nested=256), "fp4"),
    "bitsandbytes int8": (eight_bit(W.removesuffix(".weight"), (12, 20)), "int8"),
    "fp8 blocks": (scaled(W, (32, 48), (2, 3), (16, 16)), "float8_e4m3fn"),
    "fp8 blocks, ragged": (scaled(W, (35, 45), (3, 3), (16, 16)), "float8_e4m3fn"),
    "fp8 blocks, one row of them": (scaled(W, (5, 45), (1, 3), (16, 16)), "float8_e4m3fn"),
    "fp8 blocks of three": (scaled(W, (15, 21), (5, 7), (3, 3)), "float8_e4m3fn"),
    "fp8 blocks, bf16 scales": (
        scaled(W, (32, 48), (2, 3), (16, 16), scale_dtype=torch.bfloat16),
        "float8_e4m3fn",
    ),
    "fp8 blocks, e8m0 scales": (
        scaled(W, (32, 48), (2, 3), (16, 16), scale_dtype=E8M0),
        "float8_e4m3fn",
    ),
    "mxfp8": (
        exponents(*scaled(W, (4, 64), (4, 2), (1, 32), suffix="_scale", scale_dtype=E8M0)),
        "float8_e4m3fn",
    ),
    "fp8 e5m2 per row": (
        scaled(W, (7, 9), (7, 1), (1, 9), kind="float8_e5m2", suffix="_scale"),
        "float8_e5m2",
    ),
    "fp8 per row, 1-D": (scaled(W, (7, 9), (7,), (1, 9), suffix="_scale"), "float8_e4m3fn"),
    "fp8 per tensor, 0-D": (scaled(W, (7, 9), (), (7, 9), suffix="_scale"), "float8_e4m3fn"),
    "fp8 per tensor, 1-D": (scaled(W, (7, 9), (1,), (7, 9)), "float8_e4m3fn"),
    "fp8 per group of columns": (
        scaled(W, (7, 16), (7, 4), (1, 4), suffix="_scale"),
        "float8_e4m3fn",
    ),
    "int8 per row": (scaled(W, (7, 9), (7, 1), (1, 9), kind="int8", suffix="_scale"), "int8"),
    "fp8 experts, blocks": (scaled(W, (3, 20, 12), (3, 3, 2), (8, 8)), "float8_e4m3fn"),
    "fp8 experts, per row": (scaled(W, (3, 5, 4), (3, 5, 1), (1, 4)), "float8_e4m3fn"),
    "fp8 experts, per expert": (scaled(W, (3, 5, 4), (3, 1, 1), (5, 4)), "float8_e4m3fn"),
    "fp8 experts, per tensor": (scaled(W, (3, 5, 4), (1,), (5, 4)), "float8_e4m3fn"),
}


if not hasattr(
    torch, "float8_e8m0fnu"
):  # before torch 2.7: the stand-in above has no exponents to store
    del KINDS["mxfp8"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_range_equals_decoded_weight(tmp_path, kind):
    (tensors, expected), stored = KINDS[kind]
    checkpoint = open_checkpoint(save_model(tmp_path, tensors | {"norm.weight": torch.ones(3)}))
    assert set(checkpoint) == {W, "norm.weight"}
    info = checkpoint[W]
    assert (info.shape, info.dtype, info.stored) == (expected.shape, "float32", stored)
    assert stored in checkpoint.notes[0]
    flat = expected.reshape(-1)
    rng = np.random.default_rng(0)
    ranges = [(0, flat.size), (0, 0), (flat.size, flat.size), (0, 1), (flat.size - 1, flat.size)]
    ranges += [tuple(sorted(rng.integers(0, flat.size + 1, 2))) for _ in range(12)]
    for start, stop in ranges:
        read = checkpoint.read(W, int(start), int(stop))
        assert read.dtype == torch.float32 or start == stop
        np.testing.assert_allclose(as_numpy(read), flat[start:stop], rtol=3e-7, atol=1e-12)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_steps_of_four_bit_weights_reach_farther_neighbour(tmp_path, kind):
    tensors, expected = four_bit(W, (6, 22), kind=kind)
    checkpoint = open_checkpoint(save_model(tmp_path, tensors))
    absmax = np.repeat(tensors[f"{W}.absmax"].double().numpy(), 64)[: expected.size]
    table = np.float32(TABLES[kind]).astype(np.float64)
    codes = [int(np.abs(table - value).argmin()) for value in expected.reshape(-1) / absmax]
    steps = (
        np.array([quantizing.step_of(float(table[code]), list(table)) for code in codes]) * absmax
    )
    np.testing.assert_allclose(as_numpy(checkpoint.read_steps(W)), steps, rtol=1e-6)
    np.testing.assert_allclose(as_numpy(checkpoint.read_steps(W, 17, 99)), steps[17:99], rtol=1e-6)


@pytest.mark.parametrize("block", [64, 7])
def test_doubly_quantized_weight_error_is_within_half_step(tmp_path, block):
    """Quantize real numbers: nearest codes under the exact absmax, read back under the quantized
    one.
    """
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((16, 28)) * 0.02
    tensors, _ = four_bit(W, weight.shape, block=block, nested=3)
    starts = range(0, weight.size, block)
    absmax = np.array([np.abs(weight.reshape(-1)[k : k + block]).max() for k in starts])
    table = np.repeat(np.linspace(-1, 1, 8), 32)  # coarse, so that the error of the absmax shows
    nested_max = np.array(
        [np.abs(absmax[b : b + 3] - 0.05).max() for b in range(0, len(absmax), 3)]
    )
    nested = [
        int(np.abs(table - (value - 0.05) / nested_max[b // 3]).argmin())
        for b, value in enumerate(absmax)
    ]
    nf4 = np.array(TABLES["nf4"])
    codes = [
        int(np.abs(nf4 - value / absmax[k // block]).argmin())
        for k, value in enumerate(weight.reshape(-1))
    ]
    tensors[W] = torch.tensor(
        [16 * codes[k] + codes[k + 1] for k in range(0, len(codes), 2)], dtype=torch.uint8
    )
    tensors[f"{W}.absmax"] = torch.tensor(nested, dtype=torch.uint8)
    tensors[f"{W}.nested_absmax"] = torch.from_numpy(nested_max).float()
    tensors[f"{W}.nested_quant_map"] = torch.from_numpy(table).float()
    checkpoint = open_checkpoint(save_model(tmp_path, tensors))
    error = np.abs(as_numpy(checkpoint.read(W)) - weight.reshape(-1))
    steps = as_numpy(checkpoint.read_steps(W))
    assert (error <= steps / 2 + 1e-8).all()
    assert error.max() > steps.mean() / 4


@pytest.mark.parametrize("kind", FLOAT8)
def test_steps_of_eight_bit_floats_are_spacing_above(tmp_path, kind):
    legal = [code for code in range(256) if code not in FLOAT8[kind][3]]
    codes = torch.tensor(legal, dtype=torch.uint8).view(getattr(torch, kind)).view(2, -1)
    checkpoint = open_checkpoint(save_model(tmp_path, {W: codes, W + "_scale": torch.tensor(0.5)}))
    for code, step in zip(legal, checkpoint.read_steps(W).tolist(), strict=True):
        if code + 1 in legal:
            assert (
                step
                == abs(
                    quantizing.float8_value(code + 1, kind) - quantizing.float8_value(code, kind)
                )
                / 2
            )


def test_integer_steps_are_their_scale_and_floats_have_none(tmp_path):
    tensors, _ = eight_bit("a", (3, 4))
    checkpoint = open_checkpoint(save_model(tmp_path, tensors | {"b": torch.ones(2, 2)}))
    steps = np.repeat(as_numpy(tensors["a.SCB"]), 4) / 127
    np.testing.assert_allclose(as_numpy(checkpoint.read_steps("a.weight")), steps)
    assert checkpoint.read_steps("b") is None
    assert (
        open_checkpoint(save_model(tmp_path / "plain", {"b": torch.ones(2, 2)})).read_steps("b")
        is None
    )


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_in_storage_of_another_dtype(tmp_path, storage):
    """FSDP wants one dtype for all: ``bnb_4bit_quant_storage``."""
    tensors, expected = four_bit(W, (24, 40))
    tensors[W] = tensors[W].view(-1).view(storage).view(-1, 1)
    checkpoint = open_checkpoint(save_model(tmp_path, tensors))
    np.testing.assert_allclose(
        as_numpy(checkpoint.read(W, 5, 333)), expected.reshape(-1)[5:333], rtol=3e-7
    )


def test_parts_may_lie_in_other_shards_and_in_torch_files(tmp_path):
    tensors, expected = four_bit(W, (24, 40), nested=4)
    for suffix in ("safetensors", "bin"):
        checkpoint = open_checkpoint(
            save_sharded(tmp_path / suffix, tensors, shards=4, suffix=suffix)
        )
        assert list(checkpoint) == [W]
        repeated = pickle.loads(pickle.dumps(checkpoint))
        np.testing.assert_allclose(as_numpy(repeated.read(W)), expected.reshape(-1), rtol=3e-7)


@pytest.mark.parametrize(
    "tensors",
    [four_bit(W, (256, 512), nested=4)[0], scaled(W, (256, 512), (2, 4), (128, 128))[0]],
    ids=["nf4", "fp8"],
)
def test_range_reads_only_what_it_needs(tmp_path, monkeypatch, tensors):
    """A range of 100 entries of a 256 × 512 matrix touches a few hundred stored entries, tables
    included.
    """
    checkpoint = open_checkpoint(save_model(tmp_path, tensors))
    counts, original = [], SafetensorsFile.read

    def counting(self, name, start, stop):
        counts.append(stop - start)
        return original(self, name, start, stop)

    monkeypatch.setattr(SafetensorsFile, "read", counting)
    assert len(checkpoint.read(W, 100_001, 100_101)) == 100
    assert sum(counts) < 500


def test_activation_scales_are_hidden(tmp_path):
    tensors, _ = scaled("a.weight", (4, 4), (), (4, 4), suffix="_scale")
    tensors["a.input_scale"] = torch.tensor(0.1)
    assert list(open_checkpoint(save_model(tmp_path, tensors))) == ["a.weight"]


def test_ambiguous_block_size_is_read_from_config(tmp_path):
    """17 rows in 2 blocks: 16 (a power of two) would be inferred; the configuration says 12."""
    tensors, expected = scaled(W, (17, 30), (2, 3), (12, 12))
    folder = save_model(
        tmp_path, tensors, {"quantization_config": FP8 | {"weight_block_size": [12, 12]}}
    )
    np.testing.assert_allclose(
        as_numpy(open_checkpoint(folder).read(W)), expected.reshape(-1), rtol=3e-7
    )
    file = open_checkpoint(folder / "model.safetensors")
    np.testing.assert_allclose(as_numpy(file.read(W)), expected.reshape(-1), rtol=3e-7)


# Consistency of stored tensors: every mismatch is one message that names file and tensor.

STATE = f"{W}.quant_state.bitsandbytes__nf4"


def state_with(**changes):
    def change(tensors):
        state = json.loads(bytes(tensors[STATE].tolist()))
        tensors[STATE] = as_bytes(state | changes)

    return change


BAD_FOUR_BIT = {
    "unknown type": (
        lambda t: t.update({STATE[:-3] + "af4": t.pop(STATE)}),
        "supported are nf4 and fp4",
    ),
    "no settings": (without(STATE), "settings"),
    "no codes": (without(W), "is missing"),
    "no absmax": (without(f"{W}.absmax"), r"absmax is missing"),
    "no table": (without(f"{W}.quant_map"), r"quant_map is missing"),
    "no nested absmax": (without(f"{W}.nested_absmax"), r"nested_absmax is missing"),
    "no nested table": (without(f"{W}.nested_quant_map"), r"nested_quant_map is missing"),
    "short absmax": (
        replaced(f"{W}.absmax", torch.zeros(3, dtype=torch.uint8)),
        "3 uint8 entries instead of 15",
    ),
    "short codes": (
        replaced(W, torch.zeros(7, 1, dtype=torch.uint8)),
        "7 uint8 entries instead of 480",
    ),
    "codes of int64": (replaced(W, torch.zeros(480, dtype=torch.int64)), "int64"),
    "short table": (
        replaced(f"{W}.quant_map", torch.zeros(15)),
        "15 float32 entries instead of 16",
    ),
    "float absmax": (
        replaced(f"{W}.absmax", torch.zeros(15)),
        "15 float32 entries instead of 15 of uint8",
    ),
    "integer nested": (replaced(f"{W}.nested_absmax", torch.zeros(4, dtype=torch.int32)), "int32"),
    "not json": (
        replaced(STATE, torch.tensor([123, 125, 125], dtype=torch.uint8)),
        "does not hold the settings",
    ),
    "not utf-8": (
        replaced(STATE, torch.tensor([255, 254, 1], dtype=torch.uint8)),
        "does not hold the settings",
    ),
    "not an object": (
        replaced(STATE, torch.tensor([49], dtype=torch.uint8)),
        "does not hold the settings",
    ),
    "too long": (replaced(STATE, torch.full((20_000,), 32, dtype=torch.uint8)), "20,000"),
    "another type": (state_with(quant_type="nf3"), "nf3"),
    "no type": (state_with(quant_type=None), "None"),
    "no block": (state_with(blocksize=None), "blocksize"),
    "block of 0": (state_with(blocksize=0), "blocksize"),
    "block of true": (state_with(blocksize=True), "blocksize"),
    "huge block": (state_with(blocksize=2**40), "blocksize"),
    "no nested block": (state_with(nested_blocksize="a"), "nested_blocksize"),
    "no offset": (state_with(nested_offset=None), "nested_offset"),
    "infinite offset": (state_with(nested_offset=float("inf")), "nested_offset"),
    "huge offset": (state_with(nested_offset=10**400), "nested_offset"),
    "no shape": (state_with(shape=None), "shape"),
    "negative shape": (state_with(shape=[-24, -40]), "shape"),
    "huge shape": (state_with(shape=[2**50, 2**50]), "instead of"),
    "another shape": (state_with(shape=[24, 41]), "instead of"),
}


BAD_EIGHT_BIT = {
    "scales without weight": (without("a.weight"), r"a\.SCB has no int8 matrix"),
    "scales of another matrix": (replaced("a.SCB", torch.ones(5)), r"a\.SCB has no int8 matrix"),
    "scales of a float": (replaced("a.weight", torch.ones(12, 20)), r"a\.SCB has no int8 matrix"),
    "turned layout": (replaced("a.weight_format", torch.tensor(2, dtype=torch.uint8)), "row-major"),
    "no scales": (without("a.SCB"), r"a\.weight is stored as int8"),
}


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
ASYMMETRIC = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int", "symmetric": False}}},
}


def scales(*shape, dtype=torch.float32):
    return replaced(f"{W}_scale_inv", torch.ones(shape, dtype=dtype))


BAD_SCALES = {
    "missing": (without(f"{W}_scale_inv"), "without scales", FP8),
    "missing for one weight": (
        lambda t: t.update({f"bare.{W}": t[W].clone()}),
        rf"bare\.{W} .* without scales",
    ),
    "of integers": (scales(2, 3, dtype=torch.int32), "scales must be floats", FP8),
    "another grid": (scales(3, 2), r"in blocks of 16 × 16", FP8),
    "another grid, no configuration": (scales(31, 2), "does not match"),
    "an ambiguous grid": (scales(9, 3), "does not match"),
    "too many dimensions": (scales(1, 2, 3), "does not match"),
    "empty": (scales(0, 3), "does not match"),
    "a row too many": (scales(33, 1), "does not match"),
    "bad configuration": (scales(2, 3), "weight_block_size", FP8 | {"weight_block_size": [16, 0]}),
    "worse configuration": (scales(2, 3), "weight_block_size", FP8 | {"weight_block_size": "16"}),
}
BAD_INTEGERS = {
    "zero points": (
        replaced(f"{W}_zero_point", torch.zeros(7, 1, dtype=torch.int8)),
        "zero points",
    ),
    "asymmetric without zero points": (dict, f"{W}_zero_point .* asymmetric", ASYMMETRIC),
}

BAD = {
    f"{kind}: {bad}": (tensors, *rest)
    for kind, (tensors, _), each in (
        ("4 bits", four_bit(W, (24, 40), nested=4), BAD_FOUR_BIT),
        ("8 bits", eight_bit("a", (12, 20)), BAD_EIGHT_BIT),
        ("scales", scaled(W, (32, 48), (2, 3), (16, 16)), BAD_SCALES),
        ("int8", scaled(W, (7, 9), (7, 1), (1, 9), kind="int8", suffix="_scale"), BAD_INTEGERS),
    )
    for bad, rest in each.items()
}


@pytest.mark.parametrize("kind", BAD)
def test_inconsistent_weights_are_refused(tmp_path, kind):
    original, change, words, *config = BAD[kind]
    tensors = dict(original)
    change(tensors)
    folder = save_model(tmp_path, tensors, {"quantization_config": config[0]} if config else None)
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(folder)
    assert str(tmp_path) in str(caught.value)
    assert any(name in str(caught.value) for name in (*original, "config.json"))


def test_plain_eight_bit_floats_are_listed_unchanged(tmp_path):
    checkpoint = open_checkpoint(
        save_model(tmp_path, {"a": torch.ones(4, 4).to(torch.float8_e4m3fn)})
    )
    assert (checkpoint["a"].dtype, checkpoint["a"].stored) == ("float8_e4m3fn", None)


@pytest.mark.parametrize(
    ("shape", "scales", "block"),
    [
        ((300, 512), (3, 4), (128, 128)),
        ((1536, 7168), (12, 56), (128, 128)),
        ((576, 7168), (5, 56), (128, 128)),
    ],
)
def test_blocks_of_128_are_inferred(tmp_path, shape, scales, block):
    """The shapes of DeepSeek-V3, ragged ones included."""
    folder = save_model(
        tmp_path, {"a": torch.zeros(shape, dtype=torch.int8), "s": torch.ones(scales)}
    )
    stored = Checkpoint(folder, "", (SafetensorsFile(folder / "model.safetensors"),))
    assert grid_of(stored, "a", "s") == ScaleGrid(*scales, block)


def test_opening_checkpoints_imports_no_torch(tmp_path):
    tensors = (
        four_bit(W, (24, 40), nested=4)[0]
        | eight_bit("a", (3, 4))[0]
        | scaled("b.weight", (4, 4), (), (4, 4))[0]
    )
    folder = save_model(tmp_path, {f"module.{name}": value for name, value in tensors.items()})
    dcp = save_dcp(tmp_path / "dcp", {"a": torch.ones(4, 4)}, {"a": [[3, 1], [4]]})
    code = (
        "import sys; from lora_diag.storage import open_checkpoint; assert "
        f"[len(open_checkpoint(path)) for path in ({str(folder)!r}, {str(dcp)!r})] == [3, 1]; "
        "assert not {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
