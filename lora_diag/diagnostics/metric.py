"""The norm in which two updates are compared: Frobenius's, or the one that the layer's own inputs give.

With C = E[xxᵀ] the second moment of the inputs, ‖D·C^½‖_F² = E‖Dx‖² is the mean square of what an update changes in the
layer's output. D·L with L·Lᵀ = C has the same norm and the same singular values, so everything that holds for D holds
for D·L, the Eckart–Young floor included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_diag.deltas import Side
from lora_diag.diagnostics.change import Change
from lora_diag.errors import InputError
from lora_diag.linalg import Factors, first_non_finite, norm, products, root
from lora_diag.metrics import Distances, distances, truncation_error

# A second moment may be this far from symmetric or positive semidefinite: sums of many products in float32 are.
MOMENT_ERROR = 1e-4


@dataclass(frozen=True, slots=True)
class Moments:
    """Where the second moment C = E[xxᵀ] of a layer's input lies.

    Args:
        side: The stored matrix.
        size: Its order.
        on_rows: Whether the layer is stored ``(in, out)``, so that C belongs to its rows.
    """

    side: Side
    size: int
    on_rows: bool


@dataclass(frozen=True, slots=True)
class Metric:
    """D in one metric: as it is, or times a root of C.

    Args:
        change: D, or D·L.
        factors: Its largest singular values, with vectors where they are needed.
        shape: ``(out, in)``.
        root: L; None in the plain metric.
        on_rows: Whether L belongs to the rows.
    """

    change: Change
    factors: Factors
    shape: tuple[int, int]
    root: Tensor | None = None
    on_rows: bool = False

    def distances(self, other: Change | None, rank: int | None) -> tuple[Distances, float]:
        """Return how far X, given in the plain metric, is from D, and ‖X‖; None stands for X = 0."""
        fro, gap, norm, inner = self.factors.fro, self.factors.fro, 0.0, 0.0
        if other is not None:
            if self.root is not None:
                other = times(other, self.root, self.on_rows)
            pairs = zip(self.change.blocks(self.shape), other.blocks(self.shape), strict=True)
            gap, norm, inner = products(pairs)
        return distances(fro, norm, gap, inner, self._floor(rank)), norm

    def _floor(self, rank: int | None) -> float | None:
        """Return √(1 − C(r))."""
        if rank is None or self.factors.fro == 0.0:
            return None
        error = truncation_error(self.factors.s.numpy(), self.factors.fro, rank, self.factors.complete)
        return None if error is None else error[0] / self.factors.fro


def times(change: Change, lower: Tensor, on_rows: bool) -> Change:
    """Return ΔW·L, or Lᵀ·ΔW where the layer is stored ``(in, out)``; in factored form where there are factors."""
    if change.factors is not None:
        b, a = (factor.to(torch.float64) for factor in change.factors)
        return replace(change, factors=(lower.T @ b, a) if on_rows else (b, a @ lower))
    assert change.matrix is not None
    matrix = change.matrix.to(torch.float64)
    product = lower.T @ matrix if on_rows else matrix @ lower
    return replace(change, matrix=product, fro=norm([product]))


def read_root(moments: Moments, device: torch.device) -> Tensor:
    """Read C, check it, and return L with L·Lᵀ = C.

    Raises:
        InputError: C is not finite, not symmetric, or not positive semidefinite.
    """
    side = moments.side
    where = f"{side.checkpoint.file_of(side.name)}: {side.name}"
    c = side.read(0, moments.size**2).view(moments.size, moments.size).to(device, torch.float64)
    if problem := first_non_finite(f"{where}: holds", c):
        raise InputError(problem)
    if norm([c - c.T]) > MOMENT_ERROR * norm([c]):
        raise InputError(f"{where}: is not symmetric, so it is no second moment E[xxᵀ]")
    lower, negative = root((c + c.T) / 2)
    if negative > MOMENT_ERROR:
        raise InputError(f"{where}: has negative eigenvalues, so it is no second moment E[xxᵀ]")
    return lower
