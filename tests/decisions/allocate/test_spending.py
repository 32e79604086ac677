"""The spending of a budget against enumeration: kept ≤ optimum ≤ bound, and the gap is at most one
step.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.decisions.allocate.measure import make_steps, spend

UNITS = st.lists(
    st.tuples(
        st.lists(st.floats(0.01, 10), min_size=1, max_size=4), st.integers(1, 12), st.integers(0, 1)
    ),
    min_size=1,
    max_size=4,
)


def problem(units, step=1):
    """Return steps, and everything that enumeration needs: curves, costs, stops."""
    curves = [
        np.concatenate([[0.0], np.cumsum(sorted(gains, reverse=True))]) for gains, _, _ in units
    ]
    costs = [cost for _, cost, _ in units]
    stops = [
        np.arange(min(start, len(curve) - 1), len(curve), step)
        for curve, (_, _, start) in zip(curves, units, strict=True)
    ]
    return make_steps(curves, costs, stops), (curves, costs, stops)


def totals(curves, costs, stops, ranks):
    """The gain and the cost of ranks above the smallest."""
    gain = sum(g[r] - g[s[0]] for g, r, s in zip(curves, ranks, stops, strict=True))
    return gain, sum((r - s[0]) * c for r, s, c in zip(ranks, stops, costs, strict=True))


def optimum(curves, costs, stops, budget):
    """Try every combination of ranks."""
    tried = [totals(curves, costs, stops, ranks) for ranks in itertools.product(*stops)]
    return max((gain for gain, cost in tried if cost <= budget), default=0.0)


@settings(max_examples=300, deadline=None)
@given(UNITS, st.integers(0, 60), st.sampled_from([1, 2]))
def test_bound_holds_and_gap_is_at_most_one_step(units, budget, step):
    steps, all_records = problem(units, step)
    best = optimum(*all_records, budget)
    result = spend(steps, budget)
    assert result.cost <= budget
    assert best - result.gain <= max(steps.gain, default=0.0) + 1e-9
    assert result.gain <= best + 1e-9 <= result.bound + 2e-9
    if result.optimal:
        assert result.gain == pytest.approx(best, abs=1e-9)
    assert (result.gain, result.cost) == pytest.approx(totals(*all_records, result.ranks.tolist()))


@settings(max_examples=60, deadline=None)
@given(UNITS, st.integers(0, 20))
def test_greedy_is_optimal_for_equal_costs(units, budget):
    """The article's rule for a budget of ranks: the next unit where σ² is largest."""
    steps, all_records = problem([(gains, 1, start) for gains, _, start in units])
    result = spend(steps, budget)
    assert result.gain == pytest.approx(optimum(*all_records, budget), abs=1e-9)
    assert result.gain == pytest.approx(result.bound, abs=1e-9)


def test_price_bounds_gain_of_one_unit():
    curves = [np.array([0.0, 4.0, 6.0]), np.array([0.0, 3.0])]
    steps = make_steps(curves, [2, 3], [np.arange(3), np.arange(2)])
    result = spend(steps, 3)
    assert result.price == 1.0
    assert result.bound == 5.0
    assert spend(steps, 100).price == 0.0


def test_budget_holds_after_step_without_gain():
    # A numerically low-rank adapter: squares of its last values are lost in the sum, and the curve
    # ends at exactly 1.
    curve = np.array([0.0, 0.9, 1 - 1e-10, 1 - 1e-10, 1 - 1e-10, 1.0])
    steps = make_steps([curve], [10], [np.array([0, 2, 4, 5])])
    result = spend(steps, 35)
    assert result.cost == 10 * result.ranks[0] <= 35
    assert result.gain == pytest.approx(curve[result.ranks[0]], abs=1e-12)
