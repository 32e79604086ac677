"""The plan of a search: its cost counted by a simulation, its time limit kept, its
omissions named.
"""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.errors import UsageError
from lora_diag.running.amounts import read_time
from lora_diag.tuning import FEATURE
from lora_diag.tuning.planning import (
    MARGIN,
    TIMES,
    WHOLE_SEARCH,
    bound_sequential_runs,
    extend_plan,
    fit_plan,
    halve_rates,
    list_stages,
    ranks_within,
    seconds_of,
)
from lora_diag.tuning.record import TunePlan
from tests.messages import assert_names, raises_naming


def make_plan(
    ranks=(1, 4, 16),
    rates=(1e-4, 3e-4, 1e-3, 3e-3),
    steps=100,
    repeats=3,
    widen=1,
    times=(0.1, 1.0, 0.3),
):
    """A plan without omissions; ``times`` are seconds of a step, an evaluation and a step of full
    fine-tuning.
    """
    step, evaluation, full_step = times
    return TunePlan(
        budget=0, per_rank=1, largest=64, tokens=0, rules={}, ranks=ranks, rates=rates, steps=steps, repeats=repeats,
        widen=widen, full=True, step_seconds=step, full_step_seconds=full_step, evaluation_seconds=evaluation,
        seconds=0, limit=None, left_out=(), stages=(), **WHOLE_SEARCH,
    )  # fmt: skip


def some_of(values):
    return st.lists(st.sampled_from(values), min_size=1, max_size=5, unique=True).map(
        lambda some: tuple(sorted(some))
    )


plans = st.builds(
    make_plan,
    ranks=some_of([1, 2, 4, 8, 16, 64]),
    rates=some_of([1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
    steps=st.integers(10, 400),
    repeats=st.integers(1, 6),
    widen=st.integers(0, 2),
    times=st.tuples(st.floats(1e-3, 10), st.floats(0, 60), st.floats(1e-3, 30)),
)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 5))
def test_concurrent_rounds_take_planned_time(rounds, slots):
    taken = sum(-(-runs // slots) for runs in rounds)
    planned = bound_sequential_runs(sum(rounds), len(rounds), slots)
    assert taken <= planned <= sum(rounds)
    assert slots > 1 or planned == taken


def test_stage_cost_equals_sum_of_runs():
    """By hand: a run takes 11 s, one of full fine-tuning 31 s; at each rank 4 + 1 rates and 2 seeds
    more.
    """
    result = {stage.name: (stage.runs, stage.seconds) for stage in list_stages(make_plan())}
    assert result["ranks"] == (3 * 7, pytest.approx(21 * 11))
    assert result["seeds"] == (9, pytest.approx(99))
    assert result["finer"] == (7, pytest.approx(77))
    assert result["full"] == (7, pytest.approx(7 * 31))
    assert result["redistribution"] == (5, pytest.approx(55))
    assert result["trials"] == (6, pytest.approx(66))
    assert "rates" not in result
    assert seconds_of(make_plan()) == pytest.approx(
        MARGIN * sum(seconds for _, seconds in result.values())
    )


@given(plans, st.floats(0.01, 1.2))
def test_fitted_plan_keeps_limit_or_is_refused(plan, share):
    limit = share * seconds_of(plan)
    try:
        result = fit_plan(plan, limit)
    except UsageError:
        return
    assert seconds_of(result) == result.seconds <= limit == result.limit
    assert result.stages == list_stages(result)
    assert bool(result.left_out) == (seconds_of(result) < seconds_of(plan))
    assert set(result.ranks) <= set(plan.ranks)
    assert {plan.ranks[0], plan.ranks[-1]} <= set(result.ranks)
    assert result.repeats >= min(plan.repeats, 2)


def test_less_time_omits_more_in_fixed_order():
    assert fit_plan(make_plan(), None).left_out == ()
    whole = seconds_of(make_plan())
    given_up = [fit_plan(make_plan(), share * whole).left_out for share in (1, 0.7, 0.4, 0.2, 0.1)]
    assert given_up[0] == ()
    assert given_up[1][0].startswith("learning rates: all but two")
    assert "non-uniform ranks" not in given_up[2]
    assert any("steps" in what for what in given_up[4])
    others = [[what for what in left_out if "of the steps" not in what] for left_out in given_up]
    for less, more in pairwise(others):
        assert less == more[: len(less)]


def test_refusal_names_longest_sequences_that_fit():
    """By hand: a half of the length takes a half of the time. The options are taken from the
    message, and their search fits; with twice their length none does.
    """
    plan = make_plan(steps=200).model_copy(update={"length": 512, "sequences": 8})
    smallest = fit_plan(plan, 0.3 * seconds_of(plan))
    limit = 0.2 * seconds_of(plan.model_copy(update={"ranks": (1, 16), "steps": 5, **SMALL}))
    with pytest.raises(UsageError, match="smallest search") as caught:
        fit_plan(plan, limit)
    given = dict(re.findall(r"--([a-z-]+) ([\d,]+)(?= |$)", str(caught.value)))
    assert "--no-full" in str(caught.value)
    length = int(given["length"])
    options = {
        "ranks": tuple(map(int, given["ranks"].split(","))),
        "steps": int(given["steps"]),
        "full": False,
    }
    assert (given["max-sequences"], smallest.length) == ("8", 512)
    assert fit_plan(scale(plan, length).model_copy(update=options), limit).limit == limit
    longer = scale(plan, 2 * length).model_copy(update={"length": 0})
    with pytest.raises(UsageError, match="smallest search") as caught:
        fit_plan(longer, limit)
    assert "--length" not in str(caught.value)


# Fields of a plan without what a time limit omits.
SMALL = {"full": False, "widen": 0, "repeats": 2, "more_seeds": False, "finer": False}
SMALL |= {"redistribute": False, "trials": 0, "halving": True}


def scale(plan, length):
    """A plan of shorter sequences."""
    share = length / plan.length
    times = {name: share * getattr(plan, name) for name in TIMES}
    return plan.model_copy(update={**times, "length": length})


def test_halving_keeps_the_best_rate_of_every_rank():
    """An oracle: losses are parabolas in log rate with their own best rate at each rank."""
    rates = (1e-4, 3e-4, 1e-3, 3e-3)
    losses = {
        (rank, rate): (i - best) ** 2
        for rank, best in ((1, 3), (16, 1))
        for i, rate in enumerate(rates)
    }
    assert halve_rates(losses) == (3e-4, 3e-3)
    assert halve_rates({**losses, (1, 3e-3): None}) == (
        3e-4,
        1e-3,
    )  # the best run diverged, so the next one continues
    assert halve_rates({}) == ()


@pytest.mark.parametrize("words", ["", "2", "h", "2 weeks", "-1h", "0s", "1h 2x"])
def test_invalid_time_is_refused(words):
    with pytest.raises(UsageError, match="--time"):
        read_time(words)


def test_more_time_restores_omitted_stages():
    """By hand: of a plan that gave up ranks, rates beyond the grid, full fine-tuning and half of
    the steps.
    """
    options = {"ranks": (), "lr": (1e-3, 1e-2), "repeats": 3, "widen": 1, "no_full": False}
    omitted = {"limit": 60.0, "full": False, "left_out": ("every second rank", "half of the steps")}
    plan = make_plan((1, 64), (1e-3, 1e-2), 50, widen=0).model_copy(update=omitted)
    result = extend_plan(plan, options, 36_000.0, 1)
    assert (result.ranks, result.steps, result.full, result.widen, result.repeats) == (
        (1, 4, 16, 64),
        50,
        True,
        1,
        3,
    )
    assert (result.left_out, result.limit) == (("half of the steps",), 36_000)
    options["no_full"] = True
    assert not extend_plan(plan, options, 36_000.0, 1).full
    with raises_naming(UsageError, "without", "limit"):
        extend_plan(plan.model_copy(update={"limit": None}), options, 36_000.0, 1)


def test_help_names_ranks_of_small_budgets():
    (command,) = FEATURE.commands
    assert_names(command.notes, "fourth", *ranks_within(3))
