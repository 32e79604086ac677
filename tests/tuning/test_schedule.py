"""The plan of a search: its cost counted by a simulation, its time limit kept, its omissions named."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.errors import UsageError
from lora_diag.running.amounts import read_time
from lora_diag.tuning.planning import MARGIN, Costs, Search, halve_rates, list_stages, narrow_search, seconds_of

FULL = Search((1, 4, 16), (1e-4, 3e-4, 1e-3, 3e-3), 100, 3)
COSTS = Costs(step=0.1, evaluation=1.0, full_step=0.3)

searches = st.builds(
    Search,
    ranks=st.lists(st.sampled_from([1, 2, 4, 8, 16, 64]), min_size=1, max_size=5, unique=True).map(
        lambda ranks: tuple(sorted(ranks))
    ),
    rates=st.lists(st.sampled_from([1e-4, 3e-4, 1e-3, 3e-3, 1e-2]), min_size=1, max_size=5, unique=True).map(
        lambda rates: tuple(sorted(rates))
    ),
    steps=st.integers(10, 400),
    repeats=st.integers(1, 6),
    widen=st.integers(0, 2),
)
costs = st.builds(Costs, step=st.floats(1e-3, 10), evaluation=st.floats(0, 60), full_step=st.floats(1e-3, 30))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 5))
def test_concurrent_rounds_take_planned_time(rounds, slots):
    taken = sum(-(-runs // slots) for runs in rounds)
    planned = Costs(1.0, 0.0, slots=slots).seconds(sum(rounds), 1.0, len(rounds))
    assert taken <= planned <= sum(rounds)
    assert slots > 1 or planned == taken


def test_stage_cost_equals_sum_of_runs():
    """By hand: a run takes 11 s, one of full fine-tuning 31 s; at each rank 4 + 1 rates and 2 seeds more."""
    result = {stage.name: (stage.runs, stage.seconds) for stage in list_stages(FULL, COSTS)}
    assert result["ranks"] == (3 * 7, pytest.approx(21 * 11))
    assert result["seeds"] == (9, pytest.approx(99))
    assert result["finer"] == (7, pytest.approx(77))
    assert result["full"] == (7, pytest.approx(7 * 31))
    assert result["redistribution"] == (6, pytest.approx(66 + 2.5))
    assert result["trials"] == (6, pytest.approx(66))
    assert seconds_of(FULL, COSTS) == pytest.approx(MARGIN * sum(seconds for _, seconds in result.values()))


@given(searches, costs, st.floats(0.01, 1.2))
def test_narrowed_search_keeps_limit_or_is_refused(search, costs, share):
    limit = share * seconds_of(search, costs)
    try:
        result, left_out = narrow_search(search, costs, limit)
    except UsageError:
        return
    assert seconds_of(result, costs) <= limit
    assert bool(left_out) == (result != search)
    assert set(result.ranks) <= set(search.ranks)
    assert {search.ranks[0], search.ranks[-1]} <= set(result.ranks)
    assert result.repeats >= min(search.repeats, 2)


def test_without_a_limit_nothing_is_left_out():
    assert narrow_search(FULL, COSTS, None) == (FULL, ())


def test_less_time_omits_more_in_fixed_order():
    whole = seconds_of(FULL, COSTS)
    given_up = [narrow_search(FULL, COSTS, share * whole)[1] for share in (1, 0.7, 0.4, 0.2, 0.1)]
    assert given_up[0] == ()
    assert given_up[1][0].startswith("learning rates: all but two")
    assert "non-uniform ranks" not in given_up[2]
    assert any("steps" in what for what in given_up[4])
    for less, more in pairwise(given_up):
        assert [what for what in less if "of the steps" not in what] == [
            what for what in more if "of the steps" not in what
        ][: len([what for what in less if "of the steps" not in what])]


def test_halving_keeps_the_best_rate_of_every_rank():
    """An oracle: losses are parabolas in log rate with their own best rate at each rank."""
    rates = (1e-4, 3e-4, 1e-3, 3e-3)
    losses = {(rank, rate): (i - best) ** 2 for rank, best in ((1, 3), (16, 1)) for i, rate in enumerate(rates)}
    assert halve_rates(losses) == (3e-4, 3e-3)
    assert halve_rates({**losses, (1, 3e-3): None}) == (3e-4, 1e-3)  # the best run diverged, so the next one continues
    assert halve_rates({}) == ()


@pytest.mark.parametrize("words", ["", "2", "h", "2 weeks", "-1h", "0s", "1h 2x"])
def test_invalid_time_is_refused(words):
    with pytest.raises(UsageError, match="--time"):
        read_time(words)
