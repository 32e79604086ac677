"""Statistics of scores, losses and fleets: rank correlations, Student's t, numbers of runs, and
outliers.

Rank correlations have an interval and a p-value that do not assume normality. Limits and
confidences of differences use Student's t, and so does the number of runs needed for a decision.
Equality is never concluded from a difference that is not significant. It needs an equivalence test:
the interval of the difference has to lie inside a margin that was fixed before (two one-sided
tests, TOST).

References: Schuirmann 1987, "A comparison of the two one-sided tests procedure and the power
approach"; Welch 1947, "The generalization of Student's problem", equation 28; Berger 1982,
"Multiparameter hypothesis testing" (intersection-union).

Outliers of a fleet of adapters are dead, over-ranked or spiked, or have a norm far from the median
in robust standard deviations; near-duplicates have a large cosine or share their column spaces.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc, ndtr, ndtri, stdtr, stdtrit

Array = NDArray[np.float64]

# Number of permutations: enough to distinguish p = 0.05 from 0.06, in milliseconds.
PERMUTATIONS = 9999


def spearman(
    x: Sequence[float], y: Sequence[float], groups: Sequence[Hashable] | None = None
) -> float | None:
    """Return Spearman's ρ: Pearson's correlation of the ranks, with mean ranks for ties.

    Args:
        x: Scores.
        y: Other scores of the same items.
        groups: Compare items only within a group: ranks are within the group, minus their mean;
            None for one group.

    Returns:
        ρ in [−1, 1]; None if all ranks of one side are equal (within every group).

    Example:
        >>> round(spearman([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]), 6)
        0.8
    """
    return _correlate(_rank_within_groups(x, groups), _rank_within_groups(y, groups))


def p_value(
    x: Sequence[float], y: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> float | None:
    """Return the fraction of random pairings with a ρ at least as far from zero: a two-sided
    permutation test.

    Items are assumed exchangeable (within their group), which holds only roughly for layers of one
    model.

    Args:
        x: Scores.
        y: Other scores of the same items.
        groups: Rank and permute only within a group; None for one group.
        seed: Seed of the permutations.

    Returns:
        p in (0, 1]; None if all ranks of one side are equal (within every group).

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
    members = [
        np.array([i for i, label in enumerate(labels) if label == group])
        for group in dict.fromkeys(labels)
    ]
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    shuffled, as_far = second.copy(), 0
    for _ in range(PERMUTATIONS):
        for indices in members:
            shuffled[indices] = second[random.permutation(indices)]
        as_far += abs(float(first @ shuffled)) >= (abs(correlation) - 1e-12) * norm
    return (as_far + 1) / (PERMUTATIONS + 1)


def spearman_interval(rho: float, n: int) -> tuple[float, float] | None:
    """Return the 95% interval of Spearman's ρ: tanh(artanh ρ ± 1.96·√((1 + ρ²/2)/(n − 3))).

    Args:
        rho: ρ.
        n: Number of ranked items, assumed independent.

    Returns:
        Both ends; None for fewer than five items, or |ρ| = 1.

    Reference: Bonett and Wright 2000, "Sample size requirements for estimating Pearson, Kendall and
    Spearman correlations", equation 3.

    Example:
        >>> [round(end, 2) for end in spearman_interval(0.5, 28)]
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
    """Return ⟨x, y⟩/(‖x‖‖y‖) in [−1, 1]; None if either is zero."""
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return min(1.0, max(-1.0, float(x @ y) / norm)) if norm else None


# Fewest sequences of a text whose losses are reported without a warning: errors of fewer have at
# most 3.75 degrees of freedom. Also the fewest of which one half chooses among models, and the
# other half reports the loss of the chosen one: the lowest of several losses is the lowest partly
# by chance.
MIN_SEQUENCES = 8
# Each limit of an interval holds with this confidence, so that a statement read from one limit is
# wrong in 5% at most.
LEVEL = 0.95
# Power of a planned number of runs, if the true difference is the observed one.
POWER = 0.8
# Maximum number of runs that is recommended.
MAX_RUNS = 1000


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate whose error follows Student's t.

    Args:
        value: The estimate.
        error: Its standard error.
        freedom: Degrees of freedom of ``error``.
    """

    value: float
    error: float
    freedom: float

    def half(self, level: float = LEVEL) -> float:
        """Return t(level; ν)·error: each of the limits ``value ± half`` holds with confidence
        ``level``.
        """
        return float(stdtrit(self.freedom, level)) * self.error

    def confidence_below(self, limit: float) -> float:
        """Return the one-sided confidence in [0, 1] that the true value is below a limit: 1 − p of
        the t test.

        Example:
            >>> round(Estimate(1.0, 0.5, 2).confidence_below(1.0 + 2.92 * 0.5), 3)
            0.95
        """
        if self.error == 0:
            return 0.5 if self.value == limit else float(self.value < limit)
        return float(stdtr(self.freedom, (limit - self.value) / self.error))


def errors_needed(freedom: float) -> float:
    """Return the number of standard errors of a significant difference: t(Φ(2); ν).

    That is two standard errors (95.4% two-sided) if the error is known well, and more if it has few
    degrees of freedom.

    Example:
        >>> [round(errors_needed(freedom), 2) for freedom in (1, 2, 10, 1e9)]
        [13.97, 4.53, 2.28, 2.0]
    """
    return float(stdtrit(freedom, float(ndtr(2.0))))


def paired_half(
    error: float | None, sequences: int | None, comparisons: int | None = None
) -> float | None:
    """Return the absolute value beyond which a paired difference is significant; None without an
    error.

    That is two standard errors (``errors_needed``), or where several models are compared with one,
    t(1 − 0.05/2K; ν)·error: 95% for all K of them together (Bonferroni).

    Args:
        error: Standard error of the difference by ``paired_difference``.
        sequences: Number of sequences; None if unknown, as in files of earlier versions: two
            standard errors.
        comparisons: K; None for a difference that is the only one.

    Example:
        >>> round(paired_half(0.1, 2), 2), paired_half(0.1, None)
        (1.4, 0.2)
    """
    if error is None:
        return None
    if not sequences:
        return 2.0 * error
    freedom = degrees_of_freedom(sequences)
    if comparisons is None:
        return errors_needed(freedom) * error
    return Estimate(0.0, error, freedom).half(1 - 0.05 / 2 / comparisons)


def blocked_variance(cells: Sequence[Mapping[int, float]]) -> tuple[float, int]:
    """Return the residual variance of runs paired by seed, pooled over groups, and its degrees of
    freedom.

    The model is loss = group + seed + error with one variance of the errors (randomised blocks);
    effects of a seed common to all groups are removed. With every seed in every one of K groups the
    degrees of freedom are (K − 1)(n − 1); for two groups the variance is half that of the paired
    differences, as in the paired t test. Without degrees of freedom the variance is 0.

    Args:
        cells: One mapping of seed to loss for each group; seeds may be missing.

    Example:
        >>> blocked_variance([{0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.7}])[1]
        1
        >>> round(
        ...     blocked_variance([{0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.7}])[0], 4
        ... )  # variance of 0.5 and 0.7, halved
        0.01
    """
    ordered = sorted({seed for cell in cells for seed in cell})
    seeds = {seed: position for position, seed in enumerate(ordered)}
    runs = [
        (group, seeds[seed], loss)
        for group, cell in enumerate(cells)
        for seed, loss in cell.items()
    ]
    design = np.zeros((len(runs), len(cells) + len(seeds)))
    for row, (group, seed, _) in enumerate(runs):
        design[row, group] = design[row, len(cells) + seed] = 1.0
    losses = np.array([loss for _, _, loss in runs])
    fitted, _, rank, _ = np.linalg.lstsq(design, losses, rcond=None)
    freedom = len(runs) - int(rank)
    spread = float(((losses - design @ fitted) ** 2).sum())
    return (spread / freedom if freedom else 0.0), freedom


def variance_within(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Return the variance within groups, pooled over them, and its degrees of freedom Σ(n − 1); (0,
    0) without any.

    Example:
        >>> variance_within([(1.0, 2.0), (3.0,), (5.0, 5.0, 5.0)])
        (0.16666666666666666, 3)
    """
    freedom = sum(len(group) - 1 for group in groups)
    spread = math.fsum(
        (value - math.fsum(group) / len(group)) ** 2 for group in groups for value in group
    )
    return (spread / freedom if freedom else 0.0), freedom


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line through losses of runs that are paired by seed.

    Args:
        slope: Change of the loss per unit of x, with its standard error from the residuals.
        spread: Standard deviation of the residuals.
        lack: p-value of the F test of the residuals against the spread of runs at the same x: small
            where the line does not fit; None without such a spread.
    """

    slope: Estimate
    spread: float
    lack: float | None


def fit_line(xs: Sequence[float], cells: Sequence[Mapping[int, float]]) -> Line | None:
    """Fit loss = seed + slope·x + error by least squares; None for fewer than three x, or without
    degrees of freedom.

    Args:
        xs: x of each cell.
        cells: Losses by seed at each x; seeds may be missing.

    Reference: Draper and Smith 1998, Applied Regression Analysis, section 2.1 (lack of fit).

    Example:
        >>> found = fit_line(
        ...     [0.0, 1.0, 2.0], [{0: 3.0, 1: 4.0}, {0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}]
        ... )
        >>> round(found.slope.value, 6), found.slope.freedom
        (-1.0, 3)
    """
    ordered = dict.fromkeys(seed for cell in cells for seed in cell)
    seeds = {seed: position for position, seed in enumerate(ordered)}
    runs = [
        (x, seeds[seed], loss)
        for x, cell in zip(xs, cells, strict=True)
        for seed, loss in cell.items()
    ]
    freedom = len(runs) - len(seeds) - 1
    if len(set(xs)) < 3 or freedom < 1:
        return None
    design = np.zeros((len(runs), len(seeds) + 1))
    for row, (x, seed, _) in enumerate(runs):
        design[row, 0] = x
        design[row, 1 + seed] = 1.0
    losses = np.array([loss for _, _, loss in runs])
    fitted, _, rank, _ = np.linalg.lstsq(design, losses, rcond=None)
    if rank < design.shape[1]:
        return None
    squares = float(((losses - design @ fitted) ** 2).sum())
    error = math.sqrt(squares / freedom * float(np.linalg.inv(design.T @ design)[0, 0]))
    pure, pure_freedom = blocked_variance(cells)
    lack, extra = None, freedom - pure_freedom
    if pure > 0 and pure_freedom and extra > 0:
        lack = float(
            fdtrc(extra, pure_freedom, max(0.0, squares - pure * pure_freedom) / extra / pure)
        )
    return Line(Estimate(float(fitted[0]), error, freedom), math.sqrt(squares / freedom), lack)


def welch_error(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Return the standard error of a difference of two means and its degrees of freedom.

    √(v + w) and (v + w)²/(v²/ν + w²/ω), for variances of the means (v, ν) and (w, ω).

    Args:
        first: v, the variance of the first mean, and ν, its degrees of freedom; v + w > 0.
        second: w and ω.

    Example:
        >>> error, freedom = welch_error((0.02, 3), (0.02, 3))
        >>> round(error, 3), round(freedom, 6)
        (0.2, 6.0)
    """
    total = first[0] + second[0]
    return math.sqrt(total), total**2 / (first[0] ** 2 / first[1] + second[0] ** 2 / second[1])


def runs_needed(
    distance: float, error: float, groups: int, fixed: float = 0.0, level: float = LEVEL
) -> int | None:
    """Estimate the number of runs of each group needed to decide on which side of a limit an
    estimate lies.

    That is the smallest n ≥ 2 with (t(level; ν) + t(0.8; ν))·√(error²/n + fixed²) ≤ |distance|,
    where ν = max(1, groups·(n − 1)).

    Args:
        distance: Observed distance from the estimate to the limit.
        error: Standard error of the estimate from one run of each group.
        groups: Degrees of freedom that a further run adds.
        fixed: The part of the standard error that more runs do not change.
        level: Confidence of the limit.

    Returns:
        The number; None if more than ``MAX_RUNS`` are needed.

    Example:
        >>> runs_needed(1.0, 1.0, 2), runs_needed(0.0, 1.0, 2)
        (8, None)
    """

    def decides(n: int) -> bool:
        freedom = max(1, groups * (n - 1))
        quantiles = float(stdtrit(freedom, level)) + float(stdtrit(freedom, POWER))
        return quantiles * math.sqrt(error**2 / n + fixed**2) <= abs(distance)

    if not decides(MAX_RUNS):
        return None
    low, high = 1, MAX_RUNS  # one run has no spread, so 1 is never tried; decides() is monotonic
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high


def paired_difference(
    first: Sequence[float], second: Sequence[float], counts: Sequence[int]
) -> tuple[float, float | None]:
    """Return the difference of two losses on the same sequences, and its standard error (ratio
    estimator).

    Sequences that are close in a text are not independent, so the error is that of overlapping
    blocks of ⌊√N⌋ consecutive ones. It allows for dependence within a block, and has the
    expectation of the usual formula if there is none.

    Args:
        first: Summed negative log-likelihood of each sequence, in the order of the text.
        second: Likewise.
        counts: Predictions of each.

    Returns:
        Σd_i/Σn_i, and √(N/b · N/(N − b) · mean_j S_j²)/Σn_i, where S_j are the sums of b
            consecutive d_i − g·n_i; None
        for N = 1.

    References: Cochran 1977, Sampling Techniques, section 2.11; Meketon and Schmeiser 1984,
    "Overlapping batch means: something for nothing?"; Flegal and Jones 2010, "Batch means and
    spectral variance estimators" (blocks of √N).

    Example:
        >>> paired_difference([3.0, 5.0], [2.0, 2.0], [2, 2])
        (1.0, 0.5)
    """
    differences = np.subtract(first, second)
    gap = float(differences.sum() / np.sum(counts))
    errors = paired_errors(differences[:, None], counts)
    return gap, None if errors is None else float(errors[0])


def paired_errors(differences: Array, counts: Sequence[int]) -> Array | None:
    """Return the standard errors of ``paired_difference`` for each column; None for N = 1.

    Args:
        differences: d_i of every sequence, ``(N, k)``.
        counts: n_i.

    Example:
        >>> paired_errors(np.array([[1.0, 2.0], [3.0, 2.0]]), [2, 2])
        array([0.5, 0. ])
    """
    n = np.asarray(counts, dtype=np.float64)[:, None]
    count = len(n)
    if count < 2:
        return None
    size = math.isqrt(count)
    residuals = differences - differences.sum(0) / n.sum() * n
    sums = np.cumsum(np.pad(residuals, ((1, 0), (0, 0))), axis=0)
    spread = np.mean((sums[size:] - sums[:-size]) ** 2, axis=0)
    errors: Array = np.sqrt(count / size * count / (count - size) * spread) / n.sum()
    return errors


def paired_ratio(
    parts: Array, wholes: Array, counts: Sequence[int]
) -> tuple[float | None, float | None]:
    """Return Σ parts / Σ wholes over sequences, and its standard error by that of Σ(parts − ratio ·
    wholes); None for Σ wholes = 0, no error for N = 1.

    Args:
        parts: A value of every sequence, summed over its predictions, ``(N,)``.
        wholes: Another one, likewise.
        counts: n_i.

    Reference: Cochran 1977, Sampling Techniques, section 2.11 (ratio estimator).

    Example:
        >>> paired_ratio(np.array([1.0, 2.0]), np.array([2.0, 2.0]), [1, 1])
        (0.75, 0.25)
    """
    whole = float(wholes.sum())
    if not whole:
        return None, None
    ratio = float(parts.sum()) / whole
    errors = paired_errors((parts - ratio * wholes)[:, None], counts)
    return ratio, None if errors is None else float(errors[0]) * sum(counts) / abs(whole)


def degrees_of_freedom(count: int) -> float:
    """Return the degrees of freedom of the standard error of ``paired_difference`` over so many
    sequences.

    1.5 times those of blocks that do not overlap (Meketon and Schmeiser 1984); N − 1 below four
    sequences, whose blocks have one each.

    Example:
        >>> degrees_of_freedom(3), degrees_of_freedom(100)
        (2, 13.5)
    """
    size = math.isqrt(count)
    return count - 1 if size == 1 else 1.5 * (count / size - 1)


# |cosine| from which two updates are the same, and nearly the same; overlap from which two column
# spaces are the same.
MIN_SAME_COSINE, MIN_NEAR_COSINE, MIN_SPACE_OVERLAP = 0.999, 0.95, 0.9

# An adapter is over-ranked if 99% of its energy needs at most this fraction of its rank; and spiked
# if one direction holds at least this fraction.
OVER_RANKED_BELOW, SPIKED_FROM = 0.5, 0.9

# A norm is an outlier if it differs from the median of the logarithms by this many robust standard
# deviations, and by a factor of two.
DEVIATIONS, FACTOR = 3.5, 2.0
_TO_SIGMA = 1.4826

OutlierKind = Literal["dead", "over-ranked", "spiked", "norm"]


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Two near-duplicate adapters.

    Args:
        first: Index of the first adapter.
        second: Index of the second adapter.
        cosine: Estimated cosine of their updates.
        overlap: Estimated overlap of their column spaces.
        relation: ``same``, ``near`` (nearly the same) or ``space`` (another update in the same
            column spaces).
    """

    first: int
    second: int
    cosine: float
    overlap: float
    relation: str


def find_near_duplicates(
    updates: Sequence[Sequence[float]], spaces: Sequence[Sequence[float]]
) -> list[NearDuplicate]:
    """Return the pairs of near-duplicates, those with the largest |cosine| first.

    Args:
        updates: Sketches of the updates, one per adapter.
        spaces: Sketches of the column spaces, likewise.

    Example:
        >>> pairs = find_near_duplicates([[1, 0], [2, 0], [0, 1]], [[1, 0], [1, 0], [0, 1]])
        >>> [(pair.first, pair.second, pair.relation) for pair in pairs]
        [(0, 1, 'same')]
    """
    if len(updates) < 2:
        return []
    cosines, overlaps = (
        _compute_cosines(np.asarray(rows, dtype=np.float64)) for rows in (updates, spaces)
    )
    similar = (np.abs(cosines) >= MIN_NEAR_COSINE) | (overlaps >= MIN_SPACE_OVERLAP)
    pairs = []
    for i, j in zip(*np.nonzero(np.triu(similar, 1)), strict=True):
        cosine = float(cosines[i, j])
        relation = "space"
        if abs(cosine) >= MIN_SAME_COSINE:
            relation = "same"
        elif abs(cosine) >= MIN_NEAR_COSINE:
            relation = "near"
        pairs.append(NearDuplicate(int(i), int(j), cosine, float(overlaps[i, j]), relation))
    return sorted(pairs, key=lambda pair: (-abs(pair.cosine), pair.first, pair.second))


def _compute_cosines(
    rows: np.ndarray[tuple[int, int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return the cosine of every pair of rows; 0 with a row of zeros."""
    norms = np.linalg.norm(rows, axis=1)
    unit = rows / np.where(norms > 0, norms, 1.0)[:, None]
    return np.clip(unit @ unit.T, -1.0, 1.0)


def find_norm_outliers(norms: Sequence[float]) -> list[float | None]:
    """Return the ratio to the median of each outlying norm, else None; zeros are ignored, and three
    others needed.

    Example:
        >>> find_norm_outliers([1.0, 1.1, 0.9, 1.0, 30.0, 0.0])
        [None, None, None, None, 30.0, None]
    """
    logs = [math.log(norm) for norm in norms if norm > 0]
    if len(logs) < 3:
        return [None] * len(norms)
    middle = float(np.median(logs))
    spread = _TO_SIGMA * float(np.median(np.abs(np.array(logs) - middle)))
    limit = max(DEVIATIONS * spread, math.log(FACTOR))
    return [
        round(math.exp(math.log(norm) - middle), 6)
        if norm > 0 and abs(math.log(norm) - middle) > limit
        else None
        for norm in norms
    ]


def find_outlier_kinds(adapters: Sequence[Any]) -> list[tuple[OutlierKind, ...]]:
    """Return the properties by which each adapter is an outlier.

    Args:
        adapters: Records ``Fleet``: ``dead``, the number of zero updates; ``rank``, ``fro``;
            ``used``, the fraction of the rank that 99% of the energy needs; and ``spike``, the
            fraction in the largest direction of every layer.
    """
    ratios = find_norm_outliers([adapter.fro for adapter in adapters])
    kinds_by_adapter = []
    for adapter, ratio in zip(adapters, ratios, strict=True):
        kinds: dict[OutlierKind, bool] = {
            "dead": adapter.dead > 0,
            "over-ranked": adapter.used is not None
            and adapter.fro > 0
            and adapter.used <= OVER_RANKED_BELOW,
            "spiked": adapter.spike is not None
            and adapter.spike >= SPIKED_FROM
            and adapter.rank != 1,
            "norm": ratio is not None,
        }
        kinds_by_adapter.append(tuple(kind for kind, holds in kinds.items() if holds))
    return kinds_by_adapter


def order_by_rarity(kinds_of: Sequence[tuple[OutlierKind, ...]]) -> list[int]:
    """Return the indices of outliers, those with the rarest properties first.

    Example:
        >>> order_by_rarity([("spiked",), (), ("spiked", "over-ranked"), ("spiked",), ("dead",)])
        [2, 4, 0, 3]
    """
    counts = Counter(kind for kinds in kinds_of for kind in kinds)
    outliers = [i for i, kinds in enumerate(kinds_of) if kinds]
    return sorted(
        outliers, key=lambda i: (min(counts[kind] for kind in kinds_of[i]), -len(kinds_of[i]), i)
    )
