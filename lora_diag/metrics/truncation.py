"""Eckart–Young: distance of the best rank-r approximation from the matrix."""

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
        Both errors; the spectral one is None if σ_{r+1} was not computed; None if r > K, where both are unknown.

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


def spectral_error(value: float, fro: float, energy_error: float) -> float:
    """Return a bound on |σ̂_i − σ_i| of one singular value.

    σ_i² is the difference of two partial sums of energy, each of which is off by at most energy_error·‖A‖_F², so
    |σ̂_i² − σ_i²| ≤ 2·energy_error·‖A‖_F².

    Args:
        value: σ̂_i.
        fro: ‖A‖_F.
        energy_error: Bound on the error of every energy fraction up to the i-th.

    Example:
        >>> spectral_error(1.0, 1.0, 0.0), round(spectral_error(1.0, 1.0, 0.18), 12), spectral_error(0.0, 1.0, 0.5)
        (0.0, 0.2, 1.0)
    """
    tolerance = 2 * energy_error * fro**2
    return max(value - math.sqrt(max(0.0, value**2 - tolerance)), math.sqrt(value**2 + tolerance) - value)
