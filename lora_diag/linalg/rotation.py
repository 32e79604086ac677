"""How ΔW turns and scales a matrix W: leading singular spaces, their angles with a bound, and the
split of ‖ΔW‖².

With the k leading singular vectors U, V of W, ΔW = U·C·Vᵀ + (ΔW − U·C·Vᵀ), C = UᵀΔW·V, and the two
terms are orthogonal, so ‖ΔW‖² = Σ_i C_ii² + Σ_{i≠j} C_ij² + ‖ΔW − U·C·Vᵀ‖²: ΔW scales W's own
directions, mixes them, and acts outside of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diag.linalg.difference import norm
from lora_diag.linalg.methods import EXACT_UP_TO, decompose


@dataclass(frozen=True, slots=True)
class Spaces:
    """All singular values of A, and its leading singular vectors.

    Args:
        s: All min(m, n) singular values, descending, float64, on the CPU.
        u: The left vectors ``(m, K)``, float64.
        v: The right vectors ``(n, K)``.
        method: Method of the decomposition.
    """

    s: Tensor
    u: Tensor
    v: Tensor
    method: str


def bound_space_error(matrix: Tensor, spaces: Spaces, k: int) -> float:
    """Return a bound on the sine of the angle between the computed and the true leading spaces of
    dimension k of A.

    With the residuals R = AV − UΣ and S = AᵀU − VΣ of the k leading vectors, sin θ ≤ √(‖R‖_F² +
    ‖S‖_F²) / δ (Wedin 1972, "Perturbation bounds in connection with singular value decomposition",
    BIT 12), where δ = σ̂_k − σ_{k+1} is the gap. σ_{k+1}² is at most its computed value plus the
    rounding of a Gram matrix and its eigenvalues, (m + n)·ε times ‖A‖_F², which also bounds that of
    LAPACK. 1 without a gap.

    Args:
        matrix: A, ``(m, n)``.
        spaces: Its values and leading vectors.
        k: At most the number of vectors.
    """
    if k >= len(spaces.s):
        return 0.0
    a, u, v = matrix.to(torch.float64), spaces.u[:, :k], spaces.v[:, :k]
    s = spaces.s[:k].to(u.device)
    residual = math.hypot(norm([a @ v - u * s]), norm([a.T @ u - v * s]))
    spread = sum(a.shape) * torch.finfo(torch.float64).eps * float(spaces.s.square().sum())
    gap = float(spaces.s[k - 1]) - math.sqrt(float(spaces.s[k]) ** 2 + spread)
    return min(1.0, residual / gap) if gap > 0 else 1.0


def leading_spaces(
    matrix: Tensor, top: int, method: str = "auto", tol: float = 5e-4, seed: int = 0
) -> Spaces:
    """Compute all singular values of a matrix, and its leading singular vectors.

    Args:
        matrix: A, ``(m, n)``, finite.
        top: K, the number of leading vectors, at most min(m, n).
        method: As in ``decompose``. ``auto`` is a full one: all values are needed.
        tol: As in ``decompose``, for ``krylov``.
        seed: Seed of random starting vectors, for ``krylov``.

    Example:
        >>> spaces = leading_spaces(torch.diag(torch.tensor([3.0, 1.0, 2.0])), 2)
        >>> spaces.s.tolist(), spaces.u.abs().round().tolist()
        ([3.0, 2.0, 1.0], [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    """
    if method == "auto":
        method = "exact" if min(matrix.shape) <= EXACT_UP_TO else "gram"
    found = decompose(matrix, method, top, vectors=True, tol=tol, seed=seed)
    u, vh = found.vectors
    values = found.s if found.rest is None else torch.cat([found.s, found.rest])
    if len(values) < min(matrix.shape):
        values = decompose(matrix, "gram").s
    return Spaces(values, u, vh.T, found.method)


def principal_angles(u: Tensor, v: Tensor) -> Tensor:
    """Return the principal angles between two spaces of one dimension, ascending.

    Args:
        u: ``(m, k)`` float64, orthonormal columns.
        v: ``(m, k)``, likewise.

    Returns:
        ``(k,)`` in degrees, float64, on the CPU. Cosines are the singular values of UᵀV, and sines
            those of (I − UUᵀ)V:
        small angles follow from the sines, large ones from the cosines.

    Reference: Björck and Golub 1973, "Numerical methods for computing angles between linear
    subspaces".

    Example:
        >>> turned = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.75**0.5]], dtype=torch.float64)
        >>> principal_angles(torch.eye(3, 2, dtype=torch.float64), turned).round(
        ...     decimals=9
        ... ).tolist()
        [0.0, 60.0]
    """
    inside = u.T @ v
    cosines = torch.linalg.svdvals(inside)
    sines = torch.linalg.svdvals(v - u @ inside).flip(0)
    return torch.rad2deg(torch.atan2(sines, cosines)).cpu()


@dataclass(frozen=True, slots=True)
class Split:
    """Fractions of ‖ΔW‖²; ``scaling`` + ``mixing`` + ``outside`` = 1.

    Args:
        scaling: Σ_i (u_iᵀΔW v_i)², diagonal in the k leading singular directions of W.
        mixing: Σ_{i≠j} (u_iᵀΔW v_j)² of these directions.
        outside: The remainder.
        left: ‖UᵀΔW‖².
        right: ‖ΔW V‖².
    """

    scaling: float
    mixing: float
    outside: float
    left: float
    right: float


def split_update(update: Tensor, u: Tensor, v: Tensor) -> Split:
    """Split ‖ΔW‖² by the leading singular directions of W.

    Args:
        update: ΔW ≠ 0, ``(m, n)`` float64.
        u: ``(m, k)``, orthonormal columns.
        v: ``(n, k)``, likewise.

    Example:
        >>> e = torch.eye(3, 2, dtype=torch.float64)
        >>> found = split_update(torch.ones(3, 3, dtype=torch.float64), e, e)
        >>> [round(9 * part) for part in (found.scaling, found.mixing, found.outside, found.left)]
        [2, 2, 5, 6]
    """
    total = norm([update]) ** 2
    rows = u.T @ update
    core = rows @ v
    scaling = norm([core.diagonal()[None]]) ** 2
    inside = norm([core]) ** 2
    return Split(
        scaling=scaling / total,
        mixing=max(0.0, inside - scaling) / total,
        outside=max(0.0, total - inside) / total,
        left=min(1.0, norm([rows]) ** 2 / total),
        right=min(1.0, norm([update @ v]) ** 2 / total),
    )


def spectral_shift(before: Tensor, after: Tensor) -> float:
    """Return the normalised spectral shift ‖σ(A) − σ(B)‖ / ‖σ(A)‖ of all singular values,
    descending.

    At most ‖A − B‖_F / ‖A‖_F (Mirsky 1960, "Symmetric gauge functions and unitarily invariant
    norms").

    >>> round(
    ...     spectral_shift(torch.tensor([3.0, 4.0]).double(), torch.tensor([3.0, 4.5]).double()), 9
    ... )
    0.1
    """
    return float((after - before).norm() / before.norm())
