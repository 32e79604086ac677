"""Rank correlations against SciPy's, and permutation tests against all permutations."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from lora_diag.metrics.statistics import p_value, spearman, spearman_interval

SCORES = st.lists(st.integers(0, 6), min_size=3, max_size=12)


@given(SCORES, st.randoms(use_true_random=False))
def test_rho_equals_scipy(x, random):
    y = [random.randint(0, 6) for _ in x]
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert spearman(x, y) is None
        assert p_value(x, y) is None
    else:
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_rho_within_groups_ignores_group_means():
    x, y = [1, 2, 3, 101, 102, 103], [3, 2, 1, 103, 102, 101]
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(x, y) > 0.5
    assert spearman(x, y, ["a"] * 3 + ["b"] * 3) == pytest.approx(-1)
    ranks = [rankdata(part) - 2 for part in (x[:3], y[:3])]
    assert spearman(x[:3], y[:3]) == pytest.approx(ranks[0] @ ranks[1] / (ranks[0] @ ranks[0]))


@pytest.mark.parametrize("groups", [None, [0, 0, 0, 1, 1, 1]])
def test_p_value_equals_exact_permutation_fraction(groups):
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0, 1.0, 3.0, 6.0, 4.0, 5.0]
    result = abs(spearman(x, y, groups))
    orders = [order for order in permutations(range(6)) if groups is None or {*order[:3]} == {0, 1, 2}]
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
