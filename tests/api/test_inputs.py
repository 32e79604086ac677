"""What two paths are compared as, when they do not name everything alike."""

import pytest
import torch

import lora_diag
from lora_diag.errors import NothingComparedError, UsageError
from tests.conftest import save_model, weights

EXPERTS, INNER, HIDDEN = 3, 6, 4


def mixture(seed: int) -> dict[str, torch.Tensor]:
    """A block of a mixture as the hub stores it: every expert by itself."""
    rng = torch.Generator().manual_seed(seed)
    prefix = "model.layers.0.block_sparse_moe."
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.randn(HIDDEN, HIDDEN, generator=rng)}
    tensors[prefix + "gate.weight"] = torch.randn(EXPERTS, HIDDEN, generator=rng)
    for expert in range(EXPERTS):
        for leaf, shape in (("w1", (INNER, HIDDEN)), ("w3", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER))):
            tensors[f"{prefix}experts.{expert}.{leaf}.weight"] = torch.randn(*shape, generator=rng)
    return tensors


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same block as transformers 5 holds it in memory."""
    disk, memory = "model.layers.0.block_sparse_moe.", "model.layers.0.mlp."

    def stack(leaf):
        return torch.stack([tensors[f"{disk}experts.{expert}.{leaf}.weight"] for expert in range(EXPERTS)])

    return {
        "model.layers.0.self_attn.q_proj.weight": tensors["model.layers.0.self_attn.q_proj.weight"],
        memory + "gate.weight": tensors[disk + "gate.weight"],
        memory + "experts.gate_up_proj": torch.cat([stack("w1"), stack("w3")], 1),
        memory + "experts.down_proj": stack("w2"),
    }


def test_fused_experts_meet_the_experts_that_base_stores_one_by_one(tmp_path):
    base = save_model(tmp_path / "base", mixture(1))
    plain = lora_diag.spectrum(base, save_model(tmp_path / "plain", mixture(2)))
    other = lora_diag.spectrum(base, save_model(tmp_path / "fused", fused(mixture(2))))
    assert other.layers == plain.layers
    assert other.left_out == ()
    assert "3 tensors are stored under other names" in other.run.inputs[1].notes[0]


def test_a_shape_that_does_not_fit_stays_unpaired(tmp_path):
    tensors = fused(mixture(2))
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.randn(EXPERTS, HIDDEN, INNER + 1)
    results = lora_diag.spectrum(save_model(tmp_path / "base", mixture(1)), save_model(tmp_path / "fused", tensors))
    reasons = {item.layer: item.reason for item in results.left_out}
    assert reasons.pop("model.layers.0.mlp.experts.down_proj") == "only_in_tuned"
    assert set(reasons.values()) == {"only_in_base"}
    assert len(reasons) == EXPERTS


def test_names_with_nothing_in_common_are_not_guessed_at(tmp_path):
    one, two = {"layers.0.w": torch.ones(2, 2)}, {"model.layers.0.w": torch.ones(2, 2)}
    with pytest.raises(NothingComparedError):
        lora_diag.spectrum(save_model(tmp_path / "a", one), save_model(tmp_path / "b", two))


def test_one_side_alone_must_be_an_adapter(tmp_path):
    with pytest.raises(UsageError, match="BASE before TUNED"):
        lora_diag.spectrum(save_model(tmp_path / "m", weights(1)))
