"""Rank correlation of two scores, with an interval and a p-value that do not assume normality."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Array = NDArray[np.float64]

# Number of permutations: enough to distinguish p = 0.05 from 0.06, in milliseconds.
PERMUTATIONS = 9999


def spearman(x: Sequence[float], y: Sequence[float], groups: Sequence[Hashable] | None = None) -> float | None:
    """Return Spearman's ρ: Pearson's correlation of the ranks, with mean ranks for ties.

    Args:
        x: Scores.
        y: Other scores of the same items.
        groups: Compare items only within a group: ranks are within the group, minus their mean.

    Returns:
        ρ in [−1, 1]; None if all ranks of one side are equal.

    Example:
        >>> round(spearman([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]), 6)
        0.8
    """
    return _correlate(_rank_within_groups(x, groups), _rank_within_groups(y, groups))


def p_value(
    x: Sequence[float], y: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> float | None:
    """Return the fraction of random pairings with a ρ at least as far from zero: a two-sided permutation test.

    Items are assumed exchangeable (within their group), which holds only roughly for layers of one model.

    Args:
        x: Scores.
        y: Other scores of the same items.
        groups: Permute only within a group.
        seed: Seed of the permutations.

    Reference: Phipson and Smyth 2010, "Permutation p-values should never be zero", equation 3.

    Example:
        >>> p_value([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) > 0.3
        True
    """
    first, second = _rank_within_groups(x, groups), _rank_within_groups(y, groups)
    correlation = _correlate(first, second)
    if correlation is None:
        return None
    random = np.random.default_rng(seed)
    labels = [0] * len(x) if groups is None else list(groups)
    members = [np.array([i for i, label in enumerate(labels) if label == group]) for group in dict.fromkeys(labels)]
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    shuffled, as_far = second.copy(), 0
    for _ in range(PERMUTATIONS):
        for indices in members:
            shuffled[indices] = second[random.permutation(indices)]
        as_far += abs(float(first @ shuffled)) >= (abs(correlation) - 1e-12) * norm
    return (as_far + 1) / (PERMUTATIONS + 1)


def interval(rho: float, n: int) -> tuple[float, float] | None:
    """Return the 95% interval of Spearman's ρ: tanh(artanh ρ ± 1.96·√((1 + ρ²/2)/(n − 3))).

    Args:
        rho: ρ.
        n: Number of ranked items, assumed independent.

    Returns:
        None for fewer than five items, or |ρ| = 1.

    Reference: Bonett and Wright 2000, "Sample size requirements for estimating Pearson, Kendall and Spearman
    correlations", equation 3.

    Example:
        >>> [round(end, 2) for end in interval(0.5, 28)]
        [0.13, 0.75]
    """
    if n < 5 or abs(rho) >= 1:
        return None
    reach = float(ndtri(0.975)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(math.atanh(rho) - reach), math.tanh(math.atanh(rho) + reach)


def _rank_within_groups(values: Sequence[float], groups: Sequence[Hashable] | None) -> Array:
    """Return ranks within groups, minus their mean."""
    array = np.asarray(values, dtype=np.float64)
    labels = [0] * len(values) if groups is None else list(groups)
    ranks = np.empty(len(array))
    for group in set(labels):
        in_group = np.array([i for i, label in enumerate(labels) if label == group])
        _, inverse, counts = np.unique(array[in_group], return_inverse=True, return_counts=True)
        ranks[in_group] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        ranks[in_group] -= ranks[in_group].mean()
    return ranks


def _correlate(x: Array, y: Array) -> float | None:
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return min(1.0, max(-1.0, float(x @ y) / norm)) if norm else None
