"""Distances, inner products and angles of matrices and subspaces, without forming a difference or a projection.

Two matrices are compared block by block (``products``), and the fractions of a matrix in given subspaces (``shares``)
follow from products with thin matrices only. With orthonormal U (m × r) and V (n × r), the projection of G on the
tangent space of the rank-r matrices at U·Σ·Vᵀ is P(G) = UUᵀG + GVVᵀ − UUᵀGVVᵀ (Koch and Lubich 2007, *Dynamical
low-rank approximation*, SIAM J. Matrix Anal. Appl. 29, lemma 4.1; Vandereycken 2013, *Low-rank matrix completion by
Riemannian optimization*, SIAM J. Optim. 23, §2.1). Its three parts UUᵀG(I − VVᵀ), (I − UUᵀ)GVVᵀ and UUᵀGVVᵀ are
orthogonal to each other, so

    ‖P(G)‖² = ‖UᵀG‖² + ‖GV‖² − ‖UᵀGV‖²,

and no matrix of the size of G is formed. No digits are lost in the difference: ‖UᵀGV‖ is at most the smaller of the
other two. The first r columns of larger U and V give every smaller rank at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_diag.linalg.devices import move
from lora_diag.linalg.difference import first_non_finite, norm


class Products(NamedTuple):
    """Result of one pass over D and X: ‖D − X‖_F, ‖X‖_F and ⟨D, X⟩ = tr(DᵀX), accumulated in float64."""

    gap: float
    other: float
    inner: float


def products(blocks: Iterable[tuple[Tensor, Tensor]]) -> Products:
    """Return ‖D − X‖_F, ‖X‖_F and ⟨D, X⟩ of two matrices given in blocks.

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


@dataclass(frozen=True, slots=True)
class Shares:
    """Norms of the parts of G over ‖G‖_F; one value per requested rank.

    Args:
        fro: ‖G‖_F.
        both: ‖UᵀGV‖_F / ‖G‖_F.
        left: ‖UᵀG‖_F / ‖G‖_F.
        right: ‖GV‖_F / ‖G‖_F.
        tangent: ‖P(G)‖_F / ‖G‖_F.
    """

    fro: float
    both: tuple[float, ...]
    left: tuple[float, ...]
    right: tuple[float, ...]
    tangent: tuple[float, ...]


def orthonormalize(vectors: Tensor) -> Tensor:
    """Return float64 columns, orthonormal up to rounding, whose first k columns span the first k given ones.

    Args:
        vectors: ``(m, r)``, r ≤ m, linearly independent.
    """
    columns: Tensor = torch.linalg.qr(vectors.to(torch.float64))[0]
    return columns


def shares(blocks: Iterable[Tensor], u: Tensor, v: Tensor, ranks: Sequence[int]) -> Shares | str:
    """Measure the fractions of G in the subspaces of the first r columns of U and V.

    Args:
        blocks: The rows of G, ``(rows, n)`` each, any floating dtype, from the first row to the last.
        u: U, ``(m, R)`` float64, orthonormal columns.
        v: V, ``(n, R)`` likewise, on the same device.
        ranks: The r, 1 ≤ r ≤ R each.

    Returns:
        The fractions, with 0 ≤ both ≤ left, right ≤ tangent ≤ 1, all 0 if G is zero; or a sentence on an entry that is
        not finite or a norm that overflows.

    Example:
        >>> e = torch.eye(3, dtype=torch.float64)
        >>> found = shares([torch.ones(3, 3)], e[:, :1], e[:, :1], [1])
        >>> [round(share[0] ** 2 * 9) for share in (found.both, found.left, found.tangent)]
        [1, 3, 5]
    """
    from_left = torch.zeros(u.shape[1], v.shape[0], dtype=torch.float64, device=u.device)
    squares = torch.zeros(v.shape[1], dtype=torch.float64, device=u.device)
    fro, row = 0.0, 0
    for stored in blocks:
        block = move(stored, u.device).to(torch.float64)
        size = norm([block])
        if not math.isfinite(size):
            return first_non_finite("the gradient holds", block, row) or "the norm of the gradient overflows float64"
        fro = math.hypot(fro, size)
        from_left.addmm_(u[row : row + len(block)].T, block)
        squares += (block @ v).square().sum(0)
        row += len(block)
    if fro == 0.0:
        zeros = (0.0,) * len(ranks)
        return Shares(0.0, zeros, zeros, zeros, zeros)
    both = (from_left @ v).square().cumsum(0).cumsum(1).diagonal().tolist()
    left, right = from_left.square().sum(1).cumsum(0).tolist(), squares.cumsum(0).tolist()
    by_rank = [_compute_shares(both[r - 1], left[r - 1], right[r - 1], fro) for r in ranks]
    return Shares(fro, *(tuple(part) for part in zip(*by_rank, strict=True)))


def _compute_shares(both: float, left: float, right: float, fro: float) -> tuple[float, float, float, float]:
    """Return both, left, right and tangent from squares, with their order enforced against rounding."""
    inside, columns, rows = (min(1.0, math.sqrt(square) / fro) for square in (both, left, right))
    inside = min(inside, columns, rows)
    tangent = min(1.0, max(columns, rows, math.sqrt(max(0.0, left + right - both)) / fro))
    return inside, columns, rows, tangent
