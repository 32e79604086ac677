"""Conditions: read as written, refused where they could not fail or not be met."""

import contextlib
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.gating.conditions import ConditionError, find, parse

SIGNS = {
    "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}
numbers = st.floats(-1e6, 1e6).map(lambda x: float(f"{x:.6g}"))


@given(st.sampled_from(sorted(SIGNS)), numbers, numbers)
def test_condition_follows_its_operator(sign, limit, value):
    condition = parse(f"epsilon {sign} {limit!r}")
    assert condition.per_layer
    assert condition.test.holds(value) == SIGNS[sign](value, limit)


@given(
    st.lists(numbers, min_size=1, max_size=30),
    st.sampled_from([1, 10, 20, 25, 33, 50, 75, 90, 95, 99]),
)
def test_aggregates_equal_definitions(values, percent):
    wanted = {
        "max": max(values),
        "min": min(values),
        "mean": math.fsum(values) / len(values),
        "median": statistics.median(values),
        "sum": math.fsum(values),
    }
    for word, expected in wanted.items():
        assert parse(f"{word} epsilon <= 1").measure(values) == pytest.approx(
            expected, rel=1e-12, abs=1e-9
        )
    result = parse(f"p{percent} epsilon <= 1").measure(values)
    below = [value for value in values if value <= result]
    assert result in values
    assert 100 * len(below) >= percent * len(values)
    smaller = [value for value in values if value < result]
    assert 100 * len(smaller) < percent * len(values)


@given(st.lists(st.sampled_from(["rank", "scale", "noise"]), min_size=1, max_size=20))
def test_share_of_layers_counts_them(words):
    condition = parse("share of layers with limited_by in (rank, scale) is >= 0.5")
    share = sum(word != "noise" for word in words) / len(words)
    assert condition.measure(words) == share
    assert condition.holds(share) == (share >= 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "write a field"),
        ("epsilon <=", "an operator"),
        ("epsilon <= 3 4", "unexpected '4'"),
        ("epsilon <= 3x", "cannot be parsed"),
        ("epsilon <= nan", "is a number"),
        ("epsilon <= 1e999", "too large"),
        ("epsilom <= 3", "did you mean 'epsilon'"),
        ("rank_at <= 64", "not one value"),
        ("nothing.like.it <= 1", "no record has a field"),
        ("energy.16 >= 1.2", "between 0 and 1"),
        ("energy.16 >= 0", "always true"),
        ("energy.16 > 1", "never true"),
        ("share of layers with energy.16 >= 0.5 >= 0.9", "such as 'is"),
        ("resolution.verdict <= resolved", "==, != or in"),
        ("resolution.verdict == resolvd", "never 'resolvd'"),
        ("resolution.verdict == 1", "is a word"),
        ("resolution.verdict in (resolved, floor-limited, unresolved)", "has no effect"),
        ("max resolution.verdict == resolved", "not a number"),
        ("limited_by in (rank scale)", "after 'in'"),
        ("complete == 1", "true or false"),
        ("p100 epsilon <= 1", "an operator"),
        ("__import__('os').system('x') == 1", "cannot be parsed"),
    ],
)
def test_invalid_policy_is_refused_with_reason(text, message):
    with pytest.raises(ConditionError) as error:
        parse(text)
    assert message in str(error.value), str(error.value)


@given(st.text(max_size=40))
def test_arbitrary_text_is_read_or_refused(text):
    with contextlib.suppress(ConditionError):
        assert find(parse(text).name)
