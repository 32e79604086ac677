"""The door to the methods: validates and chooses."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lora_diag.errors import UsageError
from lora_diag.linalg.exact import decompose_exact
from lora_diag.linalg.factors import Factors
from lora_diag.linalg.gram import decompose_gram

# Up to this many rows or columns LAPACK is as fast as the Gram matrix, and more accurate in the smallest values.
EXACT_UP_TO = 128


class Method(Protocol):
    """What every method for a dense matrix looks like."""

    def __call__(self, matrix: Tensor, fro: float, top: int | None = None, vectors: bool = False) -> Factors:
        """Compute the largest singular values, and vectors if asked."""
        ...


METHODS: tuple[tuple[str, Method], ...] = (
    ("exact", decompose_exact),
    ("gram", decompose_gram),
)


def decompose(
    matrix: Tensor, method: str = "auto", top: int | None = None, fro: float | None = None, vectors: bool = False
) -> Factors:
    """Compute the singular values of a matrix.

    Args:
        matrix: A, ``(m, n)`` with m, n ≥ 1, float32 or float64, finite.
        method: ``exact``, ``gram``, or ``auto`` for the cheapest that fits.
        top: Keep only so many of the largest values; None for all.
        fro: ‖A‖_F in float64 accuracy, if it is known; else it is computed.
        vectors: Whether to compute singular vectors.

    Returns:
        The values, and a bound on the error of every energy fraction.

    Raises:
        UsageError: There is no such method, or ``top`` is less than one.

    Example:
        >>> factors = decompose(torch.diag(torch.tensor([3.0, 4.0])))
        >>> factors.s.tolist(), factors.complete
        ([4.0, 3.0], True)
    """
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"a matrix with entries is needed, not a tensor of shape {tuple(matrix.shape)}")
    check_request(method, top)
    if fro is None:
        fro = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    if method == "auto":
        method = "exact" if min(matrix.shape) <= EXACT_UP_TO else "gram"
    return dict(METHODS)[method](matrix, fro, top, vectors)


def check_request(method: str, top: int | None) -> None:
    """Refuse a method that does not exist and a number of values that makes no sense.

    Raises:
        UsageError: Either.
    """
    if method not in {"auto", *dict(METHODS)}:
        raise UsageError(f"--method {method}: use auto, {', '.join(dict(METHODS))}")
    if top is not None and top < 1:
        raise UsageError(f"--top {top}: must be at least 1")
