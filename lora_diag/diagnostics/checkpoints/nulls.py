"""What a trajectory of updates shows without any training: a random walk, and the shrinking steps of a schedule.

A trajectory ΔW_1, …, ΔW_T that starts at ΔW_0 = 0 enters by its Gram matrix K_st = ⟨ΔW_s, ΔW_t⟩ alone.

The first direction over time is the first eigenvector of K, without centring: Σ_t ‖ΔW_t‖² is its energy. A random walk
whose increments are independent, of mean zero and of the measured norms d_i, has E K_st = Σ_{i ≤ min(s,t)} d_i²; in
high dimension K itself is near that. Even so its first direction has most of the energy, and its coefficient grows
almost linearly with the step: with equal norms and T → ∞, 8/π² of the energy and R² = 0.96 (tests simulate both).
Reference: Antognini and Sohl-Dickstein 2018, "PCA of high dimensional random walks with comparison to neural network
training" (arXiv 1806.08805).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

# Distance from the last checkpoint, as a fraction of ‖ΔW_T‖, within which a run counts as settled.
NEAR = 0.1

# Checkpoints on either side whose increments an increment is compared with.
NEIGHBOURS = 2


def increments_of(gram: Array) -> Array:
    """Return ⟨D_s, D_t⟩ of the increments D_t = ΔW_t − ΔW_{t−1}, D_1 = ΔW_1, from the Gram matrix of ΔW_1, …, ΔW_T."""
    return np.diff(np.diff(gram, axis=0, prepend=0.0), axis=1, prepend=0.0)


def random_walk(gram: Array) -> Array:
    """Return the expected Gram matrix of a random walk with the same norms of increments."""
    energy = np.cumsum(increments_of(gram).diagonal())
    steps = np.arange(len(gram))
    return np.asarray(energy[np.minimum(steps[:, None], steps)], np.float64)


def first_direction(gram: Array, steps: Sequence[int]) -> tuple[float, float]:
    """Return the energy fraction of the first direction over time, and R² of its coefficient as a line in the step.

    Args:
        gram: Gram matrix of three or more updates that are not all zero, ``(T, T)``.
        steps: Their steps.

    Example:
        >>> share, linear = first_direction(np.minimum.outer(np.arange(1.0, 501), np.arange(1.0, 501)), range(1, 501))
        >>> round(share, 2), round(linear, 2)
        (0.81, 0.96)
    """
    values, vectors = np.linalg.eigh(gram / np.abs(gram).max())
    return float(values[-1] / values.sum()), float(np.corrcoef(steps, vectors[:, -1])[0, 1] ** 2)


def distances(gram: Array) -> Array:
    """Return the distances of ΔW_0 = 0, ΔW_1, …, ΔW_T from each other, ``(T + 1, T + 1)``."""
    padded = np.pad(gram, (1, 0))
    squares = padded.diagonal()
    return np.asarray(np.sqrt(np.maximum(squares[:, None] + squares - 2 * padded, 0.0)), np.float64)


def settled_from(remaining: Array) -> int:
    """Return the first checkpoint from which on the distance to the last one, over ‖ΔW_T‖, is at most ``NEAR``."""
    return max((t + 1 for t, value in enumerate(remaining) if value > NEAR), default=0)


def spike_ratios(lengths: Array) -> list[float]:
    """Return each increment over the median of its neighbours; 0 for a run of fewer than four increments.

    Args:
        lengths: ‖D_t‖, in proportion to the steps between checkpoints.
    """
    ratios = []
    for t, length in enumerate(lengths.tolist()):
        near = [*lengths[max(0, t - NEIGHBOURS) : t], *lengths[t + 1 : t + 1 + NEIGHBOURS]]
        middle = median(near) if len(lengths) > 3 else 0.0
        ratios.append(length / middle if middle > 0 else 0.0)
    return ratios


def best_swap(gram: Array) -> tuple[float, int, int]:
    """Return the exchange of two checkpoints that shortens the path most, and how much.

    Of the edges that it changes, both the sum and the longest must become shorter: to put an outlier at the end of the
    path would shorten only the sum.

    Returns:
        The larger of the two ratios, new over old, and both positions; 1 without a shorter path.
    """
    apart, count = distances(gram), len(gram)
    best = (1.0, 0, 0)
    for first, second in combinations(range(1, count + 1), 2):
        order = np.arange(count + 1)
        order[[first, second]] = second, first
        edges = sorted({first - 1, first, second - 1, second} & set(range(count)))  # from i to i + 1
        old = np.array([apart[i, i + 1] for i in edges])
        new = np.array([apart[order[i], order[i + 1]] for i in edges])
        if old.min() > 0:
            best = min(best, (float(max(new.sum() / old.sum(), new.max() / old.max())), first - 1, second - 1))
    return best
