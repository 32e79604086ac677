"""The verdict of a sweep on losses made up so that it is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lora_diag.probes.sweep.verdict import (
    AtRank,
    best_rates,
    by_rank,
    compare_with_reference,
    find_diverged,
    judge_sweep,
)
from lora_diag.records import Probe


def row(rank, losses, lr=1e-3):
    return AtRank(rank, lr, dict(enumerate(losses)))


def rows(*losses):
    return [row(2**i, each) for i, each in enumerate(losses, 2)]


@pytest.mark.parametrize(
    ("losses", "word", "rank", "answer"),
    [
        ([(1.001, 1.002), (1.0, 1.002), (1.0, 1.001)], "fast saturation", 4, 4),
        ([(1.5, 1.501), (1.2, 1.202), (1.0, 1.001)], "gradual decline", 16, 16),
        ([(1.5, 1.501), (1.5, 1.502), (1.0, 1.001), (1.0, 1.001)], "gradual decline", 16, 16),
        ([(1.5, 1.501), (1.0, 1.002), (1.0, 1.001), (1.0, 1.001)], "fast saturation", 8, 8),
        ([(1.2, 1.0), (1.1, 1.3), (1.25, 1.05)], "not resolved", None, 4),
        ([(1.5, 1.501), (1.03, 1.02), (1.0, 1.015)], "not resolved", 16, 8),
        ([(2.5, 2.5), (2.6, 2.6)], "no gain", None, None),
        ([(1.5,), (1.0,)], "no verdict", None, 8),
        (
            [(1.5, 1.5), (1.0, 1.0)],
            "no verdict",
            None,
            8,
        ),  # runs that no seed changes have no spread, not none at all
        ([(1.5, 1.5)], "no verdict", None, None),
        ([], "no verdict", None, None),
    ],
)
def test_sweep_verdicts(losses, word, rank, answer):
    result = judge_sweep(rows(*losses), base=2.0, share=0.02)
    assert (result.outcome, result.rank, result.answer) == (word, rank, answer)


def test_standing_is_paired_t_test_against_margin():
    """Two ranks: θ of the pair by its definition, seed by seed, with SciPy's t test of
    one sample.
    """
    four, eight, base, share = np.array([1.02, 1.05, 1.00]), np.array([1.00, 1.01, 0.99]), 2.0, 0.1
    result = judge_sweep(rows(four, eight), base, share).standings[0]
    theta = four.mean() - (1 - share) * eight.mean() - share * base
    paired = np.var(four - eight, ddof=1) / 2
    plain = (np.var(four, ddof=1) + np.var(eight, ddof=1)) / 2
    error = math.sqrt((paired * (1 + (1 - share) ** 2) + share**2 * max(0, plain - paired)) / 3)
    assert result.confidence == pytest.approx(stats.t(2).cdf(-theta / error))
    assert result.behind == pytest.approx((four - eight).mean())
    span = stats.ttest_rel(four, eight).confidence_interval(0.9)
    assert (result.behind - result.half, result.behind + result.half) == pytest.approx(
        (span.low, span.high)
    )
    assert result.share == pytest.approx(result.behind / 1.0)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(1.0, 30.0))
def test_more_seed_noise_never_makes_rank_sufficient(seed, times):
    """The same means, with every seed further from them: what was not shown is not shown now, and
    no margin grows.
    """
    rng = np.random.default_rng(seed)
    means, noise = 1 + 0.05 * rng.random((4, 1)), 0.005 * rng.normal(size=(4, 3))
    noise -= noise.mean(1, keepdims=True)
    quiet, loud = (
        judge_sweep(rows(*(means + factor * noise)), 2.0, 0.02) for factor in (1.0, times)
    )
    assert loud.tolerance == pytest.approx(quiet.tolerance)
    for before, after in zip(quiet.standings, loud.standings, strict=True):
        assert before.enough == "yes" or after.enough != "yes"
    assert quiet.rank is not None or loud.rank is None
    assert loud.rank is None or loud.rank >= quiet.rank


@pytest.mark.parametrize(("seeds", "common"), [(2, 0.0), (3, 0.01), (6, 0.03)])
def test_rank_at_margin_false_positive_rate(seeds, common):
    """r=8 keeps exactly 98% of what r=16 gains: to call it enough is false equivalence.

    Seeds shift all ranks alike.
    """
    rng, wrong, known = np.random.default_rng(seeds), 0, 0
    means = np.array([[1.3], [1.02], [1.0]])
    for _ in range(600):
        losses = means + 0.01 * rng.normal(size=(3, seeds)) + common * rng.normal(size=seeds)
        result = judge_sweep(rows(*losses), base=2.0, share=0.02)
        wrong += result.standings[1].enough == "yes"
        known += result.standings[0].enough == "no"
    assert wrong / 600 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)
    assert known / 600 > 0.9  # and what is far behind is seen to be


def test_noisy_pair_uses_own_variance():
    """Ranks of low variance do not narrow the interval of a noisy pair.

    It is at least that of the pair alone with the pooled degrees of freedom.
    """
    noisy = (1.0, 1.06, 1.02), (1.04, 1.0, 1.01)
    result = judge_sweep(rows((1.5, 1.5, 1.501), (1.4, 1.4, 1.401), *noisy), 2.0, 0.02)
    own = np.var(np.subtract(*noisy), ddof=1)
    best = result.standings[2]
    assert best.half == pytest.approx(stats.t(6).ppf(0.95) * math.sqrt(own / 3))


def test_equal_rank_is_enough_with_recommended_seeds():
    rng = np.random.default_rng(5)
    few = judge_sweep(rows((1.0, 1.04), (1.03, 1.01), (1.02, 1.01)), 2.0, 0.02)
    assert few.rank is None
    assert 2 < max(one.seeds for one in few.standings if one.seeds is not None) < 200
    result = [
        judge_sweep(rows(*(1 + 0.02 * rng.normal(size=(3, 40)))), 2.0, 0.02).rank == 4
        for _ in range(200)
    ]
    assert np.mean(result) > 0.95


def record(rank, lr, seed, loss, name="own"):
    return Probe(
        probe="sweep",
        set=name,
        subject="lora",
        rank=rank,
        lr=lr,
        seed=seed,
        tokens=1,
        data="",
        loss=loss,
    )


def test_rank_has_rate_of_lowest_loss_on_deciding_set():
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
    assert (four.runs, four.edge) == ({0: 1.0, 1: 1.1}, True)
    assert (eight.runs, eight.edge) == ({0: 0.9}, False)


def test_edge_of_rank_uses_own_rates():
    """Beyond the grid only some ranks are tried: a rate that others went past is still
    their last.
    """
    records = [
        record(4, 1e-3, 0, 1.5),
        record(4, 1e-2, 0, 1.0),
        record(8, 1e-3, 0, 1.5),
        record(8, 1e-2, 0, 1.2),
    ]
    records += [record(8, 0.033, 0, 1.0), record(8, 0.11, 0, 1.1)]
    assert [
        (row.lr, row.edge) for row in by_rank(records, "own", best_rates(records, "own", 0))
    ] == [
        (1e-2, True),
        (0.033, False),
    ]


def test_best_rank_is_compared_with_line_by_welch():
    """As SciPy's t test of unequal variances where there is one rank and the line depends on the
    seed.
    """
    line = AtRank(None, 1e-4, dict(enumerate((0.91, 0.99, 0.94))))
    best = (0.90, 0.95, 0.85, 0.93)
    result = compare_with_reference([row(4, best)], line, base=2.0, share=0.02)
    truth = stats.ttest_ind(best, line.losses, equal_var=False).confidence_interval(0.9)
    assert not result.fixed
    assert result.gap - result.half == pytest.approx(truth.low)
    assert result.gap + result.half == pytest.approx(truth.high)
    assert result.outcome == "not known"  # what is not significantly different is not equal
    assert result.seeds > 4
    wide = compare_with_reference([row(4, best)], line, base=2.0, share=0.3)
    assert wide.outcome == "as good"
    # Where the best was chosen among several ranks, limits are Bonferroni's: 97.5% each for two,
    # 99% in all for ten.
    two = compare_with_reference(
        [row(4, best), row(8, [loss + 1 for loss in best])], line, base=2.0, share=0.02
    )
    spread = np.var(best, ddof=1)
    error = math.sqrt(spread / 4 + np.var(line.losses, ddof=1) / 3)
    freedom = error**4 / ((spread / 4) ** 2 / 6 + (np.var(line.losses, ddof=1) / 3) ** 2 / 2)
    assert two.half == pytest.approx(stats.t(freedom).ppf(0.975) * error)


def test_seed_independent_reference_counts_as_one_run():
    """Its error is that of one LoRA run, so that √(1/n + 1) and not √(1/n) is in the interval."""
    best = (1.0, 1.02, 1.01)
    spread = np.var(best, ddof=1)
    for losses in ((0.9, 0.9, 0.9), (0.9,), (0.9, 0.9 + 1e-5, 0.9)):
        result = compare_with_reference([row(4, best)], row(None, losses), base=2.0, share=0.02)
        assert result.fixed
        assert result.half == pytest.approx(stats.t(2).ppf(0.95) * math.sqrt(spread * (1 / 3 + 1)))
        assert result.outcome == "worse"
    near = compare_with_reference([row(4, best)], row(None, (1.0, 1.0)), base=2.0, share=0.02)
    assert (near.outcome, near.seeds) == (
        "not known",
        None,
    )  # one run stays one run, however many seeds LoRA has


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ((0.5, 0.51), "worse"),
        ((1.5, 1.52), "better"),
        ((1.0, 1.01), "as good"),
        ((1.004, 1.2), "not known"),
    ],
)
def test_lora_is_compared_with_reference_line(line, word):
    result = compare_with_reference(
        rows((1.3, 1.31), (1.0, 1.01)), AtRank(None, 1e-4, dict(enumerate(line))), 2.0, 0.06
    )
    assert (result.outcome, result.best.rank) == (word, 8)


def test_line_without_spread_or_rank_has_no_statement():
    assert compare_with_reference([], row(None, (1.0, 1.1)), 2.0, 0.02) is None
    assert (
        compare_with_reference(rows((1.0,), (1.1,)), row(None, (1.0, 1.1)), 2.0, 0.02).outcome
        == "no verdict"
    )


@pytest.mark.parametrize("apart", [0.02, -0.02])
def test_reference_at_margin_false_positive_rate(apart):
    """The best of three ranks is chosen by its losses, which flatters it: limits are wider for
    that.
    """
    rng, wrong = np.random.default_rng(7), 0
    for _ in range(600):
        losses = 1 + apart + 0.008 * rng.normal(size=(3, 3))
        line = 1 + 0.008 * rng.normal(size=3)
        share = apart if apart > 0 else -apart / (1 - apart)  # of what the better of the two gains
        wrong += (
            compare_with_reference(rows(*losses), row(None, line), base=2.0, share=share).outcome
            == "as good"
        )
    assert wrong / 600 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)


def base(loss, name="own"):
    return Probe(probe="sweep", set=name, subject="base", tokens=1, data="", loss=loss)


def test_diverged_run_is_excluded_from_statistics():
    good = [
        record(rank, 1e-2, seed, 1.0 + 0.01 * seed + 1 / rank)
        for rank in (4, 8)
        for seed in (0, 1, 2)
    ]
    clean = judge_sweep(by_rank([base(2.0), *good], "own", {4: 1e-2, 8: 1e-2}), 2.0, 0.02)
    for loss in (None, 5.0):
        records = [base(2.0), *good, record(8, 1e-2, 3, loss)]
        assert find_diverged(records) == {("lora", 8, 1e-2, 3)}
        eight = by_rank(records, "own", best_rates(records, "own", 0))[1]
        assert len(eight.runs) == 3
        result = judge_sweep(by_rank(records, "own", {4: 1e-2, 8: 1e-2}), 2.0, 0.02)
        assert replace(result, standings=()) == replace(clean, standings=())
    # It is one on every set, and a rate at which all runs end above BASE is no gain and no
    # divergence.
    twice = [
        base(2.0),
        *good,
        record(8, 1e-2, 3, 5.0),
        base(9.0, "two"),
        record(8, 1e-2, 3, 8.0, "two"),
    ]
    twice += [record(8, 1e-2, 0, 7.0, "two")]
    assert by_rank(twice, "two", {8: 1e-2})[0].runs == {0: 7.0}
    assert find_diverged([base(2.0), record(8, 1e-2, 0, 5.0), record(8, 1e-2, 1, 4.0)]) == set()
    assert find_diverged([base(2.0), record(8, 1e-2, 0, 1.9), record(8, 1e-2, 1, 2.1)]) == set()


def test_ranks_are_paired_on_common_seeds():
    result = judge_sweep(
        [AtRank(4, 1e-3, {0: 1.0, 1: 1.1, 2: 3.0}), AtRank(8, 1e-3, {0: 1.0, 1: 1.11})], 9.0, 0.02
    )
    assert result.standings[0].behind == pytest.approx(-0.005)
