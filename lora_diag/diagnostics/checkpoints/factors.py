"""The updates ΔW_t = B_tA_t of one layer at several steps, from r×r products of their factors
alone, with NumPy.

With δB_t = B_t − B_{t−1} and δA_t = A_t − A_{t−1}, an increment is D_t = ΔW_t − ΔW_{t−1} = δB_t A_t
+ B_{t−1} δA_t. All inner products ⟨D_s, D_t⟩ are sums of tr((XᵀY)(ZWᵀ)) with X, Y from B and δB, Z,
W from A and δA; all these products follow by partial sums from the Gram matrices of the stacked
differences [B_1, δB_2, …] and [A_1, δA_2, …], two products per layer. So a small increment of a
large update loses no digits, which ‖ΔW_t‖² + ‖ΔW_{t−1}‖² − 2⟨ΔW_t, ΔW_{t−1}⟩ would. Then ⟨ΔW_s,
ΔW_t⟩ is the sum of ⟨D_i, D_j⟩ over i ≤ s and j ≤ t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_diag.deltas import Delta
from lora_diag.layers.task import LayerSettings
from lora_diag.thin import compute_triangle, thin_values

Array = NDArray[np.float64]

# Singular values below this fraction of σ_1 are not compared: their vectors are rounding of stored
# float32 numbers.
ZERO = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointsSettings(LayerSettings):
    """Settings of the measurement of a layer.

    Args:
        ranks: Ranks r of C(r).
        directions: k, the number of largest left singular vectors whose spaces are compared.
        steps: The steps of the checkpoints.
    """

    ranks: tuple[int, ...]
    directions: int
    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerSeries:
    """One layer at all checkpoints.

    Args:
        layer: Its name.
        shape: ``(out, in)``.
        deltas: Its update at each checkpoint.
    """

    layer: str
    shape: tuple[int, int]
    deltas: tuple[Delta, ...]


@dataclass(frozen=True, slots=True)
class UpdateFactors:
    """The factors of one update ΔW = s·B·A.

    Args:
        b: B ``(out, r)``, of any floating-point dtype.
        a: A ``(r, in)``.
        scale: s.
    """

    b: NDArray[Any]
    a: NDArray[Any]
    scale: float = 1.0

    def find_problem(self) -> str | None:
        """Return why the update is not finite, with the first such entry of a factor; None if it is
        finite.
        """
        for name, factor in (("lora_B", self.b), ("lora_A", self.a)):
            if not np.isfinite(factor).all():
                row, column = np.argwhere(~np.isfinite(factor))[0].tolist()
                return f"{name} holds {float(factor[row, column])} at [{row}, {column}]"
        return None if np.isfinite(self.scale) else f"its scale is {self.scale}"


@dataclass(frozen=True, slots=True)
class Evolution:
    """One layer at T steps, all of them finite.

    Args:
        s: All singular values of each ΔW_t that can be nonzero, descending.
        fro: ‖ΔW_t‖_F of each.
        increments: ⟨D_s, D_t⟩ ``(T, T)``, with D_1 = ΔW_1.
        spaces: U_t ``(out, k_t)`` of each, the first left singular vectors; fewer than requested if
            the rank is lower.
        unchanged: Fraction of entries that are equal at the step before; None for the first, where
            it is not known.
        method: Method of the singular values of each step.
        kinship: Cosine of each A and that of the step before; None for the first, and where it is
            not known. Empty for updates that are no factors.
    """

    s: Sequence[Array]
    fro: Sequence[float]
    increments: Array
    spaces: Sequence[Array]
    unchanged: Sequence[float | None]
    method: Sequence[str]
    kinship: Sequence[float | None] = ()


def measure_factors(steps: Sequence[UpdateFactors], directions: int) -> Evolution | None:
    """Measure the updates of one layer at successive steps.

    Args:
        steps: The factors at T ≥ 1 steps, of one shape ``(out, in)``; ranks may differ.
        directions: k, the number of largest left singular vectors whose spaces are compared.

    Returns:
        The measurements; None if an entry or a norm is not finite.
    """
    left = [np.asarray(step.b, np.float64) * step.scale for step in steps]
    right = [np.asarray(step.a, np.float64).T for step in steps]
    triangles = [
        (compute_triangle(b), compute_triangle(a)) for b, a in zip(left, right, strict=True)
    ]
    values = [
        thin_values(b, a, vectors=True) for b, a in triangles if b is not None and a is not None
    ]
    fro = [float(each.fro[0]) for each in values]
    if len(values) < len(steps) or not np.isfinite(fro).all():
        return None
    b, a = _multiply_differences(left), _multiply_differences(right)
    mixed = _inner(_shift(b.mixed).transpose(2, 3, 0, 1), a.mixed)  # ⟨δB_s A_s, B_{t−1} δA_t⟩
    both = _inner(
        _shift(_shift(b.whole).transpose(2, 3, 0, 1)), a.changes
    )  # ⟨B_{s−1} δA_s, B_{t−1} δA_t⟩
    s = [each.s[0] for each in values]
    mixes = [
        each.mix[0, :, : count_directions(each.s[0], directions)]
        for each in values
        if each.mix is not None
    ]
    return Evolution(
        s=s,
        fro=fro,
        increments=_inner(b.changes, a.whole) + mixed + mixed.T + both,
        spaces=[factor @ mix for factor, mix in zip(left, mixes, strict=True)],
        unchanged=[None, *(_compare_entries(*pair) for pair in pairwise(steps))],
        method=["factored"] * len(s),
        kinship=[None, *(_compare_directions(*pair) for pair in pairwise(right))],
    )


def count_directions(s: Array, directions: int) -> int:
    """Return how many of the first singular values, descending, are not zero."""
    return int((s[:directions] > ZERO * s[0]).sum()) if len(s) and s[0] > 0 else 0


def compare_spaces(first: Array, second: Array) -> float | None:
    """Return ‖UᵀV‖_F² over the smaller dimension of U and V; None if it is 0."""
    k = min(first.shape[1], second.shape[1])
    return min(1.0, float(np.square(first.T @ second).sum()) / k) if k else None


@dataclass(frozen=True, slots=True)
class _Products:
    """Products of the factors X_t and their differences δX_t, each ``(T, r, T, r)``.

    Args:
        changes: δX_sᵀδX_t.
        mixed: X_sᵀδX_t.
        whole: X_sᵀX_t.
    """

    changes: Array
    mixed: Array
    whole: Array


def _multiply_differences(factors: Sequence[Array]) -> _Products:
    """Return the products of factors ``(n, r_t)`` and of their differences; smaller ranks are
    filled up with zeros.
    """
    count, rank = len(factors), max(factor.shape[1] for factor in factors)
    stack = np.zeros((len(factors[0]), count, rank))
    for i, factor in enumerate(factors):
        stack[:, i, : factor.shape[1]] = factor
    stack[:, 1:] -= stack[:, :-1].copy()
    flat = stack.reshape(len(stack), -1)
    changes = (flat.T @ flat).reshape(count, rank, count, rank)
    mixed = changes.cumsum(axis=0)
    return _Products(changes, mixed, mixed.cumsum(axis=2))


def _shift(products: Array) -> Array:
    """Return products of X_{s−1} from those of X_s, with X_0 = 0."""
    return np.concatenate([np.zeros_like(products[:1]), products[:-1]])


def _inner(left: Array, right: Array) -> Array:
    """Return tr(L_stᵀ R_st) of all blocks, ``(T, T)``."""
    return np.asarray(np.einsum("ipjq,ipjq->ij", left, right), np.float64)


def _compare_entries(before: UpdateFactors, after: UpdateFactors) -> float:
    """Return the fraction of the entries of both factors, B scaled, that are equal."""
    if before.b.shape != after.b.shape:
        return 0.0
    equal = (before.b * before.scale == after.b * after.scale).sum() + (before.a == after.a).sum()
    return int(equal) / (after.b.size + after.a.size)


def _compare_directions(before: Array, after: Array) -> float | None:
    """Return the cosine of two factors; None if their shapes differ, or one is zero."""
    if before.shape != after.shape or not (before.any() and after.any()):
        return None
    cosine = float((before * after).sum() / np.linalg.norm(before) / np.linalg.norm(after))
    return max(-1.0, min(1.0, float(f"{cosine:.6g}")))
