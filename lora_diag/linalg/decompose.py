"""Choice of a method for a dense matrix, with validation."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from lora_diag.errors import UsageError
from lora_diag.linalg.difference import norm
from lora_diag.linalg.exact import decompose_exact, decompose_gram
from lora_diag.linalg.factors import Factors, scale_of
from lora_diag.linalg.krylov import decompose_krylov, may_be_cheaper

# Default bound on the error of an energy fraction: C(r) to three digits.
TOL = 5e-4

METHODS = ("exact", "gram", "krylov")

# Up to this many rows or columns LAPACK is as fast as the Gram matrix, and more accurate in the smallest values.
EXACT_UP_TO = 128


def decompose(
    matrix: Tensor,
    method: str = "auto",
    top: int | None = None,
    fro: float | None = None,
    vectors: bool = False,
    tol: float = TOL,
    seed: int = 0,
) -> Factors:
    """Compute the singular values of a matrix.

    Args:
        matrix: A, ``(m, n)`` with m, n ≥ 1, float32 or float64, finite.
        method: ``exact``; ``gram``; ``krylov``, which needs ``top`` and falls back to ``gram`` if the spectrum is too
            flat; or ``auto`` for the cheapest whose bound meets ``tol``.
        top: Number of largest values to keep; None for all.
        fro: ‖A‖_F in float64 accuracy if known; else computed.
        vectors: Whether to compute singular vectors.
        tol: Required bound on the error of every energy fraction.
        seed: Seed of random starting vectors.

    Returns:
        The values, their method, and a bound on the error of every energy fraction.

    Raises:
        UsageError: The method is unknown, or ``top`` or ``tol`` is invalid.
        InputError: No driver of ``exact`` converged.
        ValueError: The matrix has no entries, or not two dimensions.

    Example:
        >>> import torch
        >>> factors = decompose(torch.diag(torch.tensor([3.0, 4.0])))
        >>> factors.s.tolist(), factors.complete
        ([4.0, 3.0], True)
    """
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"a matrix with entries is needed, not a tensor of shape {tuple(matrix.shape)}")
    check_request(method, top, tol)
    if fro is None:
        fro = norm([matrix])
    if (scale := scale_of(fro, matrix.dtype)) != 1.0:
        scaled = decompose(matrix / scale, method, top, fro / scale, vectors, tol, seed)
        return replace(scaled, s=scaled.s * scale, fro=fro)
    smaller = min(matrix.shape)
    if method == "exact" or (method == "auto" and smaller <= EXACT_UP_TO):
        return decompose_exact(matrix, fro, top, vectors)
    if top is not None and tries_krylov(matrix.shape, method, top, vectors):
        factors = decompose_krylov(matrix, fro, top, vectors, tol, seed, budget=budget_of(method))
        if factors is not None:
            return factors
    return decompose_gram(matrix, fro, top, vectors)


def tries_krylov(shape: tuple[int, ...], method: str, top: int | None, vectors: bool = False) -> bool:
    """Return whether ``krylov`` is tried before a full method.

    Args:
        shape: ``(m, n)``.
        method: As in ``decompose``.
        top: Number of largest values; None for all.
        vectors: Whether to compute singular vectors.
    """
    m, n = shape
    return top is not None and (method == "krylov" or (method == "auto" and may_be_cheaper((m, n), top, vectors)))


def budget_of(method: str) -> float | None:
    """Return the budget of ``krylov``: infinite if the method was requested explicitly, else None for its default."""
    return math.inf if method == "krylov" else None


def check_request(method: str, top: int | None, tol: float) -> None:
    """Check method, ``top`` and ``tol``.

    Raises:
        UsageError: One of them is invalid.
    """
    if method not in {"auto", *METHODS}:
        raise UsageError(f"--method {method}: use auto, {', '.join(METHODS)}")
    if method == "krylov" and top is None:
        raise UsageError("--method krylov: computes the largest values only; give their number with --top K")
    if top is not None and top < 1:
        raise UsageError(f"--top {top}: must be at least 1")
    if not 0 < tol < 1:
        raise UsageError(f"--tol {tol}: must lie between 0 and 1")
