"""Packed weights (compressed-tensors, GPTQ, AWQ, MLX, MXFP4) are read as what their codes stand
for, in any range.
"""

import json
import pickle

import numpy as np
import pytest
import torch

import lora_diag
from lora_diag.errors import InputError
from lora_diag.storage import open_checkpoint
from lora_diag.storage.packing import unpack
from tests.adapters.making import adapter, normal, write
from tests.conftest import as_numpy, save_model, save_sharded
from tests.messages import mentions, raises_naming
from tests.storage.packed import awq, compressed, experts, float4, gptq, mlx, words
from tests.storage.quantizing import replaced, without
from tests.storage.test_fuzz import assert_mutants_are_read_or_refused

M = "model.layers.0.mlp.up_proj"
W = f"{M}.weight"
E = "model.layers.0.mlp.experts.down_proj"


def ct(bits, form="pack-quantized", **scheme):
    group = {"weights": {"num_bits": bits, **scheme}, "format": form}
    return {
        "quantization_config": {
            "config_groups": {"group_0": group},
            "quant_method": "compressed-tensors",
        }
    }


CT = ct(4)
V1 = {"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}}
V2 = {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}}
GPTQ_8 = {"quantization_config": {"quant_method": "gptq", "bits": 8}}
AWQ = {"quantization_config": {"quant_method": "awq", "version": "gemm"}}
MX = {"quantization_config": {"quant_method": "mxfp4"}}


def of_mlx(bits, group=32):
    return {"quantization": {"bits": bits, "group_size": group, "mode": "affine"}}


# What is stored -> (tensors, weight, steps), configuration, word for the storage format.
KINDS = {
    "int4 groups": (compressed(M, (12, 40), groups=5), CT, "packed-int4"),
    "int4 channel, padded": (compressed(M, (5, 13), groups=1), CT, "packed-int4"),
    "int4 zero points": (compressed(M, (13, 24), groups=3, zeros=True), CT, "packed-int4"),
    "int8 act-order": (
        compressed(M, (9, 20), bits=8, groups=4, ordered=True),
        ct(8),
        "packed-int8",
    ),
    "int5 across words, zero points": (
        compressed(M, (11, 24), bits=5, groups=2, zeros=True),
        ct(5),
        "packed-int5",
    ),
    "nvfp4": (float4(M, (6, 48)), CT, "nvfp4"),
    "nvfp4 of modelopt": (float4(M, (6, 48), "modelopt"), {}, "nvfp4"),
    "mxfp4 of compressed-tensors": (float4(M, (6, 64), "mxfp4"), CT, "mxfp4"),
    "gptq": (gptq(M, (24, 32)), V1, "gptq-int4"),
    "gptq without act-order": (gptq(M, (24, 32), groups=4, ordered=False), V1, "gptq-int4"),
    "gptq 8 bit": (gptq(M, (12, 20), bits=8, groups=3), GPTQ_8, "gptq-int8"),
    "gptq_v2": (gptq(M, (24, 32), v2=True), V2, "gptq-int4"),
    "awq": (awq(M, (24, 20)), AWQ, "awq-int4"),
    "mlx 4 bit": (mlx(M, (7, 64)), of_mlx(4), "mlx-int4"),
    "mlx 3 bit": (mlx(M, (7, 64), bits=3), of_mlx(3), "mlx-int3"),
    "mlx 6 bit experts": (mlx(M, (2, 5, 64), bits=6, group=64), of_mlx(6, 64), "mlx-int6"),
    "gpt-oss": (experts(E, (3, 64, 10)), MX, "mxfp4"),
}


def save(folder, kind):
    (tensors, _, _), config, _ = KINDS[kind]
    save_model(folder, tensors | {"norm.weight": torch.ones(3)}, config)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_range_and_step_matches_codes(tmp_path, kind):
    (_, expected, steps), _, stored = KINDS[kind]
    checkpoint = pickle.loads(pickle.dumps(open_checkpoint(save(tmp_path, kind))))
    name = E if kind == "gpt-oss" else W
    assert set(checkpoint) == {name, "norm.weight"}
    info = checkpoint[name]
    assert (info.shape, info.dtype, info.stored) == (expected.shape, "float32", stored)
    flat, size = expected.reshape(-1), expected.size
    rng = np.random.default_rng(0)
    ranges = [sorted(rng.integers(0, size + 1, 2)) for _ in range(12)]
    for start, stop in [(0, size), (0, 0), (size - 1, size), *ranges]:
        read, step = (
            checkpoint.read(name, int(start), int(stop)),
            checkpoint.read_steps(name, int(start), int(stop)),
        )
        assert read.dtype == torch.float32
        np.testing.assert_allclose(as_numpy(read), flat[start:stop], rtol=3e-7, atol=1e-12)
        np.testing.assert_allclose(
            as_numpy(step), steps.reshape(-1)[start:stop], rtol=3e-7, atol=1e-12
        )


def test_parts_of_packed_weights_may_lie_in_other_shards(tmp_path):
    tensors, expected, _ = compressed(M, (12, 40), groups=5, zeros=True)
    checkpoint = open_checkpoint(
        save_sharded(tmp_path, tensors | {"b.weight": torch.ones(2, 2)}, shards=4)
    )
    assert set(checkpoint) == {W, "b.weight"}
    np.testing.assert_allclose(as_numpy(checkpoint.read(W)), expected.reshape(-1), rtol=3e-7)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_any_width_are_unpacked(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, 37))
    assert (unpack(torch.from_numpy(words(codes, bits)), bits, 37).numpy() == codes).all()


def test_rounding_to_a_packed_grid_is_within_half_a_step(tmp_path):
    """Nearest codes of random weights: the error never exceeds half of a step, and
    comes near it.
    """
    weight = 0.05 * normal(16, 64)
    checkpoint = open_checkpoint(save_model(tmp_path, quantized_by_mlx(weight, 4), of_mlx(4)))
    error = np.abs(as_numpy(checkpoint.read(W)).reshape(16, 64) - weight)
    half = as_numpy(checkpoint.read_steps(W)).reshape(16, 64) / 2
    assert (error <= half + 1e-7).all()
    assert (error > 0.8 * half).any()


# A symmetric and an asymmetric group of the same bits do not say which weight is which.
BOTH = ct(4, symmetric=True)
BOTH["quantization_config"]["config_groups"]["group_1"] = {
    "weights": {"num_bits": 4, "symmetric": False}
}
DYNAMIC = {
    "quant_method": "gptq",
    "bits": 8,
    "dynamic": {"-:.*down.*": {}, "+:.*up.*": {"bits": 4}},
}
MODULE = {"bits": 8, "group_size": 64}
SETTINGS = {
    "mlx, of a module": (
        mlx(M, (4, 64), bits=8, group=64),
        {"quantization": of_mlx(4)["quantization"] | {M: MODULE}},
    ),
    "gptq, of a module": (gptq(M, (24, 32)), {"quantization_config": DYNAMIC}),
    "of other weights": (compressed(M, (12, 40), groups=5), BOTH),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_of_a_weight_apply_to_it_alone(tmp_path, kind):
    (tensors, expected, _), config = SETTINGS[kind]
    folder = save_model(tmp_path, tensors, config)
    np.testing.assert_allclose(
        as_numpy(open_checkpoint(folder).read(W)), expected.reshape(-1), rtol=3e-7
    )


@pytest.mark.parametrize("stated", [{}, {"checkpoint_format": "gptq_v2"}])
def test_settings_of_autogptq_are_read_from_their_own_file(tmp_path, stated):
    """AutoGPTQ publishes ``quantize_config.json`` next to a config.json without quantization."""
    tensors, expected, _ = gptq(M, (24, 32), v2=bool(stated))
    folder = save_model(tmp_path, tensors, {"model_type": "llama"})
    (folder / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 16, "sym": False} | stated)
    )
    checkpoint = open_checkpoint(folder)
    np.testing.assert_allclose(as_numpy(checkpoint.read(W)), expected.reshape(-1), rtol=3e-7)


@pytest.mark.parametrize(("sym", "noted"), [(False, True), (True, False)])
def test_zero_points_of_0_in_gptq_v1_are_noted(tmp_path, sym, noted):
    tensors, _, _ = gptq(M, (24, 32))
    tensors[f"{M}.qzeros"] = torch.full_like(
        tensors[f"{M}.qzeros"], 0x0F000000 if noted else 0x77777777
    )
    settings = V1["quantization_config"] | {"sym": sym}
    folder = save_model(tmp_path, tensors, {"quantization_config": settings})
    assert (
        any(mentions(note, "auto-gptq", "gptqmodel") for note in open_checkpoint(folder).notes)
        == noted
    )


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


# Kind, change of the tensors or of the configuration, words of the message.
BAD = {
    "no scales": ("int4 groups", without(f"{M}.weight_scale"), "weight_scale is missing"),
    "scales of other rows": (
        "int4 groups",
        replaced(f"{M}.weight_scale", torch.ones(11, 5)),
        r"needs .* \[12, 5\]",
    ),
    "unequal groups": ("int4 groups", replaced(f"{M}.weight_scale", torch.ones(12, 3)), "3 groups"),
    "integer scales": ("int4 groups", replaced(f"{M}.weight_scale", ints(12, 5)), "is int32"),
    "no shape": ("int4 groups", without(f"{M}.weight_shape"), "weight_shape is missing"),
    "a negative shape": (
        "int4 groups",
        replaced(f"{M}.weight_shape", torch.tensor([-12, 40])),
        r"\[-12, 40\]",
    ),
    "a huge shape": (
        "int4 groups",
        replaced(f"{M}.weight_shape", torch.tensor([2**62, 40])),
        "gives the shape",
    ),
    "more columns": (
        "int4 groups",
        replaced(f"{M}.weight_shape", torch.tensor([12, 400])),
        "no number of bits",
    ),
    "few columns": (
        "int4 groups",
        replaced(f"{M}.weight_shape", torch.tensor([12, 30])),
        "no number of bits",
    ),
    "zero points of other rows": (
        "int4 zero points",
        replaced(f"{M}.weight_zero_point", ints(9, 3)),
        r"\[2, 3\]",
    ),
    "no order": ("int8 act-order", replaced(f"{M}.weight_g_idx", ints(19)), r"needs .* \[20\]"),
    "no float4 scale": ("nvfp4", without(f"{M}.weight_scale"), "weight_scale is missing"),
    "float4 groups": ("nvfp4", replaced(f"{M}.weight_scale", torch.ones(6, 3)), "is float32"),
    "two global scales": (
        "nvfp4",
        replaced(f"{M}.weight_global_scale", torch.ones(2)),
        "not a single float",
    ),
    "stored twice": ("nvfp4", replaced(W, torch.ones(2, 2)), "stored twice"),
    "no zero points, asymmetric": (
        "int4 groups",
        ct(4, symmetric=False),
        "_zero_point is missing, .* asymmetric",
    ),
    "zero points, symmetric": (
        "int4 zero points",
        ct(4, symmetric=True),
        "_zero_point is stored, .* symmetric",
    ),
    "format of marlin": (
        "int4 groups",
        ct(4, "marlin-24"),
        "compressed-tensors format 'marlin-24'",
    ),
    "gptq of 5 bits": ("gptq", {"quant_method": "gptq", "bits": 5}, "has 4 bits a code, .* is 5"),
    "gptq of 4 bits as text": (
        "gptq",
        {"quant_method": "gptq", "bits": "4"},
        "has 4 bits a code, .* is '4'",
    ),
    "gptq of other bits in a module": (
        "gptq",
        {"quant_method": "gptq", "bits": 2, "dynamic": {"+:.*gate": {"bits": 8}, "-:.*down": {}}},
        "has 4 bits a code, .* is 2",
    ),
    "gptq of a list of modules": (
        "gptq",
        {"quant_method": "gptq", "dynamic": [1]},
        "dynamic .*is a list",
    ),
    "awq of 8 bits": ("awq", {"quant_method": "awq", "bits": 8}, "has 4 bits a code, .* is 8"),
    "gptq without its order": (
        "gptq without act-order",
        {"desc_act": True},
        "g_idx is missing, .*desc_act",
    ),
    "gptq scales": ("gptq", without(f"{M}.scales"), "no known form .*scales is missing"),
    "gptq zeros": ("gptq", without(f"{M}.qzeros"), "qzeros is missing"),
    "gptq other zeros": ("gptq", replaced(f"{M}.qzeros", ints(2, 2)), "has 2 bits a code"),
    "gptq order": ("gptq", replaced(f"{M}.g_idx", ints(31)), r"\[32\]"),
    "gptq layout": ("gptq", replaced(f"{M}.qweight", ints(4, 5)), "not laid out"),
    "gptq without config": ("gptq", {}, "without quantization_config"),
    "gptq of marlin": ("gptq", {"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin'"),
    "awq of gemv": ("awq", {"quant_method": "awq", "version": "GEMV"}, "'gemv'"),
    "awq that is gptq": ("awq", {"quant_method": "gptq"}, "not laid out as gptq"),
    "awq zeros": ("awq", replaced(f"{M}.qzeros", ints(2, 4)), r"\[2, 3\]"),
    "awq groups": (
        "awq",
        {"quant_method": "awq", "group_size": 4},
        "2 groups for 20 inputs in groups of 4",
    ),
    "mlx without settings": ("mlx 4 bit", {}, "bits None"),
    "mlx of another mode": (
        "mlx 4 bit",
        {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        "mode 'mxfp4'",
    ),
    "mlx groups": ("mlx 4 bit", {"bits": 4, "group_size": 128}, "whole number of groups of 128"),
    "mlx biases": ("mlx 4 bit", without(f"{M}.biases"), "biases is missing"),
    "experts without scales": ("gpt-oss", without(f"{E}_scales"), "_scales is missing"),
    "experts of other scales": (
        "gpt-oss",
        replaced(f"{E}_scales", torch.ones(3, 10, 2)),
        "is float32",
    ),
    "experts of other blocks": (
        "gpt-oss",
        replaced(f"{E}_blocks", ints(3, 10, 2, 8)),
        "not the uint8",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_inconsistent_packed_weights_give_one_message(tmp_path, bad):
    kind, change, problem = BAD[bad]
    (tensors, _, _), config, _ = KINDS[kind]
    tensors = dict(tensors)
    if callable(change):
        change(tensors)
    else:
        config = change if "quantization_config" in change else {"quantization_config": change}
    save_model(tmp_path, tensors, config)
    with pytest.raises(InputError, match=problem) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("kind", "part"), [("gptq", "g_idx"), ("int8 act-order", "weight_g_idx")])
@pytest.mark.parametrize("group", [-1, 4])
def test_missing_group_is_named(tmp_path, kind, part, group):
    (tensors, _, _), config, _ = KINDS[kind]
    changed = tensors[f"{M}.{part}"].clone()
    changed[3] = group
    save_model(tmp_path, tensors | {f"{M}.{part}": changed}, config)
    with raises_naming(InputError, part, group):
        open_checkpoint(tmp_path).read(W)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_packed_files(tmp_path, kind):
    assert_mutants_are_read_or_refused(save(tmp_path, kind) / "model.safetensors", rounds=100)


def quantized_by_mlx(weight, bits, group=32):
    """Return the tensors of a weight rounded to the nearest codes between the extremes of every
    group.
    """
    rows, columns = weight.shape
    grouped = weight.reshape(rows, columns // group, group)
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    scale = torch.tensor((high - low) / (2**bits - 1)).float()
    bias = torch.tensor(low).float()
    s, b = (np.repeat(part.double().numpy(), group, 1) for part in (scale, bias))
    codes = np.clip(np.round((weight - b) / s), 0, 2**bits - 1).astype(int)
    packed = torch.from_numpy(words(codes, bits)).view(torch.uint32)
    return {W: packed, f"{M}.scales": scale, f"{M}.biases": bias}


@pytest.mark.parametrize("bits", [4, 8])
def test_merge_into_packed_format_passes_within_rounding(tmp_path, bits):
    weight = 0.05 * normal(32, 64, seed=1)
    a, b = normal(2, 64, seed=2), 0.05 * normal(32, 2, seed=3)
    base = write(tmp_path / "base" / "model.safetensors", {W: weight}).parent
    factors = adapter(tmp_path, {f"{M}.lora_A.weight": a, f"{M}.lora_B.weight": b})
    for scale, right in ((1.5, True), (3.0, False)):
        folder = save_model(
            tmp_path / f"merged{scale}",
            quantized_by_mlx(weight + scale * b @ a, bits),
            of_mlx(bits),
        )
        (record,) = lora_diag.verify_merge(base, factors, folder).layers
        assert record.status == ("ok" if right else "wrong scale")
