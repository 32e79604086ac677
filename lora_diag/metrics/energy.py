"""Energy curves: C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖_F²."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Default ranks of C(r), and the fractions of energy whose rank is given.
RANKS = (4, 8, 16, 32, 64)
THRESHOLDS = (0.9, 0.95, 0.99)


def energy_curve(s: NDArray[np.float64], fro: float | NDArray[np.float64], complete: bool) -> NDArray[np.float64]:
    """Return C(1), …, C(K) for the K largest singular values.

    Args:
        s: Singular values, descending, ``(K,)``; or of several matrices, ``(…, K)``.
        fro: ‖ΔW‖_F > 0, computed independently of ``s``, so that fractions of an incomplete spectrum are exact; of
            several matrices ``(…, 1)``.
        complete: True if ``s`` holds every singular value; C then ends at exactly 1.

    Returns:
        As ``s``, non-decreasing, in [0, 1].

    Example:
        >>> energy_curve(np.array([2.0, 1.0, 1.0]), np.sqrt(6.0), complete=True).round(3).tolist()
        [0.667, 0.833, 1.0]
    """
    curve: NDArray[np.float64] = np.minimum(np.cumsum(np.square(s / fro), axis=-1), 1.0)
    if complete:
        curve[..., -1] = 1.0
    return curve


def rank_at(curve: NDArray[np.float64], threshold: float) -> int | None:
    """Return the smallest r with C(r) ≥ threshold; None if the curve ends below it.

    Example:
        >>> rank_at(np.array([0.6, 0.9, 1.0]), 0.9), rank_at(np.array([0.6, 0.8]), 0.9)
        (2, None)
    """
    reached = int(np.searchsorted(curve, threshold, side="left"))
    return reached + 1 if reached < len(curve) else None


def ranks_at(curves: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """Return the smallest r with C(r) ≥ threshold of several curves that end at 1, ``(…, K)``.

    Example:
        >>> ranks_at(np.array([[0.6, 0.9, 1.0], [0.2, 0.3, 1.0]]), 0.9).tolist()
        [2, 3]
    """
    return np.asarray((curves < threshold).sum(axis=-1) + 1, np.int64)
