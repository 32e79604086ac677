"""One layer's ΔW, however it is stored: its norms, and what its singular values are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lora_diag.deltas import Delta, FactoredDelta, Side, StoredDelta, row_blocks, row_spans
from lora_diag.linalg import Difference, Factors, decompose, decompose_factored, difference, first_non_finite, norm

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Change:
    """ΔW on a device.

    Args:
        fro: ‖ΔW‖_F; None for factors, whose decomposition gives it.
        base_fro: ‖W_base‖_F; None if the base was not given.
        rounding: What the rounding of two stored sides did to ΔW; None for an update that has no two sides.
        matrix: ΔW ``(out, in)``, or None if it is known by its factors or was not kept.
        factors: B and A, or None.
        non_finite: Where the first entry is that is not a finite number; None if all are.
    """

    fro: float | None
    base_fro: float | None
    rounding: Difference | None = None
    matrix: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    non_finite: str | None = None

    def blocks(self, shape: tuple[int, int]) -> Iterator[Tensor]:
        """Yield ΔW in row blocks, float64; the product of factors block by block, so that it is never held whole."""
        for first, last in row_spans(shape):
            if self.factors is not None:
                b, a = self.factors
                yield b[first:last].to(torch.float64) @ a.to(torch.float64)
            else:
                assert self.matrix is not None
                yield self.matrix[first:last].to(torch.float64)

    def decompose(
        self, method: str = "auto", top: int | None = None, vectors: bool = False, tol: float = 1e-4, seed: int = 0
    ) -> Factors:
        """Compute singular values, in factored form where there are factors."""
        if self.factors is not None:
            return decompose_factored(*self.factors, top=top, vectors=vectors)
        assert self.matrix is not None
        return decompose(self.matrix, method, top, self.fro, vectors, tol, seed)


def load_change(delta: Delta, device: torch.device, keep: bool = True) -> Change:
    """Read one layer's ΔW and measure its norms.

    Args:
        delta: The layer.
        device: Where to compute.
        keep: False to measure the norms alone.

    Returns:
        ΔW; without matrix and factors if an entry is not finite.

    Raises:
        InputError: A file could not be read.
    """
    if isinstance(delta, StoredDelta):
        change = difference(delta.blocks(), delta.shape, device, keep, delta.steps())
        matrix, change.matrix = change.matrix, None
        return Change(change.fro, change.base_fro, change, matrix, None, change.non_finite)
    base_fro = None
    if delta.base is not None:
        base_fro = norm(block.to(device) for block in row_blocks(delta.base, delta.shape))
        if not math.isfinite(base_fro):
            return Change(None, None, non_finite=_in_base(delta.base, delta.shape))
    if isinstance(delta, FactoredDelta):
        b, a = (factor.to(device) for factor in delta.load())
        problem = first_non_finite("lora_B holds", b) or first_non_finite("lora_A holds", a)
        return Change(None, base_fro, factors=None if problem else (b, a), non_finite=problem)
    matrix = delta.load().to(device)
    problem = first_non_finite("the update holds", matrix)
    fro = None if problem else norm([matrix])
    return Change(fro, base_fro, None, matrix if keep and not problem else None, non_finite=problem)


def on_device(compute: Callable[[torch.device], T], device: torch.device) -> tuple[T, str]:
    """Compute on a device, and on the CPU where that is out of memory; return the result and words for the record."""
    try:
        return compute(device), ""
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return compute(torch.device("cpu")), f" on the CPU: out of memory on {device}"


def _in_base(side: Side, shape: tuple[int, int]) -> str:
    """Return where the first entry of W_base is that is not finite."""
    for (first, _), block in zip(row_spans(shape), row_blocks(side, shape), strict=True):
        if problem := first_non_finite("BASE holds", block, first):
            return problem
    return "the norm of BASE overflows float64"
