"""Spectra thinned for drawing: a subset of unchanged values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_diag.metrics.energy import energy_curve


def thinned_ranks(values: int, points: int) -> list[int]:
    """Return the ranks to draw: all if they fit, else half of the points without gaps and the other half log-spaced.

    Args:
        values: K, the number of singular values.
        points: Maximum number of points, at least 2.

    Returns:
        Ascending ranks from 1 to K, no more than ``points``.

    Example:
        >>> thinned_ranks(4, 8), thinned_ranks(4096, 8)
        ([1, 2, 3, 4], [1, 2, 3, 4, 23, 128, 724, 4096])
    """
    if values <= points:
        return list(range(1, values + 1))
    first = points // 2
    spaced = np.geomspace(first, values, points - first + 1)[1:]
    return sorted({*range(1, first + 1), *(int(rank) for rank in np.rint(spaced))})


def curve_at(s: Sequence[float], fro: float, complete: bool, ranks: Sequence[int]) -> list[float]:
    """Return C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖_F² at given ranks.

    Args:
        s: Singular values, descending, ``(K,)``.
        fro: ‖ΔW‖_F > 0.
        complete: True if ``s`` holds every singular value.
        ranks: From 1 to K.

    Example:
        >>> [round(share, 3) for share in curve_at([2.0, 1.0, 1.0], 6**0.5, True, [1, 3])]
        [0.667, 1.0]
    """
    curve = energy_curve(np.asarray(s, dtype=np.float64), fro, complete)
    return [float(curve[rank - 1]) for rank in ranks]
