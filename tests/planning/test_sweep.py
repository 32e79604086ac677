"""The verdict of a sweep on losses made up so that it is known."""

import pytest
from scipy.stats import ttest_ind

from lora_diag.probes.sweep.verdict import AtRank, best_rates, by_rank, judge, versus
from lora_diag.records import Probe


def rows(*losses):
    return [AtRank(2**i, 1e-3, tuple(each), False) for i, each in enumerate(losses, 2)]


@pytest.mark.parametrize(
    ("losses", "word", "rank"),
    [
        ([(1.001, 1.002), (1.0, 1.001), (1.0, 1.001)], "fast saturation", 4),
        ([(1.5, 1.501), (1.2, 1.201), (1.0, 1.001)], "gradual decline", 16),
        ([(1.5, 1.501), (1.5, 1.501), (1.0, 1.001), (1.0, 1.001)], "gradual decline", 16),
        ([(1.5, 1.501), (1.0, 1.001), (1.0, 1.001), (1.0, 1.001)], "fast saturation", 8),
        ([(1.2, 1.0), (1.1, 1.3), (1.25, 1.05)], "noisy", None),
        ([(2.5, 2.5), (2.6, 2.6)], "no gain", None),
        ([(1.5,), (1.0,)], "no verdict", None),
        ([(1.5, 1.5)], "no verdict", None),
        ([], "no verdict", None),
    ],
)
def test_verdicts(losses, word, rank):
    found = judge(rows(*losses), base=2.0, share=0.02)
    assert (found.word, found.rank) == (word, rank)


def test_the_tolerance_is_never_less_than_what_seeds_can_tell():
    """t(0.975; 2 degrees) = 4.3027; the variance of two values a and b is (a − b)²/2."""
    found = judge(rows((1.0, 1.02), (0.5, 0.52)), base=2.0, share=0.001)
    assert found.noise == pytest.approx(4.302653 * (0.02**2 / 2) ** 0.5, rel=1e-6)
    assert found.tolerance == found.noise
    assert judge(rows((1.0, 1.02), (0.5, 0.52)), base=2.0, share=0.5).tolerance == pytest.approx(0.5 * 1.49)


def record(rank, lr, seed, loss, name="own"):
    return Probe(probe="sweep", set=name, subject="lora", rank=rank, lr=lr, seed=seed, tokens=1, data="", loss=loss)


def test_each_rank_has_the_rate_of_its_lowest_loss_on_the_deciding_set_at_the_first_seed():
    records = [
        record(4, 1e-3, 0, 1.0),
        record(4, 1e-2, 0, 1.5),
        record(8, 1e-3, 0, 1.2),
        record(8, 1e-2, 0, 0.9),
        record(8, 1e-1, 0, None),
        record(8, 1e-3, 0, 0.1, "other"),
        record(4, 1e-2, 1, 0.2),
        record(4, 1e-3, 1, 1.1),
    ]
    rates = best_rates(records, "own", 0)
    assert rates == {4: 1e-3, 8: 1e-2}
    four, eight = by_rank(records, "own", rates)
    assert (four.losses, four.edge) == ((1.0, 1.1), True)
    assert (eight.losses, eight.edge) == ((0.9,), False)


def test_the_edge_of_a_rank_is_that_of_its_own_rates():
    """Beyond the grid only some ranks are tried: a rate that others went past is still their last."""
    records = [record(4, 1e-3, 0, 1.5), record(4, 1e-2, 0, 1.0), record(8, 1e-3, 0, 1.5), record(8, 1e-2, 0, 1.2)]
    records += [record(8, 0.033, 0, 1.0), record(8, 0.11, 0, 1.1)]
    assert [(row.lr, row.edge) for row in by_rank(records, "own", best_rates(records, "own", 0))] == [
        (1e-2, True),
        (0.033, False),
    ]


def test_the_best_rank_is_held_against_a_line_by_welch():
    """As scipy's t-test of unequal variances where there is one rank."""
    line = AtRank(None, 1e-4, (0.91, 0.99, 0.94), False)
    best = (0.90, 0.95, 0.85, 0.93)
    found = versus(rows((1.5,), best), line)
    truth = ttest_ind(best, line.losses, equal_var=False).confidence_interval(0.95)
    assert found.gap - found.noise == pytest.approx(truth.low)
    assert found.gap + found.noise == pytest.approx(truth.high)
    assert found.word == "as good"


@pytest.mark.parametrize(
    ("line", "word"), [((0.5, 0.5), "worse"), ((1.5, 1.5), "better"), ((1.0, 1.0), "as good"), ((0.5,), "no verdict")]
)
def test_what_lora_is_beside_a_line(line, word):
    found = versus(rows((1.3, 1.31), (1.0, 1.01)), AtRank(None, 1e-4, line, False))
    assert (found.word, found.best.rank) == (word, 8)


def test_nothing_is_held_against_a_line_without_ranks():
    assert versus([], AtRank(None, 1e-4, (1.0, 1.1), False)) is None
