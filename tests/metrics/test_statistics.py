"""Rank correlations, limits and confidences against SciPy, permutations, and the share of wrong
statements.
"""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lora_diag.metrics.statistics import (
    LEVEL,
    MAX_RUNS,
    Estimate,
    blocked_variance,
    degrees_of_freedom,
    fit_line,
    p_value,
    paired_half,
    runs_needed,
    spearman,
    spearman_interval,
    variance_within,
    welch_error,
)

SCORES = st.lists(st.integers(0, 6), min_size=3, max_size=12)


@given(SCORES, st.randoms(use_true_random=False))
def test_rho_equals_scipy(x, random):
    y = [random.randint(0, 6) for _ in x]
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert spearman(x, y) is None
        assert p_value(x, y) is None
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_rho_within_groups_ignores_group_means():
    x, y = [1, 2, 3, 101, 102, 103], [3, 2, 1, 103, 102, 101]
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert spearman(x, y) > 0.5
    assert spearman(x, y, ["a"] * 3 + ["b"] * 3) == pytest.approx(-1)
    ranks = [stats.rankdata(part) - 2 for part in (x[:3], y[:3])]
    assert spearman(x[:3], y[:3]) == pytest.approx(ranks[0] @ ranks[1] / (ranks[0] @ ranks[0]))


@pytest.mark.parametrize("groups", [None, [0, 0, 0, 1, 1, 1]])
def test_p_value_equals_exact_permutation_fraction(groups):
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0, 1.0, 3.0, 6.0, 4.0, 5.0]
    result = abs(spearman(x, y, groups))
    orders = [
        order for order in permutations(range(6)) if groups is None or {*order[:3]} == {0, 1, 2}
    ]
    far = [abs(spearman(x, [y[i] for i in order], groups)) >= result - 1e-12 for order in orders]
    assert p_value(x, y, groups) == pytest.approx(np.mean(far), abs=0.015)


def test_interval_has_stated_coverage():
    """Normal pairs of correlation 0.6 have Spearman's ρ 6/π·asin(0.3)."""
    rng, truth, hits = np.random.default_rng(0), 6 / np.pi * np.arcsin(0.3), 0
    for _ in range(2000):
        x = rng.normal(size=30)
        y = 0.6 * x + 0.8 * rng.normal(size=30)
        low, high = spearman_interval(spearman(x, y), 30)
        hits += low <= truth <= high
    assert 0.93 < hits / 2000 < 0.97


def test_rank_correlation_of_few_items_has_no_interval():
    assert spearman_interval(0.5, 4) is None
    assert spearman_interval(1.0, 30) is None


LOSS = st.floats(0.5, 5.0)


@given(st.lists(st.tuples(LOSS, LOSS), min_size=2, max_size=9))
def test_two_groups_in_blocks_are_paired_t_test(pairs):
    one, two = np.array(pairs).T
    variance, freedom = blocked_variance([dict(enumerate(one)), dict(enumerate(two))])
    assert freedom == len(pairs) - 1
    # of the definition: the residual variance of two groups is half that of the differences
    np.testing.assert_allclose(variance, np.var(one - two, ddof=1) / 2, atol=1e-12)


def test_blocks_equal_two_way_analysis_of_variance():
    losses = (
        np.random.default_rng(0).normal(size=(4, 5)) + np.arange(4)[:, None] + np.arange(5) ** 2
    )
    variance, freedom = blocked_variance([dict(enumerate(row)) for row in losses])
    rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    assert freedom == 12
    np.testing.assert_allclose(variance, (rest**2).sum() / 12)
    # What a seed adds to every group does not count, and a missing run costs one degree of freedom.
    shifted, _ = blocked_variance([dict(enumerate(row + 100 * np.arange(5))) for row in losses])
    np.testing.assert_allclose(shifted, variance)
    assert (
        blocked_variance([dict(enumerate(row)) for row in losses[:3]] + [{0: 1.0, 3: 2.0}])[1] == 9
    )
    assert blocked_variance([{0: 1.0}, {0: 2.0}]) == (0.0, 0)


def test_interval_and_confidence_equal_scipy():
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=5), rng.normal(0.3, 2.0, size=4)
    error, freedom = welch_error((one.var(ddof=1) / 5, 4), (two.var(ddof=1) / 4, 3))
    result = Estimate(one.mean() - two.mean(), error, freedom)
    truth = stats.ttest_ind(one, two, equal_var=False)
    low, high = truth.confidence_interval(2 * LEVEL - 1)
    np.testing.assert_allclose(
        [result.value - result.half(), result.value + result.half()], [low, high]
    )
    less = stats.ttest_ind(one, two, equal_var=False, alternative="less").pvalue
    np.testing.assert_allclose(result.confidence_below(0.0), 1 - less)
    spread, freedom = variance_within([one, two])
    assert freedom == 7
    np.testing.assert_allclose(spread, (one.var(ddof=1) * 4 + two.var(ddof=1) * 3) / 7)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_limit_is_missed_in_one_case_of_twenty(n):
    rng = np.random.default_rng(n)
    missed = 0
    for _ in range(2000):
        losses = rng.normal(size=(3, n)) + rng.normal(
            size=n
        )  # equal means; a seed's own part in all three
        variance, freedom = blocked_variance([dict(enumerate(row)) for row in losses])
        result = Estimate(losses[0].mean() - losses[1].mean(), math.sqrt(2 * variance / n), freedom)
        missed += result.value + result.half() < 0
    assert abs(missed / 2000 - 0.05) < 3.5 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.slow
def test_planned_runs_have_power_80_percent():
    n, rng = runs_needed(0.5, math.sqrt(2), 2), np.random.default_rng(2)
    decided = 0
    for _ in range(1000):
        losses = rng.normal(size=(3, n)) + np.array([[0.0], [0.5], [0.5]])
        variance, freedom = blocked_variance([dict(enumerate(row)) for row in losses])
        result = Estimate(losses[0].mean() - losses[1].mean(), math.sqrt(2 * variance / n), freedom)
        decided += result.value + result.half() < 0
    assert 0.76 < decided / 1000 < 0.86
    assert runs_needed(0.25, math.sqrt(2), 2) > 3 * n
    assert runs_needed(0.5, 2 * math.sqrt(2), 2) > 3 * n
    assert runs_needed(1e-9, 1.0, 2) is None
    assert runs_needed(1.0, 1.0, 2, fixed=0.6) is None  # a part that more runs do not change
    assert 2 <= n <= MAX_RUNS


def test_estimate_without_error_is_sure():
    assert [Estimate(1.0, 0.0, 3).confidence_below(limit) for limit in (0.5, 1.0, 2.0)] == [
        0.0,
        0.5,
        1.0,
    ]


def test_fitted_line_equals_scipy_and_removes_seeds():
    random = np.random.default_rng(0)
    x, y = np.arange(5.0), random.standard_normal(5)
    truth = stats.linregress(x, y)
    found = fit_line(x, [{0: loss} for loss in y])
    assert (found.slope.value, found.slope.error) == pytest.approx((truth.slope, truth.stderr))
    assert (found.slope.freedom, found.lack) == (3, None)
    cells = [
        {seed: y[i] + 10 * seed + 0.1 * random.standard_normal() for seed in range(3)}
        for i in range(5)
    ]
    shifted = [{seed: loss - 10 * seed for seed, loss in cell.items()} for cell in cells]
    mean = [np.mean([*cell.values()]) for cell in shifted]
    assert fit_line(x, cells).slope.value == pytest.approx(stats.linregress(x, mean).slope)
    assert fit_line(x[:2], cells[:2]) is None
    assert fit_line(x[:3], [{0: 1.0}, {1: 2.0}, {2: 3.0}]) is None  # no seed has two ranks


def test_lack_of_fit_is_uniform_for_lines_and_small_for_curves():
    random, x = np.random.default_rng(1), np.arange(5.0)

    def lack(curve):
        cells = [
            {seed: -value + curve * value**2 + random.standard_normal() for seed in range(3)}
            for value in x
        ]
        return fit_line(x, cells).lack

    share = np.mean([lack(0.0) < 0.05 for _ in range(400)])
    assert 0.02 <= share <= 0.09
    assert np.mean([lack(1.0) < 0.05 for _ in range(50)]) > 0.9


def test_paired_half_holds_for_all_comparisons_together():
    freedom = degrees_of_freedom(40)
    for comparisons in (1, 3):
        expected = 0.1 * stats.t.ppf(1 - 0.05 / 2 / comparisons, freedom)
        assert paired_half(0.1, 40, comparisons) == pytest.approx(expected)
    assert paired_half(None, 40, 3) is None
