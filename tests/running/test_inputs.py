"""What two paths are compared as, when they do not name everything alike."""

import os
import shutil

import pytest
import torch

import lora_diag
from lora_diag.errors import InputError, NothingComparedError, UsageError
from tests.conftest import ROOT, save_model, weights
from tests.messages import assert_names, raises_naming

EXPERTS, INNER, HIDDEN = 3, 6, 4
SAMPLES = ROOT / "sample_checkpoints"


def mixture(seed: int) -> dict[str, torch.Tensor]:
    """A block of a mixture as the hub stores it: every expert by itself."""
    rng = torch.Generator().manual_seed(seed)
    prefix = "model.layers.0.block_sparse_moe."
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.randn(HIDDEN, HIDDEN, generator=rng)}
    tensors[prefix + "gate.weight"] = torch.randn(EXPERTS, HIDDEN, generator=rng)
    for expert in range(EXPERTS):
        for leaf, shape in (
            ("w1", (INNER, HIDDEN)),
            ("w3", (INNER, HIDDEN)),
            ("w2", (HIDDEN, INNER)),
        ):
            tensors[f"{prefix}experts.{expert}.{leaf}.weight"] = torch.randn(*shape, generator=rng)
    return tensors


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same block as transformers 5 holds it in memory."""
    disk, memory = "model.layers.0.block_sparse_moe.", "model.layers.0.mlp."

    def stack(leaf):
        return torch.stack(
            [tensors[f"{disk}experts.{expert}.{leaf}.weight"] for expert in range(EXPERTS)]
        )

    return {
        "model.layers.0.self_attn.q_proj.weight": tensors["model.layers.0.self_attn.q_proj.weight"],
        memory + "gate.weight": tensors[disk + "gate.weight"],
        memory + "experts.gate_up_proj": torch.cat([stack("w1"), stack("w3")], 1),
        memory + "experts.down_proj": stack("w2"),
    }


def test_fused_experts_match_separate_base_experts(tmp_path):
    base = save_model(tmp_path / "base", mixture(1))
    plain = lora_diag.spectrum(base, save_model(tmp_path / "plain", mixture(2)))
    other = lora_diag.spectrum(base, save_model(tmp_path / "fused", fused(mixture(2))))
    assert other.layers == plain.layers
    assert other.left_out == ()
    assert_names(other.run.inputs[1].notes[0], "3 tensors", "other names")


def test_mismatched_shape_is_unpaired(tmp_path):
    tensors = fused(mixture(2))
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.randn(EXPERTS, HIDDEN, INNER + 1)
    results = lora_diag.spectrum(
        save_model(tmp_path / "base", mixture(1)), save_model(tmp_path / "fused", tensors)
    )
    reasons = {item.layer: item.reason for item in results.left_out}
    assert reasons.pop("model.layers.0.mlp.experts.down_proj") == "only_in_tuned"
    assert set(reasons.values()) == {"only_in_base"}
    assert len(reasons) == EXPERTS


@pytest.mark.slow
@pytest.mark.parametrize(
    "prefix", ["model.", "base_model.model.", "bert.", "transformer.", "mpnet.", "swin."]
)
@pytest.mark.parametrize("on_base", [False, True])
def test_prefix_on_one_side_is_ignored(tmp_path, prefix, on_base):
    plain, tuned = weights(1), weights(2)
    sides = [plain, tuned] if on_base else [tuned, plain]
    sides[0] = {prefix + name: value for name, value in sides[0].items()}
    before, after = sides if on_base else reversed(sides)
    expected = lora_diag.spectrum(
        save_model(tmp_path / "a", plain), save_model(tmp_path / "b", tuned)
    )
    result = lora_diag.spectrum(
        save_model(tmp_path / "c", before), save_model(tmp_path / "d", after)
    )
    assert [layer.s for layer in result.layers] == [layer.s for layer in expected.layers]
    assert [layer.layer.removeprefix(prefix if on_base else "") for layer in result.layers] == [
        layer.layer for layer in expected.layers
    ]
    assert {item.reason for item in result.left_out} == {"vector"}
    assert_names(result.run.inputs[1].notes[0], "12 tensors", "BASE")


def test_names_without_anything_in_common_are_not_paired(tmp_path):
    sides = {
        "bert": weights(1),
        "roberta": {f"roberta.{name}": value for name, value in weights(2).items()},
    }
    for kind, tensors in sides.items():
        (save_model(tmp_path / kind, tensors) / "config.json").write_text(
            f'{{"model_type": "{kind}"}}'
        )
    with raises_naming(NothingComparedError, "no weight name in common"):
        lora_diag.spectrum(tmp_path / "bert", tmp_path / "roberta")
    with pytest.raises(NothingComparedError, match=r"a\.weight.*b\.weight"):
        lora_diag.spectrum(
            save_model(tmp_path / "a", {"a.weight": torch.ones(2, 2)}),
            save_model(tmp_path / "b", {"b.weight": torch.ones(2, 2)}),
        )
    blocks = {name.replace("layers", "h"): value for name, value in weights(2).items()}
    with pytest.raises(
        NothingComparedError
    ):  # only the two tables of twelve tensors would find their other name
        lora_diag.spectrum(
            save_model(tmp_path / "layers", weights(1)),
            save_model(
                tmp_path / "h", {f"transformer.{name}": value for name, value in blocks.items()}
            ),
        )


def towers(seed: int, *names: str) -> dict[str, torch.Tensor]:
    """A model with towers that are alike inside."""
    rng = torch.Generator().manual_seed(seed)
    return {
        f"{name}encoder.layers.{i}.fc.weight": torch.randn(4, 6, generator=rng)
        for name in names
        for i in range(3)
    }


@pytest.mark.parametrize(
    ("of_base", "of_tuned"),
    [
        (["text_model.", "vision_model."], [""]),  # of which tower is this?
        ([""], ["text_model.", "vision_model."]),
        (["text_model."], ["vision_model."]),
        (["bert."], ["roberta."]),
    ],
)
def test_towers_and_models_are_not_confused(tmp_path, of_base, of_tuned):
    base, tuned = (
        save_model(tmp_path / "base", towers(1, *of_base)),
        save_model(tmp_path / "t", towers(2, *of_tuned)),
    )
    with raises_naming(NothingComparedError, "no weight name in common"):
        lora_diag.spectrum(base, tuned)


def test_invalid_model_type_is_refused(tmp_path):
    base, tuned = (
        save_model(tmp_path / "base", towers(1, "")),
        save_model(tmp_path / "tuned", towers(2, "bert.")),
    )
    (base / "config.json").write_text('{"model_type": ["bert"]}')
    assert len(lora_diag.spectrum(base, tuned)) == 3


def test_two_towers_behind_wrapper_are_distinguished(tmp_path):
    names = ["text_model.", "vision_model."]
    base, tuned = (
        save_model(tmp_path / "base", towers(1, *names)),
        save_model(tmp_path / "tuned", towers(2, *names)),
    )
    wrapped = save_model(
        tmp_path / "wrapped", {f"model.{name}": value for name, value in towers(2, *names).items()}
    )
    assert lora_diag.spectrum(base, wrapped).layers == lora_diag.spectrum(base, tuned).layers


@pytest.mark.parametrize("layers", ["embed_tokens", r"layers\.0\.", "lm_head"])
def test_selection_does_not_decide_whether_models_match(tmp_path, layers):
    base = save_model(tmp_path / "base", weights(1))
    wrapped = save_model(
        tmp_path / "wrapped", {f"bert.{name}": value for name, value in weights(2).items()}
    )
    plain = save_model(tmp_path / "plain", weights(2))
    assert (
        lora_diag.spectrum(base, wrapped, layers=layers).layers
        == lora_diag.spectrum(base, plain, layers=layers).layers
    )
    blocks = {
        f"transformer.{name.replace('layers', 'h')}": value for name, value in weights(2).items()
    }
    with pytest.raises(NothingComparedError):
        lora_diag.spectrum(base, save_model(tmp_path / "h", blocks), layers=layers)


def test_single_input_must_be_adapter_and_pair_begin_with_base():
    with raises_naming(UsageError, "BASE", "TUNED"):
        lora_diag.spectrum(SAMPLES / "base")
    with raises_naming(UsageError, "BASE", "first"):
        lora_diag.spectrum(SAMPLES / "lora_r4", SAMPLES / "base")


def test_stack_and_tensor_called_like_one_of_its_matrices(tmp_path):
    tensors = {"w": torch.ones(2, 3, 4), "w[0]": torch.ones(3, 4)}
    model = save_model(tmp_path / "m", tensors)
    with raises_naming(InputError, "w[0]"):
        lora_diag.spectrum(model, model)
    assert len(lora_diag.spectrum(model, model, exclude=r"\[")) == 2


def test_non_utf8_names_are_refused(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    base, tuned = (
        save_model(folder / "base", weights(1)),
        save_model(folder / "tuned", {**weights(2), "more": torch.ones(2)}),
    )
    results = lora_diag.spectrum(base, tuned, output=folder / "r.jsonl")
    assert results.run.inputs[0].path.endswith(r"caf\xe9/base")
    assert lora_diag.read_results(folder / "r.jsonl") == results
    assert r"caf\xe9" in lora_diag.inspect(base).model_dump_json().replace(r"\\", "\\")


@pytest.mark.parametrize("seed", [-1, 2**63, 99999999999999999999999])
def test_invalid_seeds_are_refused(tmp_path, seed):
    model = save_model(tmp_path / "m", weights(1))
    with pytest.raises(UsageError, match="seed"):
        lora_diag.spectrum(model, model, top=4, svd="krylov", seed=seed)
    assert len(lora_diag.spectrum(model, model, top=4, svd="krylov", seed=2**63 - 1))


def test_resume_detects_other_adapter_config(tmp_path):
    adapter = shutil.copytree(SAMPLES / "lora_r4", tmp_path / "adapter")
    before = lora_diag.spectrum(adapter).run.inputs[0].fingerprint
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace("{", '{"use_rslora_note": 1, ', 1))
    assert lora_diag.spectrum(adapter).run.inputs[0].fingerprint != before
