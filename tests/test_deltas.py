"""Which tensors meet which, and what is said of the rest."""

import json

import pytest
import torch

from lora_diag.deltas import natural_order, pair, refuse_empty
from lora_diag.errors import NothingComparedError, UsageError
from lora_diag.storage import open_checkpoint
from tests.conftest import save_model


def pairing(tmp_path, before, after, **options):
    sides = (
        open_checkpoint(save_model(tmp_path / "base", before)),
        open_checkpoint(save_model(tmp_path / "tuned", after)),
    )
    result = pair(*sides, **options)
    refuse_empty(result, *sides)
    return result


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def test_every_tensor_is_compared_or_listed_with_its_reason(tmp_path):
    before = {
        "a.weight": ones(3, 4),
        "gone.weight": ones(2, 2),
        "norm.weight": ones(4),
        "ids": torch.arange(3),
        "b.weight": ones(3, 4),
        "model.embed_tokens.weight": ones(10, 4),
        "lm_head.weight": ones(12, 4),
        "nothing.weight": ones(0, 4),
        "scalar": torch.tensor(1.0),
    }
    after = before | {
        "new.weight": ones(2, 2),
        "b.weight": ones(3, 5),
        "model.embed_tokens.weight": ones(13, 4),
        "lm_head.weight": ones(10, 4),
        "scalar": torch.tensor(2.0),
    }
    del after["gone.weight"]
    result = pairing(tmp_path, before, after)
    compared = {delta.layer: (delta.shape, delta.is_matrix) for delta in result.deltas}
    assert compared == {
        "a.weight": ((3, 4), True),
        "norm.weight": ((1, 4), False),
        "scalar": ((1, 1), False),
        "model.embed_tokens.weight": ((10, 4), True),
        "lm_head.weight": ((10, 4), True),
    }
    reasons = {item.layer: (item.reason, item.shape) for item in result.unpaired}
    assert reasons == {
        "gone.weight": ("only_in_base", (2, 2)),
        "new.weight": ("only_in_tuned", (2, 2)),
        "ids": ("not_float", (3,)),
        "b.weight": ("shape_differs", (3, 4)),
        "model.embed_tokens.weight": ("added_rows", (3, 4)),
        "lm_head.weight": ("removed_rows", (2, 4)),
        "nothing.weight": ("empty", (0, 4)),
    }
    assert "[3, 4]" in next(item.detail for item in result.unpaired if item.layer == "b.weight")


def test_only_vocabulary_tables_may_have_another_number_of_rows(tmp_path):
    result = pairing(
        tmp_path,
        {"a": ones(2, 2), "up_proj.weight": ones(4, 2)},
        {"a": ones(2, 2), "up_proj.weight": ones(5, 2)},
    )
    assert [item.reason for item in result.unpaired] == ["shape_differs"]


def test_expert_stacks_split_and_convolutions_unroll(tmp_path):
    stack = torch.arange(24.0).view(2, 3, 4)
    conv = torch.arange(96.0).view(2, 3, 4, 4)
    tensors = {
        "mlp.experts.down_proj": stack,
        "conv1.weight": conv,
        "mixer.conv1d.weight": ones(5, 1, 4),
    }
    result = pairing(
        tmp_path, {name: torch.zeros_like(value) for name, value in tensors.items()}, tensors
    )
    by_layer = {delta.layer: delta for delta in result.deltas}
    assert {layer: delta.shape for layer, delta in by_layer.items()} == {
        "mlp.experts.down_proj[0]": (3, 4),
        "mlp.experts.down_proj[1]": (3, 4),
        "conv1.weight": (2, 48),
        "mixer.conv1d.weight": (5, 4),
    }
    read = torch.cat([tuned for _, tuned in by_layer["mlp.experts.down_proj[1]"].blocks()])
    assert torch.equal(read, stack[1])
    read = torch.cat([tuned for _, tuned in by_layer["conv1.weight"].blocks()])
    assert torch.equal(read, conv.reshape(2, 48))


def test_added_rows_exist_on_one_side_only(tmp_path):
    before, after = torch.zeros(10, 4), torch.arange(52.0).view(13, 4)
    result = pairing(
        tmp_path, {"wte.weight": before, "a": ones(2, 2)}, {"wte.weight": after, "a": ones(2, 2)}
    )
    rows = result.unpaired[0].rows
    assert torch.equal(rows.read(0, 12).view(3, 4), after[10:])
    assert torch.equal(torch.cat([tuned for _, tuned in result.deltas[1].blocks()]), after[:10])


def test_row_blocks_are_in_order_for_any_size(tmp_path, monkeypatch):
    tensor = torch.arange(70.0).view(10, 7)
    result = pairing(tmp_path, {"w": tensor}, {"w": tensor + 1})
    for entries in (1, 7, 15, 1000):
        monkeypatch.setattr("lora_diag.deltas.BLOCK_ENTRIES", entries)
        blocks = list(result.deltas[0].blocks())
        assert torch.equal(torch.cat([base for base, _ in blocks]), tensor)
        assert torch.equal(torch.cat([tuned for _, tuned in blocks]), tensor + 1)


def test_layer_selection(tmp_path):
    names = ["h.0.q_proj.weight", "h.1.q_proj.weight", "h.1.up.weight"]
    tensors = {name: ones(2, 2) for name in names}
    result = pairing(tmp_path, tensors, tensors, layers="q_proj|up", exclude=r"h\.0")
    assert [delta.layer for delta in result.deltas] == names[1:]
    assert [(item.layer, item.reason) for item in result.unpaired] == [(names[0], "not_selected")]
    with pytest.raises(UsageError, match="--layers"):
        pairing(tmp_path, tensors, tensors, layers="(")
    with pytest.raises(NothingComparedError, match="--exclude"):
        pairing(tmp_path, tensors, tensors, layers="nope")


def test_natural_order_counts_layers():
    names = [
        "model.layers.10.a",
        "model.layers.9.a",
        "lm_head",
        "model.layers.9.a[10]",
        "model.layers.9.a[9]",
    ]
    assert sorted(names, key=natural_order) == [names[2], names[1], names[4], names[3], names[0]]


TABLE = "model.embed_tokens.weight"
TIED = {"tie_word_embeddings": True}


def tied_pair(tmp_path, before, after, config_before=None, config_after=None):
    for side, tensors, config in (("base", before, config_before), ("tuned", after, config_after)):
        folder = save_model(tmp_path / side, tensors)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
    return pair(open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "tuned"))


@pytest.mark.parametrize(
    "config",
    [
        TIED,
        {"model_type": "gemma"},
        {"text_config": TIED},
        {"text_config": {}, "tie_word_embeddings": True},
    ],
)
@pytest.mark.parametrize("rows", [10, 12])
def test_tied_head_is_compared_with_embedding(tmp_path, config, rows):
    table, head = torch.arange(40.0).view(10, 4), torch.arange(4.0 * rows).view(rows, 4) ** 2
    result = tied_pair(tmp_path, {TABLE: table}, {TABLE: table + 1, "lm_head.weight": head}, config)
    deltas = {delta.layer: delta for delta in result.deltas}
    ((before, after),) = deltas["lm_head.weight"].blocks()
    assert torch.equal(before, table)
    assert torch.equal(after, head[:10])
    assert [(item.layer, item.reason) for item in result.unpaired] == [
        ("lm_head.weight", "added_rows")
    ] * (rows > 10)


def test_head_tied_by_tuning_equals_embedding_of_tuned(tmp_path):
    table, head = torch.ones(10, 4), torch.zeros(10, 4)
    result = tied_pair(tmp_path, {TABLE: table, "lm_head.weight": head}, {TABLE: table}, None, TIED)
    deltas = {delta.layer: delta for delta in result.deltas}
    assert torch.equal(next(deltas["lm_head.weight"].blocks())[1], table)


@pytest.mark.parametrize(
    "config",
    [None, {}, {"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}],
)
def test_untied_missing_head_is_only_on_one_side(tmp_path, config):
    result = tied_pair(
        tmp_path, {TABLE: ones(4, 4)}, {TABLE: ones(4, 4), "lm_head.weight": ones(4, 4)}, config
    )
    assert [item.reason for item in result.unpaired] == ["only_in_tuned"]


@pytest.mark.parametrize("other", ["decoder.embed_tokens.weight", "text.lm_head.weight"])
def test_tied_head_needs_one_embedding_and_other_weights_none(tmp_path, other):
    two = {TABLE: ones(4, 4), other: ones(4, 4)}
    result = tied_pair(
        tmp_path, two, {**two, "lm_head.weight": ones(4, 4), "a.weight": ones(4, 4)}, TIED
    )
    assert {item.layer for item in result.unpaired} == {"lm_head.weight", "a.weight"}
