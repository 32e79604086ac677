"""Limits and confidences against SciPy's t tests, and the share of wrong statements in simulated runs."""

import math

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
    runs_needed,
    variance_within,
    welch_error,
)

LOSS = st.floats(0.5, 5.0)


@given(st.lists(st.tuples(LOSS, LOSS), min_size=2, max_size=9))
def test_two_groups_in_blocks_are_paired_t_test(pairs):
    one, two = np.array(pairs).T
    variance, freedom = blocked_variance([dict(enumerate(one)), dict(enumerate(two))])
    assert freedom == len(pairs) - 1
    # of the definition: the residual variance of two groups is half that of the differences
    np.testing.assert_allclose(variance, np.var(one - two, ddof=1) / 2, atol=1e-12)


def test_blocks_equal_two_way_analysis_of_variance():
    losses = np.random.default_rng(0).normal(size=(4, 5)) + np.arange(4)[:, None] + np.arange(5) ** 2
    variance, freedom = blocked_variance([dict(enumerate(row)) for row in losses])
    rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    assert freedom == 12
    np.testing.assert_allclose(variance, (rest**2).sum() / 12)
    # What a seed adds to every group does not count, and a missing run costs one degree of freedom.
    shifted, _ = blocked_variance([dict(enumerate(row + 100 * np.arange(5))) for row in losses])
    np.testing.assert_allclose(shifted, variance)
    assert blocked_variance([dict(enumerate(row)) for row in losses[:3]] + [{0: 1.0, 3: 2.0}])[1] == 9
    assert blocked_variance([{0: 1.0}, {0: 2.0}]) == (0.0, 0)


def test_interval_and_confidence_equal_scipy():
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=5), rng.normal(0.3, 2.0, size=4)
    error, freedom = welch_error((one.var(ddof=1) / 5, 4), (two.var(ddof=1) / 4, 3))
    result = Estimate(one.mean() - two.mean(), error, freedom)
    truth = stats.ttest_ind(one, two, equal_var=False)
    low, high = truth.confidence_interval(2 * LEVEL - 1)
    np.testing.assert_allclose([result.value - result.half(), result.value + result.half()], [low, high])
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
        losses = rng.normal(size=(3, n)) + rng.normal(size=n)  # equal means; a seed's own part in all three
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
    assert [Estimate(1.0, 0.0, 3).confidence_below(limit) for limit in (0.5, 1.0, 2.0)] == [0.0, 0.5, 1.0]
