"""Heads and rows against slices of NumPy arrays, and what figures and summaries make of them."""

import numpy as np
import pytest
import torch

import lora_diag
from lora_diag import plots
from lora_diag.diagnostics.geometry.parts import list_heads, split_magnitude
from tests.conftest import save_model

LLAMA = {
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "model_type": "llama",
}
SHAPES = {"q_proj": (24, 24), "k_proj": (8, 24), "v_proj": (8, 24), "o_proj": (24, 24)}


def names(depth):
    return {key: f"model.layers.{depth}.self_attn.{key}.weight" for key in SHAPES}


@pytest.fixture
def compared(tmp_path):
    """A model of two blocks in which one value head and one output head changed more
    than the rest.
    """
    rng = np.random.default_rng(5)
    base = {
        name: rng.standard_normal(SHAPES[key])
        for depth in (0, 1)
        for key, name in names(depth).items()
    }
    tuned = {name: w + 0.01 * rng.standard_normal(w.shape) for name, w in base.items()}
    tuned[names(1)["v_proj"]][4:8] += 0.2 * rng.standard_normal((4, 24))
    tuned[names(0)["o_proj"]][:, 8:12] += 0.1 * rng.standard_normal((24, 4))
    paths = [
        save_model(tmp_path / folder, {name: torch.tensor(w) for name, w in model.items()}, LLAMA)
        for folder, model in (("base", base), ("tuned", tuned))
    ]
    return (
        base,
        tuned,
        lora_diag.geometry(*paths, top=2, draws=1, output=tmp_path / "geometry.jsonl"),
    )


def test_heads_are_slices_and_sum_to_the_matrix(compared):
    base, tuned, results = compared
    for record in results.layers:
        key = record.layer.split(".")[-2]
        w, d = base[record.layer], tuned[record.layer] - base[record.layer]
        count = {"k_proj": 2, "v_proj": 2}.get(key, 6)
        slices = np.split(d, count, axis=1 if key == "o_proj" else 0)
        weights = np.split(w, count, axis=1 if key == "o_proj" else 0)
        assert len(record.heads) == count
        for head, part, weight in zip(record.heads, slices, weights, strict=True):
            s = np.linalg.svd(part, compute_uv=False)
            assert head.fro == pytest.approx(np.linalg.norm(part), rel=1e-12)
            assert head.base_fro == pytest.approx(np.linalg.norm(weight), rel=1e-12)
            assert head.energy["1"] == pytest.approx(s[0] ** 2 / (s**2).sum())
            assert head.rank_90 == 1 + int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9))
        assert sum(head.fro**2 for head in record.heads) == pytest.approx(record.fro**2, rel=1e-14)
        assert sum(head.share for head in record.heads) == pytest.approx(1, abs=1e-14)
        rows = np.linalg.norm(w + d, axis=1) - np.linalg.norm(w, axis=1)
        assert record.magnitude == pytest.approx((rows**2).sum() / (d**2).sum(), rel=1e-9)


def test_planted_head_is_named_as_the_one_that_changed_most(compared):
    *_, results = compared
    heads = {(h.kind, h.index, r.layer[13]): h.relative for r in results.layers for h in r.heads}
    assert max(heads, key=heads.get) == ("value", 1, "1")
    assert max((key for key in heads if key[0] == "output"), key=heads.get) == ("output", 2, "0")
    text = lora_diag.catalog.table(results, 200)
    assert "(value 1 of block 1)" in text


@pytest.mark.parametrize(
    ("layer", "shape", "config", "expected"),
    [
        (
            "h.0.attn.c_attn.weight",
            (8, 24),
            {"n_embd": 8, "n_head": 2, "model_type": "gpt2"},
            (6, 1, 4),
        ),
        (
            "h.0.attn.c_proj.weight",
            (8, 8),
            {"n_embd": 8, "n_head": 2, "model_type": "gpt2"},
            (2, 0, 4),
        ),
        ("layers.0.self_attn.qkv_proj.weight", (40, 24), LLAMA, (10, 0, 4)),
        (
            "layers.0.self_attn.q_proj.weight",
            (48, 24),
            LLAMA,
            None,
        ),  # twice as many rows: a gated query
        ("layers.0.self_attn.q_proj.weight", (24, 24), {}, None),
        ("a.q_proj.weight", (24, 24), {"text_config": LLAMA}, (6, 0, 4)),
        ("layers.0.mlp.down_proj.weight", (24, 24), LLAMA, None),
        ("a.q_proj.weight", (24, 24), {"hidden_size": "24", "num_attention_heads": True}, None),
    ],
)
def test_layout_follows_the_config(layer, shape, config, expected):
    blocks = list_heads(layer, shape, config)
    assert ((blocks and (len(blocks), blocks[0].axis, blocks[0].last)) or None) == expected
    assert not blocks or blocks[-1].last == shape[blocks[0].axis]


def test_scaled_rows_change_lengths_and_turned_rows_do_not():
    w = torch.tensor(np.random.default_rng(2).standard_normal((6, 5)))
    assert split_magnitude(w, 0.3 * w) == pytest.approx(1)
    turn = torch.linalg.qr(
        torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    assert split_magnitude(w, w @ turn - w) == pytest.approx(0, abs=1e-15)


@pytest.mark.slow
def test_figures_show_heads_masks_and_angles(compared):
    *_, results = compared
    for name in ("geometry", "rotation", "heads"):
        assert plots.why_not(name, [results]) is None
        assert len(plots.encode_figure(plots.figure(name, [results]), "svg")) > 1000
    ax = plots.heads(results, name="value")
    (image,) = ax.get_images()
    found = {
        (r.layer[13], h.index): h.relative
        for r in results.layers
        for h in r.heads
        if h.kind == "value"
    }
    assert image.get_array()[1, 1] == pytest.approx(found["1", 1])
