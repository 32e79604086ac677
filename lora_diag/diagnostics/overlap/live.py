"""The current subspaces of a LoRA in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_diag.diagnostics.overlap.measure import Subspaces
from lora_diag.linalg import decompose_factored
from lora_diag.linalg.subspace import orthonormalize
from lora_diag.models.weights import Frozen
from lora_diag.records import LeftOut


@dataclass(frozen=True)
class LiveSubspaces:
    """Source of the current subspaces of the LoRA around a frozen weight.

    Args:
        ranks: Ranks besides the LoRA's own; larger ones are skipped.
    """

    ranks: tuple[int, ...] = ()

    def subspaces(self, weight: Frozen, step: int) -> Subspaces | LeftOut:
        """Return the subspaces spanned by the LoRA's factors, or a ``left_out`` record if there are none."""
        shape = (weight.shape[0], weight.shape[1])
        b, a = _read_factors(weight.module)
        if b.shape[0] != shape[0]:  # Conv1D and embeddings store their weight transposed
            b, a = a.T, b.T
        factors = decompose_factored(b, a, vectors=True)
        if factors.fro == 0.0 or not bool(torch.isfinite(factors.s).all()):
            detail = (
                f"step {step}: the LoRA is {'zero' if factors.fro == 0.0 else 'not finite'}, so it spans no subspaces"
            )
            return LeftOut(layer=weight.name, shape=shape, reason="no_reference", detail=detail)
        assert factors.u is not None
        assert factors.vh is not None
        own_rank = len(factors.s)
        ranks = tuple(sorted({*(rank for rank in self.ranks if rank < own_rank), own_rank}))
        u, v = orthonormalize(factors.u), orthonormalize(factors.vh.T)
        return Subspaces(weight.name, u, v, ranks, "factored", "resolved")


def _read_factors(module: Any) -> tuple[Tensor, Tensor]:
    """Return B and A of all active adapters of a layer, concatenated, with their scaling."""
    down, up = [], []
    for name in module.active_adapters:
        if name in module.lora_A:
            weight = _read_matrix(module.lora_A[name])
            down.append(weight * module.lora_E[name].detach() if hasattr(module, "lora_E") else weight)  # AdaLoRA
            up.append(_read_matrix(module.lora_B[name]) * module.scaling[name])
        elif name in module.lora_embedding_A:
            down.append(module.lora_embedding_A[name].detach())
            up.append(module.lora_embedding_B[name].detach() * module.scaling[name])
    return torch.cat(up, 1).double(), torch.cat(down, 0).double()


def _read_matrix(layer: Any) -> Tensor:
    weight = layer.weight if isinstance(layer, nn.Module) else layer
    assert isinstance(weight, Tensor)
    return weight.detach()
