"""Comparison of two matrices block by block, without forming their difference."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_diag.linalg.difference import norm


class Products(NamedTuple):
    """Result of one pass over D and X: ‖D − X‖_F, ‖X‖_F and ⟨D, X⟩ = tr(DᵀX), accumulated in float64."""

    gap: float
    other: float
    inner: float


def products(blocks: Iterable[tuple[Tensor, Tensor]]) -> Products:
    """Compare two matrices given in blocks.

    Args:
        blocks: Row blocks of D and of X, of the same shape, float64.

    Example:
        >>> d, x = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
        >>> products([(d, x)])
        Products(gap=1.4142135623730951, other=2.0, inner=2.0)
    """
    gap = other_norm = inner = 0.0
    for d, x in blocks:
        inner += float(torch.dot(d.reshape(-1), x.reshape(-1)))
        gap, other_norm = math.hypot(gap, norm([d - x])), math.hypot(other_norm, norm([x]))
    return Products(gap, other_norm, inner)


def principal_cosines(u: Tensor, v: Tensor) -> Tensor:
    """Return the cosines of the principal angles between two spaces, descending.

    Args:
        u: ``(m, k)``, orthonormal columns.
        v: ``(m, j)``, likewise.

    Returns:
        ``(min(k, j),)`` float64 on the CPU: the singular values of UᵀV.

    Reference: Björck and Golub 1973, "Numerical methods for computing angles between linear subspaces", theorem 1.

    Example:
        >>> principal_cosines(torch.eye(3)[:, :2], torch.eye(3)[:, 1:]).tolist()
        [1.0, 0.0]
    """
    cosines: Tensor = torch.linalg.svdvals(u.to(torch.float64).T @ v.to(torch.float64))
    return cosines.clamp(max=1.0).cpu()


def root(moments: Tensor) -> tuple[Tensor, float]:
    """Return L with L·Lᵀ = C, and the distance of C from positive semidefinite.

    ‖D·L‖_F² = tr(D·C·Dᵀ), and D·L has the singular values of D·C^½: L is C^½ times an orthogonal matrix.

    Args:
        moments: C, ``(n, n)``, symmetric, finite.

    Returns:
        L ``(n, n)`` float64, from the eigenvalues that are positive; and |Σ of the negative ones| / Σ|λ|, 0 for C = 0.

    Example:
        >>> l, negative = root(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
        >>> (l @ l.T).tolist(), negative
        ([[4.0, 0.0], [0.0, 0.0]], 0.0)
    """
    eigenvalues, vectors = torch.linalg.eigh(moments.to(torch.float64))
    positive = eigenvalues.clamp(min=0)
    total = float(eigenvalues.abs().sum())
    return vectors * positive.sqrt(), float((positive - eigenvalues).sum()) / total if total else 0.0
