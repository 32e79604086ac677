"""Scalar summaries of the number of directions of an update."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stable_rank(s: NDArray[np.float64], fro: float) -> float:
    """Return ‖A‖_F² / σ_1², between 1 and rank(A).

    Reference: Rudelson and Vershynin 2007, "Sampling from large matrices", section 1.

    Example:
        >>> stable_rank(np.array([1.0, 1.0]), np.sqrt(2.0)).__round__(6)
        2.0
    """
    return max(1.0, float((fro / s[0]) ** 2))


def effective_rank(s: NDArray[np.float64]) -> float:
    """Return exp(−Σ p_i ln p_i) with p_i = σ_i² / Σσ²: the number of equal directions with the same entropy of energy.

    Roy and Vetterli 2007 ("The effective rank") define it on p_i = σ_i/Σσ; here p is the energy, as in the rest of the
    package.

    Args:
        s: All singular values; the largest is positive.

    Example:
        >>> effective_rank(np.array([1.0, 1.0, 0.0])).__round__(6)
        2.0
    """
    energy = np.square(s / s[0])
    p = energy[energy > 0] / energy.sum()
    return float(np.exp(-(p * np.log(p)).sum()))
