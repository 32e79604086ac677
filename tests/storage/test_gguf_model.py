"""GGUF models: every type's numbers and steps, names and row orders of transformers, models in
parts.
"""

import pickle

import numpy as np
import pytest
import torch

import lora_diag
from lora_diag.errors import InputError
from lora_diag.storage import open_checkpoint
from lora_diag.storage.gguf import CODECS
from tests.adapters.making import adapter, normal, write
from tests.conftest import as_numpy
from tests.messages import assert_names, raises_naming
from tests.storage.gguf_files import llama, write_gguf

gguf = pytest.importorskip("gguf")


def blocks_of(name, count=200):
    kind = getattr(gguf.GGMLQuantizationType, name)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (count, gguf.constants.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(blocks, kind).reshape(count, -1)
    finite = np.isfinite(values).all(axis=1) & (
        blocks[:, 0] != 255
    )  # as an exponent of MXFP4: not a number
    return blocks[finite], values[finite]


@pytest.mark.parametrize("name", CODECS)
def test_codec_equals_gguf_library(name):
    blocks, values = blocks_of(name)
    assert len(blocks) > 100
    np.testing.assert_array_equal(CODECS[name].decode(torch.from_numpy(blocks)).numpy(), values)


# Entries that share a step.
GROUPS = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16}


@pytest.mark.parametrize("name", [name for name in CODECS if not name.startswith(("MX", "IQ"))])
def test_codec_steps_are_the_smallest_gaps_of_a_group(name):
    """In units of the step, values differ by whole numbers, and by 1 somewhere."""
    blocks, values = blocks_of(name)
    codec = CODECS[name]
    steps = codec.steps(torch.from_numpy(blocks)).double().numpy()
    width = GROUPS.get(name, 32)
    unit = np.repeat(
        codec.unpack(torch.from_numpy(blocks))[1].abs().double().numpy().reshape(-1, 1), width, 1
    )
    values, steps = (array.astype(np.float64).reshape(-1, width) for array in (values, steps))
    assert (steps >= unit).all()
    steps = unit
    good = steps[:, 0] > 1e-4 * np.abs(values).max(
        axis=1
    )  # of others the offset hides the differences
    gaps = (values[good] - values[good, :1]) / steps[good]
    np.testing.assert_allclose(gaps, np.round(gaps), atol=1e-2)
    ordered = np.diff(np.sort(np.round(gaps), axis=1), axis=1)
    assert ordered[ordered > 0].min() == 1


QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")


@pytest.mark.parametrize("name", QUANTIZED)
def test_library_quantizer_error_is_within_half_step(name):
    kind = getattr(gguf.GGMLQuantizationType, name)
    values = (np.random.default_rng(0).standard_normal((300, 32)) * 0.02).astype("f4")
    blocks = torch.from_numpy(gguf.quants.quantize(values, kind))
    error = np.abs(CODECS[name].decode(blocks).numpy() - values)
    half = CODECS[name].steps(blocks).numpy() / 2
    assert (error <= half * (1 + 1e-6)).all()
    assert (error > 0.9 * half).any()


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])
def test_steps_of_tables_reach_the_farther_neighbour(name):
    """Between the sorted values that a group holds, of which random codes leave none out."""
    blocks, values = blocks_of(name, 600)
    steps = CODECS[name].steps(torch.from_numpy(blocks)).numpy()
    groups = 0
    for row, result in zip(values.reshape(-1, 32), steps.reshape(-1, 32), strict=True):
        held = np.unique(row)
        if len(held) < 16:
            continue
        groups += 1
        gap = np.diff(held)
        farther = np.maximum(np.append(0, gap), np.append(gap, 0))
        np.testing.assert_allclose(result, farther[np.searchsorted(held, row)], rtol=1e-6)
    assert groups > 10


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "MXFP4"])
def test_quantized_merge_is_correct_within_rounding(tmp_path, name):
    kind = getattr(gguf.GGMLQuantizationType, name)
    module = "model.layers.0.mlp.up_proj"
    weight, a, b = (
        0.05 * normal(32, 64, seed=1),
        normal(2, 64, seed=2),
        0.05 * normal(32, 2, seed=3),
    )
    base = write(tmp_path / "base" / "model.safetensors", {f"{module}.weight": weight}).parent
    factors = adapter(tmp_path, {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})
    for scale, status in ((1.5, "ok"), (3.0, "wrong scale")):
        content = gguf.quants.quantize((weight + scale * b @ a).astype("f4"), kind).tobytes()
        merged = write_gguf(
            tmp_path / "m.gguf", llama(), {"blk.0.ffn_up.weight": (name, (32, 64), content)}
        )
        (record,) = lora_diag.verify_merge(base, factors, merged).layers
        assert record.status == status


def permuted(weight, heads):
    """Reorder rows as llama.cpp's converter does."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def test_q_and_k_are_put_back_into_transformers_order(tmp_path):
    rng = np.random.default_rng(0)
    q, k, bias, v = (
        rng.standard_normal(shape).astype("f4") for shape in ((32, 6), (16, 6), (32,), (16, 6))
    )
    tensors = {
        "blk.0.attn_q.weight": permuted(q, 4),
        "blk.0.attn_k.weight": permuted(k, 2),
        "blk.0.attn_q.bias": permuted(bias, 4),
        "blk.0.attn_v.weight": v,
        "token_embd.weight": v,
        "rope_freqs.weight": bias,
    }
    checkpoint = pickle.loads(
        pickle.dumps(open_checkpoint(write_gguf(tmp_path / "m.gguf", llama(), tensors)))
    )
    layer = "model.layers.0.self_attn"
    assert set(checkpoint) == {
        *(
            f"{layer}.{name}"
            for name in ("q_proj.weight", "k_proj.weight", "q_proj.bias", "v_proj.weight")
        ),
        *("model.embed_tokens.weight", "rope_freqs.weight"),
    }
    for name, expected in (("q_proj.weight", q), ("k_proj.weight", k), ("q_proj.bias", bias)):
        flat = expected.reshape(-1)
        for start, stop in [
            (0, flat.size),
            (0, 0),
            (1, 2),
            (5, flat.size - 3),
            (flat.size // 2, flat.size),
        ]:
            read = checkpoint.read(f"{layer}.{name}", start, stop)
            np.testing.assert_array_equal(as_numpy(read), flat[start:stop])
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.config["num_key_value_heads"] == 2


def test_steps_of_reordered_rows_follow_their_values(tmp_path):
    """Each row is stored with a scale of its own."""
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(-127, 128, (8, 32)), (2.0 ** np.arange(8)).astype("f2")
    blocks = [scales[i].tobytes() + codes[i].astype("i1").tobytes() for i in range(8)]
    path = write_gguf(
        tmp_path / "m.gguf",
        llama(2, 2),
        {"blk.0.attn_q.weight": ("Q8_0", (8, 32), b"".join(blocks))},
    )
    checkpoint = open_checkpoint(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    order = [0, 2, 1, 3, 4, 6, 5, 7]  # of two heads of four rows, pairs to halves
    np.testing.assert_array_equal(
        as_numpy(checkpoint.read_scales(name)).reshape(8, 32)[:, 0], scales[order]
    )
    steps = as_numpy(checkpoint.read_steps(name)).reshape(8, 32)
    np.testing.assert_allclose(steps, ((1 + np.abs(codes) / 1024) * scales[:, None])[order])
    values = (codes * scales[:, None].astype(int))[order]
    np.testing.assert_array_equal(as_numpy(checkpoint.read(name)).reshape(8, 32), values)


def test_experts_and_norms_equal_transformers(tmp_path):
    rng = np.random.default_rng(0)
    stack = rng.standard_normal((3, 4, 5)).astype("f4")
    fields, tensors = {"general.architecture": "qwen3moe"}, {"blk.1.ffn_up_exps.weight": stack}
    moe = open_checkpoint(write_gguf(tmp_path / "e.gguf", fields, tensors))
    for expert in range(3):
        read = as_numpy(moe.read(f"model.layers.1.mlp.experts.{expert}.up_proj.weight", 3, 17))
        np.testing.assert_array_equal(read, stack[expert].reshape(-1)[3:17])
    norm = {"blk.0.attn_norm.weight": np.float32([0.5, 2, 1])}
    for architecture, expected in (("gemma2", [-0.5, 1, 0]), ("qwen2", [0.5, 2, 1])):
        path = write_gguf(
            tmp_path / f"{architecture}.gguf", {"general.architecture": architecture}, norm
        )
        assert (
            open_checkpoint(path).read("model.layers.0.input_layernorm.weight").tolist() == expected
        )


def test_unknown_architectures_keep_their_names(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf", {"general.architecture": "mamba9"}, {"blk.0.ssm_a": np.ones((2, 2))}
    )
    checkpoint = open_checkpoint(path)
    assert list(checkpoint) == ["blk.0.ssm_a"]
    assert_names(checkpoint.notes[0], "mamba9", "known")


def test_sharded_model_is_read_from_any_shard(tmp_path):
    q, name = np.arange(48, dtype="f4").reshape(8, 6), "model.layers.0.self_attn.q_proj.weight"
    write_gguf(tmp_path / "m-00001-of-00002.gguf", llama(2, 2), {"token_embd.weight": q})
    write_gguf(
        tmp_path / "m-00002-of-00002.gguf", {"split.no": 1}, {"blk.0.attn_q.weight": permuted(q, 2)}
    )
    for path in (tmp_path, tmp_path / "m-00002-of-00002.gguf"):
        checkpoint = open_checkpoint(path)
        assert set(checkpoint) == {"model.embed_tokens.weight", name}
        np.testing.assert_array_equal(as_numpy(checkpoint.read(name)), q.reshape(-1))
    write_gguf(tmp_path / "m-00002-of-00002.gguf", {"split.no": 1}, {"token_embd.weight": q})
    with pytest.raises(InputError, match="is in another part, too"):
        open_checkpoint(tmp_path)
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(InputError, match=r"the part m-00001-of-00002\.gguf is missing"):
        open_checkpoint(tmp_path / "m-00002-of-00002.gguf")


def test_folder_with_several_models_is_refused(tmp_path):
    for name in ("a", "b"):
        write_gguf(tmp_path / f"{name}.gguf", llama(), {"token_embd.weight": np.ones((2, 2))})
    with raises_naming(InputError, "2 GGUF", "models"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (llama(heads=3), "head_count is 3, which does not divide the 8 rows"),
        (llama(heads=0), "head_count is 0"),
        (llama(heads=[2, 4][:0]), r"head_count is None|head_count is \[\]"),
        ({"general.architecture": "llama"}, "head_count is None"),
        (
            {"general.architecture": "llama", "general.type": "adapter"},
            "is a GGUF adapter, not a model",
        ),
    ],
)
def test_invalid_gguf_settings_are_named(tmp_path, fields, problem):
    path = write_gguf(tmp_path / "m.gguf", fields, {"blk.0.attn_q.weight": np.ones((8, 2))})
    with pytest.raises(InputError, match=problem):
        open_checkpoint(path)


def test_two_gguf_tensors_of_one_meaning_are_refused(tmp_path):
    tensors = {"output.weight": np.ones((2, 2)), "lm_head.weight": np.ones((2, 2))}
    with raises_naming(InputError, "lm_head.weight"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", llama(), tensors))
