"""What a run takes, from rates that a test sets: sums by hand, and the laws that hold for any
machine.
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.decisions.plan.architectures import Matrix
from lora_diag.decisions.plan.cost import estimate_core_seconds, estimate_cost, interpolate_cost
from lora_diag.decisions.plan.record import PlanRates

RATES = PlanRates(
    cores=4, entry=1e-8, product=2e-11, eigen={256: 0.01, 1024: 0.1}, few={1024: 5e-8}, few_from=768
)
orders = st.integers(1, 10**5)


def test_all_values_by_hand():
    matrices = [Matrix("a", (1024, 3000)), Matrix("experts", (256, 512), 8)]
    cost = estimate_cost(matrices, 10**9, RATES, None)
    one = 1e-8 * 1024 * 3000 + 2e-11 * 1024**2 * 3000 + 0.1
    expert = 1e-8 * 256 * 512 + 2e-11 * 256**2 * 512 + 0.01
    assert cost.core_seconds == pytest.approx(one + 8 * expert)
    assert cost.longest == pytest.approx(one / 4)
    assert cost.seconds[1] == pytest.approx((one + 8 * expert) / 4)
    assert (
        cost.seconds[64] == cost.longest
    )  # no number of machines is faster than one on the largest matrix
    assert cost.bytes == 2 * 10**9


def test_few_values_cost_less_only_with_krylov():
    assert estimate_core_seconds(RATES, (1024, 2000), 64) == pytest.approx(
        (1e-8 + 5e-8) * 1024 * 2000
    )
    assert estimate_core_seconds(RATES, (700, 2000), 64) == estimate_core_seconds(
        RATES, (700, 2000), None
    )


@given(
    orders,
    st.dictionaries(st.integers(2, 10**4), st.floats(1e-6, 1e3), min_size=1),
    st.integers(0, 3),
)
def test_cost_is_interpolated_between_orders(order, costs, beyond):
    result = interpolate_cost(costs, order, beyond)
    below, above = [n for n in costs if n <= order], [n for n in costs if n >= order]
    if below and above:
        ends = costs[max(below)], costs[min(above)]
        assert min(ends) * (1 - 1e-9) <= result <= max(ends) * (1 + 1e-9)
    else:
        nearest = min(costs, key=lambda n: abs(n - order))
        assert result == pytest.approx(costs[nearest] * (order / nearest) ** beyond)
    assert math.isfinite(result)


@given(st.lists(st.tuples(orders, orders), min_size=1, max_size=5), st.sampled_from([None, 64]))
def test_speedup_is_between_one_and_machine_count(shapes, top):
    cost = estimate_cost(
        [Matrix(str(i), shape) for i, shape in enumerate(shapes)], None, RATES, top
    )
    times = [cost.seconds[count] for count in sorted(cost.seconds)]
    assert times == sorted(times, reverse=True)
    assert all(
        seconds * count >= cost.seconds[1] * (1 - 1e-9) for count, seconds in cost.seconds.items()
    )
    assert cost.bytes is None
