"""Random baseline: overlaps of a gradient with random subspaces, and the criterion for being near them."""

from __future__ import annotations

import math
from typing import NamedTuple

# An overlap below this multiple of its baseline is near it. Random subspaces of 512² exceed it for a gradient of rank
# one, the most variable case, in 2.6% of 20,000 draws at r = 4, 0.6% at 8, 0.05% at 16, never at 64. For full-rank
# gradients they did not in 2,000 draws at any of these ranks.
NEAR_RANDOM = 2.0

# Ratio of κ over a run from which its change is called a trend.
TREND_RATIO = 0.8


class Chance(NamedTuple):
    """Root mean squares of the overlaps over random subspaces of one rank."""

    kappa: float
    tangent: float
    left: float
    right: float


def overlap_by_chance(shape: tuple[int, int], rank: int) -> Chance:
    """Return the overlaps of random subspaces of rank r with any G.

    E‖UᵀG‖² = (r/m)‖G‖², E‖GV‖² = (r/n)‖G‖² and, U and V being independent, E‖UᵀGV‖² = (r²/mn)‖G‖².

    Args:
        shape: ``(m, n)``.
        rank: r ≤ min(m, n).

    Returns:
        κ r/√(mn), tangent √(r/m + r/n − r²/(mn)), left √(r/m) and right √(r/n).

    Example:
        >>> [round(value, 3) for value in overlap_by_chance((512, 512), 16)]
        [0.031, 0.248, 0.177, 0.177]
    """
    left, right = rank / shape[0], rank / shape[1]
    return Chance(math.sqrt(left * right), math.sqrt(left + right - left * right), math.sqrt(left), math.sqrt(right))


def is_near(overlap: float, random: float) -> bool:
    """Return whether an overlap is near its baseline: below twice the baseline, or below halfway to 1 if that is less.

    >>> is_near(0.05, 0.031), is_near(0.07, 0.031), is_near(0.7, 0.5), is_near(0.8, 0.5)
    (True, False, True, False)
    """
    return overlap < min(NEAR_RANDOM * random, (1 + random) / 2)
