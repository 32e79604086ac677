"""PEFT LoRA against float64 formulas."""

import json

import numpy as np
import pytest

from lora_diag.adapters import open_adapter
from lora_diag.errors import InputError, NothingComparedError
from lora_diag.storage import open_checkpoint
from tests.adapters.making import adapter, base, changes, close, normal
from tests.messages import mentions, raises_naming

A, B = normal(2, 12), normal(8, 2, seed=1)
W = normal(8, 12, seed=2)
TOKENS = "token_adapter.trainable_tokens"
PAIR = {"fc.lora_A.weight": A, "fc.lora_B.weight": B}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3 / 2),
        ({"use_rslora": True}, 3 / np.sqrt(2)),
        ({"lora_alpha": -0.5}, -0.25),
        ({"alpha_pattern": {"fc": 7}}, 7 / 2),
        (
            {"alpha_pattern": {"c": 7}},
            3 / 2,
        ),  # a key matches from a dot on, not from the middle of a word
        ({"r": 5, "rank_pattern": {"f.": 2}}, 3 / 2),
        ({"init_lora_weights": "eva", "lora_dropout": 0.3, "layers_to_transform": [0]}, 3 / 2),
    ],
)
def test_scaling_follows_config(tmp_path, config, scale):
    result, _ = changes(adapter(tmp_path, PAIR, **config), base(tmp_path, {"fc.weight": W}))
    close(result["fc.weight"], scale * B @ A)


def test_weight_stored_in_by_out_is_transposed_by_shape_not_flag(tmp_path):
    result, _ = changes(
        adapter(tmp_path, PAIR, fan_in_fan_out=False), base(tmp_path, {"fc.weight": W.T})
    )
    close(result["fc.weight"], (1.5 * B @ A).T)


@pytest.mark.parametrize(
    ("others", "transposed"),
    [
        ({}, None),  # nothing tells: the flag
        ({"x.mlp.c_proj.weight": (16, 8), "x.mlp.c_proj.bias": (8,)}, True),
        ({"x.mlp.c_proj.weight": (8, 16), "x.mlp.c_proj.bias": (8,)}, False),
        ({"h.0.other.weight": (8, 24), "h.0.other.bias": (24,)}, True),
        # a namesake tells more than a neighbour
        (
            {
                "h.0.b.weight": (8, 24),
                "h.0.b.bias": (24,),
                "x.c_proj.weight": (8, 16),
                "x.c_proj.bias": (8,),
            },
            False,
        ),
    ],
)
@pytest.mark.parametrize("flag", [True, False])
def test_square_weight_follows_namesakes_neighbours_then_flag(tmp_path, others, transposed, flag):
    a, b = normal(2, 8), normal(8, 2, seed=1)
    folder = base(
        tmp_path,
        {"h.0.c_proj.weight": normal(8, 8)}
        | {name: normal(*size) for name, size in others.items()},
    )
    path = adapter(
        tmp_path,
        {"h.0.c_proj.lora_A.weight": a, "h.0.c_proj.lora_B.weight": b},
        fan_in_fan_out=flag,
    )
    result, _ = changes(path, folder)
    expected = 1.5 * b @ a
    close(
        result["h.0.c_proj.weight"],
        expected.T if (flag if transposed is None else transposed) else expected,
    )


def test_pairing_keeps_own_names_of_whole_weights(tmp_path):
    expert = "layers.0.mlp.experts.1.down_proj"
    factors = {f"{expert}.lora_A": normal(2, 6), f"{expert}.lora_B": normal(4, 2)}
    on = base(tmp_path, {"model.fc.weight": W, "layers.0.mlp.experts.down_proj": normal(2, 4, 6)})
    pairing, _ = open_adapter(adapter(tmp_path, PAIR | factors)).pair(open_checkpoint(on))
    assert {delta.layer for delta in pairing.deltas} == {
        "model.fc.weight",
        "layers.0.mlp.experts.down_proj[1]",
    }
    assert pairing.own_names == {"model.fc.weight": "fc.weight"}


def test_grown_vocabulary_lists_new_and_compares_common_rows(tmp_path):
    a, b = normal(2, 20), normal(6, 2)
    path = adapter(
        tmp_path, {"embed_tokens.lora_embedding_A": a, "embed_tokens.lora_embedding_B": b}
    )
    pairing, _ = open_adapter(path).pair(
        open_checkpoint(base(tmp_path, {"embed_tokens.weight": normal(17, 6)}))
    )
    assert [delta.shape for delta in pairing.deltas] == [(17, 6)]
    assert [(item.reason, item.shape) for item in pairing.unpaired] == [("added_rows", (3, 6))]
    saved = adapter(tmp_path, PAIR | {"embed_tokens.weight": normal(20, 6)})
    on = base(tmp_path, {"embed_tokens.weight": normal(17, 6), "fc.weight": W})
    pairing, _ = open_adapter(saved).pair(open_checkpoint(on))
    assert [(item.layer, item.reason, item.shape) for item in pairing.unpaired] == [
        ("embed_tokens.weight", "added_rows", (3, 6))
    ]


def test_copied_base_embedding_is_not_a_change(tmp_path):
    w, a, b = normal(20, 6), normal(2, 20), normal(6, 2)
    factors = {"embed_tokens.lora_embedding_A": a, "embed_tokens.lora_embedding_B": b}
    folder = base(tmp_path, {"embed_tokens.weight": w})
    result, _ = changes(adapter(tmp_path, factors | {"embed_tokens.base_layer.weight": w}), folder)
    close(result["embed_tokens.weight"], 1.5 * (b @ a).T)
    other = normal(20, 6, seed=9)
    result, _ = changes(
        adapter(tmp_path, factors | {"embed_tokens.base_layer.weight": other}), folder
    )
    close(result["embed_tokens.weight"], 1.5 * (b @ a).T + other - w)


def test_adapted_head_copy_is_not_used_as_model(tmp_path):
    w = normal(8, 12)
    tensors = {
        "lm_head.lora_A.weight": A,
        "lm_head.lora_B.weight": B,
        "lm_head.base_layer.weight": w,
    }
    result, _ = changes(adapter(tmp_path, tensors), base(tmp_path, {"lm_head.weight": w}))
    close(result["lm_head.weight"], 1.5 * B @ A)


def test_dora_of_small_rotation_keeps_precision(tmp_path):
    """ΔW is 1e-5 of W here: lengths in float32 would leave three digits of it."""
    w = normal(8, 12, seed=3)
    m = (np.linalg.norm(w, axis=1) * (1 + 1e-5 * normal(8))).astype(np.float32).astype(np.float64)
    tensors = PAIR | {"fc.lora_B.weight": 0 * B, "fc.lora_magnitude_vector": m}
    result, _ = changes(adapter(tmp_path, tensors, use_dora=True), base(tmp_path, {"fc.weight": w}))
    close(result["fc.weight"], (m / np.linalg.norm(w, axis=1) - 1)[:, None] * w)


def test_without_base_new_values_are_listed_and_rest_measured(tmp_path):
    pairing, _ = open_adapter(adapter(tmp_path, PAIR | {"norm.weight": normal(8)})).pair(None)
    assert [delta.layer for delta in pairing.deltas] == ["fc.weight"]
    assert [(item.layer, item.reason) for item in pairing.unpaired] == [
        ("norm.weight", "needs_base")
    ]


def test_token_right_behind_table_is_refused(tmp_path):
    tensors = {f"embed_tokens.{TOKENS}_delta": normal(1, 6)}
    path = adapter(tmp_path, tensors, trainable_token_indices={"embed_tokens": [20]})
    with raises_naming(InputError, 20, "20 rows"):
        changes(path, base(tmp_path, {"embed_tokens.weight": normal(20, 6)}))


def test_zero_factors_are_noted(tmp_path):
    _, notes = changes(
        adapter(tmp_path, PAIR | {"fc.lora_B.weight": B * 0}), base(tmp_path, {"fc.weight": W})
    )
    assert any(mentions(note, "1 of 1 updates", "zero") for note in notes)


def test_bin_files_and_adapter_name_in_keys_are_read(tmp_path):
    import torch

    path = adapter(tmp_path, {"fc.lora_A.default.weight": A, "fc.lora_B.default.weight": B})
    close(changes(path, None)[0]["fc.weight"], 1.5 * B @ A)
    (path / "adapter_model.safetensors").unlink()
    state = {
        f"base_model.model.fc.lora_{part}.weight": torch.tensor(value)
        for part, value in (("A", A), ("B", B))
    }
    torch.save(state, path / "adapter_model.bin")
    close(changes(path, None)[0]["fc.weight"], 1.5 * B @ A)


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({"fc.lora_A.weight": A}, {}, "fc has no lora_B"),
        (PAIR, {"r": 4}, "has rank 2, but adapter_config.json says 4"),
        (PAIR | {"fc.lora_B.weight": normal(8, 3)}, {}, "A has rank 2, but B has rank 3"),
        (PAIR, {"r": 0}, "r must be a whole number from 1 up"),
        (PAIR, {"lora_alpha": None}, "lora_alpha must be a finite number"),
        (PAIR, {"lora_alpha": "16"}, "lora_alpha must be a finite number"),
        (
            PAIR,
            {"rank_pattern": {"(": 2}},
            r"rank_pattern: the key '\(' is not a valid regular expression",
        ),
        (PAIR, {"rank_pattern": {"fc": 0}}, "must be a whole number from 1 up, not 0"),
        (PAIR, {"rank_pattern": {"fc": 2.5}}, "must be a whole number from 1 up, not 2.5"),
        (
            {f"wte.{TOKENS}_delta": A},
            {"trainable_token_indices": {"wte": [3, 3]}},
            "has 1 token indices",
        ),
        (PAIR, {"rank_pattern": ["fc"]}, "rank_pattern must map names to values"),
        (PAIR, {"init_lora_weights": "corda"}, "CorDA"),
        (PAIR, {"init_lora_weights": "pissa_niter_4"}, "randomised SVD"),
        (PAIR, {"use_qalora": True}, "QA-LoRA"),
        (PAIR, {"peft_type": "BOFT"}, "BOFT is not supported"),
        (PAIR, {"peft_type": "PREFIX_TUNING"}, "changes no weight"),
        (PAIR, {"peft_type": "XLORA"}, "depends on the input"),
        (PAIR, {"peft_type": "NEWTHING"}, "NEWTHING is not supported"),
        (PAIR, {"peft_type": None}, "no peft_type"),
        ({"fc.lora_A.weight": np.zeros(0), "fc.lora_B.weight": B}, {}, "ZeRO-3"),
        ({"fc.lora_A.weight": np.zeros((0, 6)), "fc.lora_B.weight": B}, {}, "ZeRO-3"),
        (PAIR | {"fc.lora_A.other.weight": A}, {}, "several adapters"),
        (PAIR, {"layer_replication": [[3, 1]]}, "invalid range"),
        (PAIR, {"layer_replication": [[0, 100_000]] * 2}, "invalid range"),
        (PAIR, {"use_bdlora": {"nblocks": 3, "target_modules_bd_b": ["fc"]}}, "do not divide"),
        (PAIR | {"fc.lora_magnitude_vector": normal(9)}, {}, "instead of 8 entries"),
    ],
)
def test_mismatched_factors_are_refused(tmp_path, tensors, config, words):
    with pytest.raises(InputError, match=words):
        open_adapter(adapter(tmp_path, tensors, **config))


def test_adapter_that_needs_base_is_reported(tmp_path):
    path = adapter(tmp_path, PAIR | {"fc.lora_magnitude_vector": normal(8)}, use_dora=True)
    with raises_naming(InputError, "DoRA", "BASE"):
        changes(path, None)


def test_empty_selection_exits_4(tmp_path):
    with pytest.raises(NothingComparedError):
        changes(adapter(tmp_path, PAIR), None, layers="nothing")


def test_missing_config_gives_no_scaling(tmp_path):
    path = adapter(tmp_path, PAIR)
    (path / "adapter_config.json").unlink()
    with raises_naming(InputError, "scaling", "unknown"):
        open_adapter(path)


def test_disagreeing_patterns_and_unused_keys_are_noted(tmp_path):
    path = adapter(tmp_path, PAIR, alpha_pattern={"fc": 4, ".*c": 8, "other": 1})
    result, notes = changes(path, None)
    close(result["fc.weight"], 2 * B @ A)
    assert any("different values" in note for note in notes)
    assert any(mentions(note, "other", "no module") for note in notes)


def test_file_itself_may_be_named(tmp_path):
    path = adapter(tmp_path, PAIR)
    close(changes(path / "adapter_model.safetensors", None)[0]["fc.weight"], 1.5 * B @ A)


def test_config_of_wrong_type_gives_one_message(tmp_path):
    path = adapter(tmp_path, PAIR)
    for content in ("[]", "{", json.dumps({"peft_type": 3})):
        (path / "adapter_config.json").write_text(content)
        with pytest.raises(InputError, match=r"adapter_config\.json"):
            open_adapter(path)
