"""kohya, LyCORIS, diffusers and MLX files against float64 formulas."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_diag.adapters import is_adapter, open_adapter
from lora_diag.adapters.contents import read_contents
from lora_diag.deltas import FactoredDelta
from lora_diag.errors import InputError
from lora_diag.storage import open_checkpoint
from tests.adapters.making import base, changes, close, normal, write
from tests.messages import raises_naming

Q = "down_blocks.0.attn1.to_q"
FLAT = "lora_unet_down_blocks_0_attn1_to_q"
W = normal(8, 6, seed=3)
UP, DOWN = normal(8, 2), normal(2, 6, seed=1)
ALPHA = np.array(3.0)
RANKS = {"unet.r": 9, "unet.lora_alpha": 5, "unet.rank_pattern": {"to_q": 2}}


def kohya(tmp_path, tensors, **weights):
    folder = base(
        tmp_path,
        {f"{Q}.weight": W} | {name.replace("__", "."): value for name, value in weights.items()},
    )
    return write(tmp_path / "adapter" / "some.safetensors", tensors), folder


@pytest.mark.parametrize(
    ("extra", "scale"),
    [({f"{FLAT}.alpha": ALPHA}, 1.5), ({}, 1.0), ({f"{FLAT}.alpha": np.array(0.0)}, 1.0)],
)
def test_kohya_lora_is_scaled_by_alpha(tmp_path, extra, scale):
    tensors = {f"{FLAT}.lora_up.weight": UP, f"{FLAT}.lora_down.weight": DOWN} | extra
    path, folder = kohya(tmp_path, tensors)
    assert is_adapter(path)
    assert is_adapter(path.parent)
    result, notes = changes(path, folder)
    close(result[f"{Q}.weight"], scale * UP @ DOWN)
    assert any("no alpha" in note for note in notes) == (not extra)
    pairing, _ = open_adapter(path).pair(open_checkpoint(folder))
    assert isinstance(pairing.deltas[0], FactoredDelta)


def test_kohya_convolution_with_core(tmp_path):
    up, mid, down = (
        normal(8, 3, 1, 1),
        normal(3, 3, 3, 3),
        normal(3, 6, 1, 1),
    )  # the core is (r, r, kh, kw)
    tensors = {
        f"{FLAT}.lora_up.weight": up,
        f"{FLAT}.lora_mid.weight": mid,
        f"{FLAT}.lora_down.weight": down,
    }
    folder = base(tmp_path, {f"{Q}.weight": normal(8, 6, 3, 3)})
    result, _ = changes(write(tmp_path / "a.safetensors", tensors), folder)
    close(
        result[f"{Q}.weight"], np.einsum("oi,ijkl,jp->opkl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    )


def test_lycoris_loha_lokr_and_differences(tmp_path):
    w1a, w1b, w2a, w2b = normal(8, 2), normal(2, 6), normal(8, 2, seed=5), normal(2, 6, seed=5)
    loha = {
        f"{FLAT}.hada_w1_a": w1a,
        f"{FLAT}.hada_w1_b": w1b,
        f"{FLAT}.hada_w2_a": w2a,
        f"{FLAT}.hada_w2_b": w2b,
    }
    path, folder = kohya(tmp_path, loha | {f"{FLAT}.alpha": ALPHA})
    close(changes(path, folder)[0][f"{Q}.weight"], 1.5 * (w1a @ w1b) * (w2a @ w2b))
    (item,) = read_contents(open_adapter(path)).items
    assert (item.alpha, item.scale) == (3.0, 1.5)

    w1, b, a = normal(2, 3), normal(4, 2), normal(2, 2)
    lokr = {
        f"{FLAT}.lokr_w1": w1,
        f"{FLAT}.lokr_w2_a": b,
        f"{FLAT}.lokr_w2_b": a,
        f"{FLAT}.alpha": ALPHA,
    }
    path, folder = kohya(tmp_path, lokr)
    close(changes(path, folder)[0][f"{Q}.weight"], 1.5 * np.kron(w1, b @ a))
    assert read_contents(open_adapter(path)).items[0].scale == 1.5
    path, folder = kohya(
        tmp_path, {f"{FLAT}.lokr_w1": w1, f"{FLAT}.lokr_w2": normal(4, 2), f"{FLAT}.alpha": ALPHA}
    )
    close(changes(path, folder)[0][f"{Q}.weight"], np.kron(w1, normal(4, 2)))

    differences = {f"{FLAT}.diff": normal(8, 6), f"{FLAT}.diff_b": normal(8)}
    path, folder = kohya(tmp_path, differences, **{f"{Q}.bias": normal(8)})
    result, _ = changes(path, folder)
    close(result[f"{Q}.weight"], normal(8, 6))
    close(result[f"{Q}.bias"], normal(8))


LYCORIS = {
    "lora": ({"lora_up.weight": UP, "lora_down.weight": DOWN}, UP @ DOWN),
    "loha": (
        {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP + 1, "hada_w2_b": DOWN - 1},
        (UP @ DOWN) * ((UP + 1) @ (DOWN - 1)),
    ),
    "lokr": (
        {"lokr_w1": normal(2, 3), "lokr_w2": normal(4, 2)},
        np.kron(normal(2, 3), normal(4, 2)),
    ),
}


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_dora_axis_follows_shape_of_lengths(tmp_path, kind, by_column):
    parts, change = LYCORIS[kind]
    m = np.abs(normal(1, 6) if by_column else normal(8, 1)) + 0.5
    tensors = {f"{FLAT}.{part}": value for part, value in parts.items()} | {f"{FLAT}.dora_scale": m}
    result, _ = changes(*kohya(tmp_path, tensors))
    v = W + change
    close(
        result[f"{Q}.weight"],
        m / np.linalg.norm(v, axis=0 if by_column else 1, keepdims=True) * v - W,
    )


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 6, 1, 1)], ids=str)
def test_lycoris_dora_of_convolution_measures_all_kernels(tmp_path, shape):
    w, w1, w2, m = (
        normal(8, 6, 3, 3),
        normal(2, 3),
        normal(4, 2, 3, 3),
        np.abs(normal(*shape)) + 0.5,
    )
    tensors = {f"{FLAT}.lokr_w1": w1, f"{FLAT}.lokr_w2": w2, f"{FLAT}.dora_scale": m}
    folder = base(tmp_path, {f"{Q}.weight": w})
    result, _ = changes(write(tmp_path / "a.safetensors", tensors), folder)
    v = w + np.einsum("ab,cdkl->acbdkl", w1, w2).reshape(8, 6, 3, 3)
    lengths = np.sqrt((v**2).sum(axis=tuple(i for i in range(4) if shape[i] == 1), keepdims=True))
    close(result[f"{Q}.weight"], m / lengths * v - w)


@pytest.mark.parametrize(("shape", "entries"), [((5, 1), 8), ((1, 3), 6), ((1, 2), 6)], ids=str)
def test_mismatched_dora_lengths_are_refused(tmp_path, shape, entries):
    tensors = {
        f"{FLAT}.lora_up.weight": UP,
        f"{FLAT}.lora_down.weight": DOWN,
        f"{FLAT}.dora_scale": normal(*shape),
    }
    with pytest.raises(InputError, match=f"instead of {entries} entries"):
        open_adapter(kohya(tmp_path, tensors)[0])


def test_single_dora_length_is_for_single_row(tmp_path):
    w, up, m = normal(1, 6, seed=3), normal(1, 2), np.array([[0.7]])
    tensors = {
        f"{FLAT}.lora_up.weight": up,
        f"{FLAT}.lora_down.weight": DOWN,
        f"{FLAT}.dora_scale": m,
    }
    result, _ = changes(
        write(tmp_path / "a.safetensors", tensors), base(tmp_path, {f"{Q}.weight": w})
    )
    v = w + up @ DOWN
    close(result[f"{Q}.weight"], 0.7 * v / np.linalg.norm(v) - w)


def test_lycoris_lokr_of_conv1d_multiplies_outputs_and_inputs(tmp_path):
    w1, w2 = normal(2, 3), normal(4, 2, 3)
    path = write(tmp_path / "a.safetensors", {f"{FLAT}.lokr_w1": w1, f"{FLAT}.lokr_w2": w2})
    result, _ = changes(path, base(tmp_path, {f"{Q}.weight": normal(8, 6, 3)}))
    close(result[f"{Q}.weight"], np.einsum("ab,cdk->acbdk", w1, w2).reshape(8, 6, 3))


@pytest.mark.parametrize(
    ("up", "down"), [((8, 2), (2, 0)), ((8, 2), (2,)), ((8,), (2, 6)), ((0, 2), (2, 6))], ids=str
)
def test_non_matrix_factors_are_refused(tmp_path, up, down):
    path, _ = kohya(
        tmp_path, {f"{FLAT}.lora_up.weight": np.ones(up), f"{FLAT}.lora_down.weight": np.ones(down)}
    )
    with raises_naming(InputError, "fit together"):
        open_adapter(path)


def test_alpha_stored_as_integer_is_used(tmp_path):
    path, folder = kohya(tmp_path, {})
    factors = {
        f"{FLAT}.lora_up.weight": torch.tensor(UP),
        f"{FLAT}.lora_down.weight": torch.tensor(DOWN),
    }
    save_file(factors | {f"{FLAT}.alpha": torch.tensor(3)}, path)
    close(changes(path, folder)[0][f"{Q}.weight"], 1.5 * UP @ DOWN)


def test_kohya_parts_of_other_kinds_are_refused_by_name(tmp_path):
    path, _ = kohya(tmp_path, {f"{FLAT}.lora_up.weight": UP, f"{FLAT}.oft_blocks": normal(2, 4, 4)})
    with pytest.raises(InputError, match="oft_blocks"):
        open_adapter(path)


def test_two_text_encoders_on_one_are_refused(tmp_path):
    tensors = {
        f"lora_te{number}_down_blocks_0_attn1_to_q.{part}.weight": value
        for number in (1, 2)
        for part, value in (("lora_up", UP), ("lora_down", DOWN))
    }
    with pytest.raises(InputError, match="are both"):
        changes(*kohya(tmp_path, tensors))


@pytest.mark.parametrize(
    ("metadata", "extra", "scale"),
    [
        (None, {}, 1.0),
        (None, {f"unet.{Q}.alpha": ALPHA}, 1.5),
        ({"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 5})}, {}, 2.5),
        ({"lora_adapter_metadata": json.dumps(RANKS)}, {}, 2.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("names", [("lora_B", "lora_A"), ("lora.up", "lora.down")])
def test_diffusers_lora_is_scaled_by_metadata(tmp_path, metadata, extra, scale, names):
    tensors = {f"unet.{Q}.{names[0]}.weight": UP, f"unet.{Q}.{names[1]}.weight": DOWN}
    path = write(
        tmp_path / "adapter" / "pytorch_lora_weights.safetensors", tensors | extra, metadata
    )
    result, notes = changes(path.parent, base(tmp_path, {f"{Q}.weight": W}))
    close(result[f"{Q}.weight"], scale * UP @ DOWN)
    assert any("s = 1" in note for note in notes) == (scale == 1.0)


def test_diffusers_before_peft(tmp_path):
    stem = "unet.down_blocks.0.attn1.processor.to_q_lora"
    path = write(
        tmp_path / "pytorch_lora_weights.safetensors",
        {f"{stem}.up.weight": UP, f"{stem}.down.weight": DOWN},
    )
    result, _ = changes(path, base(tmp_path, {f"{Q}.weight": W}))
    close(result[f"{Q}.weight"], UP @ DOWN)


@pytest.mark.parametrize("wrapper", ["text_model.", ""])
@pytest.mark.parametrize(
    "name",
    [
        "text_encoder.text_model.0.q_proj.lora_linear_layer.{}.weight",
        "text_encoder.text_model.0.to_q_lora.{}.weight",
        "text_encoder_2.text_model.0.q_proj.lora_linear_layer.{}.weight",
        "lora_te_text_model_0_q_proj.lora_{}.weight",
    ],
)
def test_names_of_clip_are_those_of_any_transformers(tmp_path, name, wrapper):
    tensors = {name.format("up"): UP, name.format("down"): DOWN}
    path = write(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    result, _ = changes(path, base(tmp_path, {f"{wrapper}0.q_proj.weight": W}))
    close(result[f"{wrapper}0.q_proj.weight"], UP @ DOWN)


def mlx(tmp_path, tensors, **config):
    write(tmp_path / "adapter" / "adapters.safetensors", tensors)
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 10.0}} | config
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "adapter"


def test_mlx_factors_are_transposed_and_unscaled_by_rank(tmp_path):
    path = mlx(tmp_path, {"layers.0.q_proj.lora_a": DOWN.T, "layers.0.q_proj.lora_b": UP.T})
    result, _ = changes(path, base(tmp_path, {"model.layers.0.q_proj.weight": W}))
    close(result["model.layers.0.q_proj.weight"], 10 * UP @ DOWN)
    with pytest.raises(InputError, match="no scale"):
        open_adapter(
            mlx(tmp_path, {"q.lora_a": DOWN.T, "q.lora_b": UP.T}, lora_parameters={"rank": 2})
        )
    with pytest.raises(InputError, match="says 3"):
        open_adapter(
            mlx(
                tmp_path,
                {"q.lora_a": DOWN.T, "q.lora_b": UP.T},
                lora_parameters={"rank": 3, "scale": 1},
            )
        )


@pytest.mark.parametrize("rows", [8, 6])  # of a square weight, too, its rows
def test_mlx_dora_equals_definition(tmp_path, rows):
    w, up, m = W[:rows], UP[:rows], np.abs(normal(rows)) + 0.5
    path = mlx(tmp_path, {"q.lora_a": DOWN.T, "q.lora_b": up.T, "q.m": m}, fine_tune_type="dora")
    v = w + 10 * up @ DOWN
    result, _ = changes(path, base(tmp_path, {"q.weight": w}))
    close(result["q.weight"], (m / np.linalg.norm(v, axis=1))[:, None] * v - w)


def test_mlx_embeddings_are_adapted_row_by_row(tmp_path):
    table, a, b, m = normal(9, 6), normal(9, 2), normal(2, 6), np.abs(normal(9)) + 0.5
    folder, factors = (
        base(tmp_path, {"model.embed_tokens.weight": table}),
        {"lora_a": a, "lora_b": b},
    )
    tensors = {f"embed_tokens.{part}": value for part, value in factors.items()}
    result, _ = changes(mlx(tmp_path, tensors), folder)
    close(result["model.embed_tokens.weight"], 10 * a @ b)
    v = table + 10 * a @ b
    result, _ = changes(
        mlx(tmp_path, tensors | {"embed_tokens.m": m}, fine_tune_type="dora"), folder
    )
    close(result["model.embed_tokens.weight"], (m / np.linalg.norm(v, axis=1))[:, None] * v - table)
