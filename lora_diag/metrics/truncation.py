"""Eckart–Young: how far the best rank-r approximation is from the matrix."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def truncation_error(
    s: NDArray[np.float64], fro: float, rank: int, complete: bool
) -> tuple[float, float | None] | None:
    """Return ‖A − A_r‖_F = √Σ_{i>r}σ_i² and ‖A − A_r‖_2 = σ_{r+1} for the best approximation of rank r.

    Args:
        s: The K largest singular values, descending.
        fro: ‖A‖_F.
        rank: r ≥ 0.
        complete: True if ``s`` holds every singular value. The Frobenius error is then summed from its small end,
            free of cancellation; else it is √(‖A‖_F² − Σ_{i≤r}σ_i²).

    Returns:
        Both errors; the spectral one is None where σ_{r+1} was not computed; None where r > K leaves both unknown.

    Reference: Eckart and Young 1936; Mirsky 1960, theorem 2 (any unitarily invariant norm).

    Example:
        >>> truncation_error(np.array([3.0, 2.0, 1.0]), math.sqrt(14), 2, complete=True)
        (1.0, 1.0)
    """
    if complete:
        tail = s[rank:]
        return math.hypot(*tail[::-1].tolist()), float(tail[0]) if len(tail) else 0.0
    if rank > len(s):
        return None
    kept = math.hypot(*s[:rank].tolist())
    left = math.sqrt(max(0.0, fro - kept)) * math.sqrt(fro + kept)
    return left, float(s[rank]) if rank < len(s) else None
