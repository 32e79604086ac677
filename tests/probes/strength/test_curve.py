"""The best and the sufficient strength against planted parabolas, whose losses, minima and errors
are known exactly.
"""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.probes.strength.curve import Curve, choose, fit_parabola
from tests import oracles

GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
COUNT, TOKENS = 25, 10


def planted(seed, optimum, spread=0.05, grid=GRID):
    """Return losses of sequences c·(t − t_i)² + a per token, and c and t_i of each sequence."""
    rng = np.random.default_rng(seed)
    bends, places = rng.uniform(0.5, 1.5, COUNT), rng.normal(optimum, spread, COUNT)
    losses = bends * (np.array(grid)[:, None] - places) ** 2 + rng.uniform(1, 2, COUNT)
    return Curve(grid, TOKENS * losses, (TOKENS,) * COUNT), bends, places


def quantile(comparisons=1):
    """t quantile of a 95% interval (Bonferroni) for overlapping blocks of 5 of 25 sequences:
    1.5·(25/5 − 1).
    """
    return scipy.stats.t.ppf(1 - 0.05 / 2 / comparisons, 6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.4, 1.1))
def test_planted_optimum_is_found_with_its_interval(seed, optimum):
    curve, bends, places = planted(seed, optimum)
    found = fit_parabola(curve, GRID)
    assert found["fit"] == "quadratic"
    assert found["optimum"] == pytest.approx((bends * places).sum() / bends.sum(), abs=1e-9)

    def is_significant(t):  # of the slope at t, from its definition
        slopes = 2 * bends * (t - places)
        return abs(slopes.mean()) > quantile() * oracles.error_of_mean(slopes.tolist())

    for end, side in (("optimum_low", 1), ("optimum_high", -1)):  # found in steps of 0.005
        assert is_significant(found[end])
        assert not is_significant(found[end] + side * 0.00501)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.5, 1.2))
def test_choice_follows_its_definitions(seed, optimum):
    curve, bends, places = planted(seed, optimum)
    fields = choose(curve, GRID)

    def losses(t):
        return bends * (t - places) ** 2

    def compare(difference, comparisons):
        return difference.mean(), quantile(comparisons) * oracles.error_of_mean(difference.tolist())

    best = min(GRID, key=lambda t: losses(t).mean())
    better = []
    for t in GRID:
        gap, half = compare(losses(t) - losses(1.0), len(GRID) - 1)
        better += [t] if gap < -half else []
    assert fields["best"] == best
    assert fields["recommended"] == (best if better else 1)
    for end, last in (
        (fields["low"], 0.0),
        (fields["high"], 1.5),
    ):  # the first that is significantly worse than any measured one, or the last
        step = (end - best) and (last - best) / 400
        margins, margins_before = (
            [np.subtract(*compare(losses(t) - losses(other), 6)) for other in GRID]
            for t in (end, end - step)
        )
        assert max(margins) > -1e-9 or end == last
        assert max(margins_before) <= 1e-9
    # t = 1 is outside of the range if its own test found a better one.
    assert not better or not fields["low"] < 1.0 < fields["high"]
    base, target = losses(0.0), losses(fields["recommended"])

    def surplus(t):
        return compare(0.1 * base + 0.9 * target - losses(t), 1)

    exact = scipy.optimize.brentq(lambda t: surplus(t)[0], 0, min(fields["recommended"], optimum))
    step = fields["recommended"] / 400
    assert 0 <= fields["sufficient"] - exact <= step + 1e-9
    for end, sign in ((fields["sufficient_low"], 1), (fields["sufficient_high"], -1)):
        (gap, half), (before, before_half) = surplus(end), surplus(end - 1.01 * step)
        assert gap + sign * half >= -1e-9 > before + sign * before_half - 2e-9 or end == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 1.3), st.floats(-0.5, 1.5))
def test_recommended_strength_is_beaten_by_none(seed, optimum, harmless):
    """Of each t: its mean losses on both texts, and the tests against t = 1, from the definitions."""
    curve, *_ = planted(seed, optimum)
    other, *_ = planted(seed + 1, harmless, spread=0.5)
    fields = choose(curve, GRID, [other])
    means = {t: (curve.nll[i].mean(), other.nll[i].mean()) for i, t in enumerate(GRID)}
    one = GRID.index(1.0)

    def is_better(texts, i):
        each = (texts.nll[i] - texts.nll[one]) / TOKENS
        return each.mean() < -quantile(6) * oracles.error_of_mean(each.tolist())

    def beat(t):
        """The strengths that have a lower loss on the task and no higher one on the other text."""
        return {s for s in GRID if means[s][0] < means[t][0] and means[s][1] <= means[t][1]}

    on_task = {t for i, t in enumerate(GRID) if is_better(curve, i)}
    on_other = {t for i, t in enumerate(GRID) if is_better(other, i)} & beat(1.0)
    if on_task or on_other:
        assert means[fields["recommended"]][0] < means[1.0][0]
        assert beat(fields["recommended"]) == set()
        tested = fields["significant"] or fields["recommended"]
        assert tested in (on_task or on_other)
    else:
        assert (fields["recommended"], fields["significant"]) == (1.0, None)


def test_strength_better_on_both_texts_replaces_tested_one():
    """0.75 is significantly better than 1, and 0.5 better still on both texts, with a large error."""
    noise = np.random.default_rng(0).permutation(np.linspace(-1, 1, COUNT))
    means, errors = np.array([2.0, 1.0, 1.1, 1.2]), np.array([0.0, 2.0, 0.01, 0.0])
    scales, counts = (0.0, 0.5, 0.75, 1.0), (TOKENS,) * COUNT
    curve = Curve(scales, TOKENS * (means[:, None] + errors[:, None] * noise), counts)
    costs = np.repeat([[1.0], [1.1], [1.2], [1.3]], COUNT, axis=1)
    for shifted, found in (
        ([Curve(scales, TOKENS * costs, counts)], (0.5, 0.75)),
        ([Curve(scales, TOKENS * costs[[0, 3, 2, 1]], counts)], (0.75, None)),
        ([], (0.5, 0.75)),
    ):
        fields = choose(curve, scales, shifted)
        assert (fields["recommended"], fields["significant"]) == found


def test_planted_gain_without_optimum_is_not_fitted():
    rising = planted(0, 2.5)[0]
    assert (fit_parabola(rising, GRID), choose(rising, GRID)["best"]) == ({"fit": "edge"}, 1.5)
    more = (
        *GRID[:4],
        0.78,
        *GRID[4:],
    )  # the optimum of the parabola through (0.5, 0.3), (0.75, 0.05), (1, 0.2)
    pointed = Curve(
        more, TOKENS * np.abs(np.array(more)[:, None] - np.full(COUNT, 0.8)), (TOKENS,) * COUNT
    )
    assert fit_parabola(pointed, GRID) == {
        "fit": "poor",
        "checked": 0.78,
        "checked_gap": pytest.approx(-0.02688),
    }
    bends = np.random.default_rng(1).permutation(np.linspace(-3, 3.1, COUNT))
    unclear = Curve(GRID, TOKENS * (np.array(GRID)[:, None] - 0.75) ** 2 * bends, (TOKENS,) * COUNT)
    assert (fit_parabola(unclear, GRID), choose(unclear, GRID)["recommended"]) == (
        {"fit": "flat"},
        1,
    )
    short = planted(2, 0.5, grid=(0.0, 0.5, 1.0))[0]
    assert choose(short, short.scales).keys() & {"low", "sufficient", "optimum"} == set()


def test_check_refutes_parabola_that_fits_only_the_grid():
    curve, bends, places = planted(3, 0.61)
    optimum = (bends * places).sum() / bends.sum()
    checked, exact = round(optimum, 2), bends * (round(optimum, 2) - places) ** 2
    place = next(i for i, t in enumerate(GRID) if t > checked)
    offset = (curve.at(0.0) - TOKENS * bends * places**2) / TOKENS
    scales = (*GRID[:place], checked, *GRID[place:])
    for more, outcome in ((0.2, "poor"), (0.0, "quadratic")):
        row = TOKENS * (exact + offset + more)
        fields = choose(Curve(scales, np.insert(curve.nll, place, row, axis=0), curve.counts), GRID)
        assert (fields["fit"], "optimum" in fields) == (outcome, outcome == "quadratic")
        assert (fields["checked"], fields["checked_gap"]) == (checked, pytest.approx(more))


def test_one_sequence_decides_nothing():
    curve, *_ = planted(4, 0.5)
    fields = choose(Curve(GRID, curve.nll[:, :1], (TOKENS,)), GRID)
    assert (fields["recommended"], fields["best_gap_error"], fields["fit"]) == (1.0, None, "flat")
    assert (fields["low"], fields["high"], "sufficient" in fields) == (0.0, 1.5, False)
