"""Names in memory against names on disk."""

import numpy as np
import pytest

from lora_diag.adapters import match_names
from lora_diag.storage import open_checkpoint
from tests.adapters.making import base, normal


def checkpoint(tmp_path, shapes: dict[str, tuple[int, ...]]):
    return open_checkpoint(base(tmp_path, {name: normal(*shape) for name, shape in shapes.items()}))


@pytest.mark.parametrize(
    ("wanted", "on_disk"),
    [
        ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
        (
            "model.language_model.layers.0.attn.q_proj.weight",
            "language_model.model.layers.0.attn.q_proj.weight",
        ),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.vision_tower.encoder.fc.weight", "vision_tower.vision_model.encoder.fc.weight"),
        ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("model.layers.0.mlp.router.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("model.layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.in_proj.weight"),
        ("lm_head.weight", "embed_out.weight"),
        (
            "vit.layers.0.attention.q_proj.weight",
            "vit.encoder.layer.0.attention.attention.query.weight",
        ),
        ("vit.layers.0.mlp.fc2.weight", "vit.encoder.layer.0.output.dense.weight"),
        ("swin.layers.0.attention.k_proj.weight", "swin.layers.0.attention.self.key.weight"),
        ("swin.layers.0.mlp.fc1.weight", "swin.layers.0.intermediate.dense.weight"),
        (
            "dinov2.encoder.layer.0.attention.o_proj.weight",
            "dinov2.encoder.layer.0.attention.output.dense.weight",
        ),
        ("down_blocks_0_attn1_to_out_0.weight", "down_blocks.0.attn1.to_out.0.weight"),
        ("unet.down_blocks.0.attn1.to_q.weight", "down_blocks.0.attn1.to_q.weight"),
    ],
)
def test_name_is_matched_with_name_on_disk(tmp_path, wanted, on_disk):
    decoys = {"other.weight": (4, 6), f"{on_disk[:-7]}x.weight": (4, 6)}
    result, missing = match_names(
        {wanted: (4, 6)}, checkpoint(tmp_path, {on_disk: (4, 6)} | decoys)
    )
    assert not missing
    assert [place.name for place in result[wanted]] == [on_disk]
    assert result[wanted][0].layer == on_disk


@pytest.mark.parametrize(
    ("stored", "match"),
    [
        ({"model.fc.weight": (5, 6), "transformer.fc.weight": (5, 6)}, None),
        ({"model.fc.weight": (4, 6), "transformer.fc.weight": (5, 6)}, "transformer.fc.weight"),
        (
            {"fc.weight": (4, 6), "model.fc.weight": (5, 6)},
            None,
        ),  # the exact name in another shape is final
    ],
)
def test_name_with_two_candidates_matches_by_shape(tmp_path, stored, match):
    result, missing = match_names({"fc.weight": (5, 6)}, checkpoint(tmp_path, stored))
    assert [location.name for location in result.get("fc.weight", ())] == ([match] if match else [])
    assert set(missing) == (set() if match else {"fc.weight"})


def test_transposed_match_only_where_allowed(tmp_path):
    base = checkpoint(tmp_path, {"fc.weight": (6, 4)})
    assert match_names({"fc.weight": (4, 6)}, base)[1]
    assert not match_names({"fc.weight": (4, 6)}, base, transposed=True)[1]


@pytest.mark.parametrize(
    ("gate", "up", "down"), [("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")]
)
def test_fused_experts_are_found_in_per_expert_storage(tmp_path, gate, up, down):
    prefix = "model.layers.0.block_sparse_moe.experts"
    shapes = {f"{prefix}.{e}.{name}.weight": (5, 8) for e in range(2) for name in (gate, up)}
    base = checkpoint(tmp_path, shapes | {f"{prefix}.{e}.{down}.weight": (8, 5) for e in range(2)})
    wanted = "model.layers.0.mlp.experts.gate_up_proj"
    result, missing = match_names(
        {wanted: (2, 10, 8), wanted.replace("gate_up", "down"): (2, 8, 5)}, base
    )
    assert not missing
    assert [(place.name, place.index, place.rows) for place in result[wanted]] == [
        (f"{prefix}.0.{gate}.weight", 0, (0, 5)),
        (f"{prefix}.0.{up}.weight", 0, (5, 10)),
        (f"{prefix}.1.{gate}.weight", 1, (0, 5)),
        (f"{prefix}.1.{up}.weight", 1, (5, 10)),
    ]
    assert match_names({wanted: (3, 10, 8)}, base)[1]
    assert match_names({wanted: (2, 12, 8)}, base)[1]


def test_tied_head_is_reported_as_embedding(tmp_path):
    base = checkpoint(tmp_path, {"model.embed_tokens.weight": (9, 4), "model.norm.weight": (4,)})
    (place,) = match_names({"lm_head.weight": (9, 4)}, base)[0]["lm_head.weight"]
    assert (place.name, place.layer) == ("model.embed_tokens.weight", "lm_head.weight")


def test_stack_s_matrices_are_named_by_their_index(tmp_path):
    base = checkpoint(tmp_path, {"model.layers.0.mlp.experts.down_proj": (2, 4, 6)})
    places = match_names({"layers.0.mlp.experts.down_proj": (2, 4, 6)}, base)[0][
        "layers.0.mlp.experts.down_proj"
    ]
    assert [(place.layer, place.offset) for place in places] == [
        ("model.layers.0.mlp.experts.down_proj[0]", 0),
        ("model.layers.0.mlp.experts.down_proj[1]", 24),
    ]
    assert np.prod(places[0].shape) == 24
