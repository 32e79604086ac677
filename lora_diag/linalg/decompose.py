"""The door to the methods: validates, chooses, and turns each method's own bound into one on the energy fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lora_diag.errors import UsageError
from lora_diag.linalg import exact, gram

# Up to this many rows or columns LAPACK is as fast as the Gram matrix, and more accurate in the smallest values.
EXACT_UP_TO = 128

# Name of the method, and what computes it.
METHODS: tuple[tuple[str, Callable[[Tensor], tuple[Tensor, str, float]]], ...] = (
    ("exact", exact.singular_values),
    ("gram", gram.singular_values),
)


@dataclass(frozen=True, slots=True)
class Factors:
    """Singular values with what is known of their errors.

    Args:
        s: The largest singular values, descending, float64, on the CPU.
        complete: True if all min(m, n) are there.
        method: What ran.
        energy_error: Bound on |Ĉ(r) − C(r)| for every r, where Ĉ(r) = Σ_{i≤r}σ̂_i² / ‖A‖_F².
    """

    s: Tensor
    complete: bool
    method: str
    energy_error: float


def decompose(matrix: Tensor, method: str = "auto", top: int | None = None) -> Factors:
    """Compute the singular values of a matrix.

    Args:
        matrix: ``(m, n)`` with m, n ≥ 1, float32 or float64, finite.
        method: ``exact``, ``gram``, or ``auto`` for the cheapest that fits.
        top: Keep only so many of the largest values; None for all.

    Returns:
        The values and a bound on the error of every energy fraction. From |σ̂_i − σ_i| ≤ δ follows
        |Σ_{i≤r}(σ̂_i² − σ_i²)| ≤ 2δ√r‖A‖_F + rδ² (Cauchy–Schwarz); from |σ̂_i² − σ_i²| ≤ δ it is rδ. Both grow with r,
        so the bound is taken at the last value kept.

    Raises:
        UsageError: There is no such method, or ``top`` is less than one.

    Example:
        >>> import torch
        >>> factors = decompose(torch.diag(torch.tensor([3.0, 4.0])))
        >>> factors.s.tolist(), factors.complete
        ([4.0, 3.0], True)
    """
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"a matrix with entries is needed, not a tensor of shape {tuple(matrix.shape)}")
    if top is not None and top < 1:
        raise UsageError(f"--top {top}: must be at least 1")
    smaller = min(matrix.shape)
    if method == "auto":
        method = "exact" if smaller <= EXACT_UP_TO else "gram"
    methods = dict(METHODS)
    if method not in methods:
        raise UsageError(f"--method {method}: use auto, {', '.join(methods)}")
    values, ran, bound = methods[method](matrix)
    kept = values[:top]
    energy = float((values**2).sum())
    return Factors(kept, len(kept) == smaller, ran, _energy_error(method, bound, len(kept), energy))


def _energy_error(method: str, bound: float, count: int, energy: float) -> float:
    if energy == 0.0:
        return 0.0
    if method == "gram":
        return count * bound / energy
    return (2 * bound * math.sqrt(count * energy) + count * bound**2) / energy
