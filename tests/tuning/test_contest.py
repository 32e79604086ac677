"""Decisions from losses that are made up: against NumPy, and how often they are wrong in
simulations.
"""

import numpy as np
import pytest

from lora_diag.decisions.allocate.peft_config import make_config
from lora_diag.probes.sweep.verdict import AtRank, Swept, judge_sweep
from lora_diag.records import Probe
from lora_diag.tuning.figures import Point, frontier
from lora_diag.tuning.trials import (
    Curves,
    Measured,
    Variant,
    change_variant,
    choose_rank,
    contest,
    count_diverged,
    gap_of,
    stability_trials,
)
from tests import oracles

COUNTS = np.array([5, 7, 3, 9])


def runs(rng, mean, seeds, spread, seed_effect):
    """Losses of one configuration with an effect of each seed in common; sequences differ, too."""
    result = {}
    for seed in range(seeds):
        nll = COUNTS * (
            mean + seed_effect[seed] + spread * rng.standard_normal()
        ) + 0.01 * rng.standard_normal(4)
        result[seed] = Measured(float(nll.sum() / COUNTS.sum()), tuple(nll))
    return result


def test_gap_error_is_larger_of_two_paired_errors():
    rng = np.random.default_rng(0)
    effect = rng.standard_normal(3)
    one, two = (runs(rng, mean, 3, 0.02, effect) for mean in (1.0, 0.9))
    result = gap_of(one, two, COUNTS)
    differences = np.array([two[seed].loss - one[seed].loss for seed in range(3)])
    over_seeds = differences.std(ddof=1) / np.sqrt(3)
    moved = np.mean([np.subtract(two[seed].nll, one[seed].nll) for seed in range(3)], axis=0)
    assert result.value == pytest.approx(differences.mean())
    assert result.error == pytest.approx(max(over_seeds, oracles.error_of_ratio(moved, COUNTS)))
    shift = np.array([1.0, -2.0, 0.5, 3.0])  # alike for all seeds
    shifted = {seed: np.array(run.nll) + shift for seed, run in one.items()}
    alike = {
        seed: Measured(float(nll.sum() / COUNTS.sum()), tuple(nll)) for seed, nll in shifted.items()
    }
    assert gap_of(one, alike, COUNTS).error == pytest.approx(oracles.error_of_ratio(shift, COUNTS))
    assert gap_of(one, {0: two[0]}, COUNTS).error is None
    assert gap_of(one, {7: two[0]}, COUNTS) is None


def test_uniform_ranks_win_ties():
    """Where both are equally good, uniform stays in most of 400 searches; a clear gain is seen in
    nearly all.
    """
    rng = np.random.default_rng(1)
    kept = {0.0: 0, 0.1: 0}
    for gain in kept:
        for _ in range(400):
            effect = 0.05 * rng.standard_normal(4)
            one, two = runs(rng, 1.0, 4, 0.01, effect), runs(rng, 1.0 - gain, 4, 0.01, effect)
            kept[gain] += contest({"dev": one}, {"dev": two}, "dev", (), {"dev": COUNTS}).kept
    assert kept[0.0] < 0.1 * 400
    assert kept[0.1] > 0.95 * 400


def test_contest_rejects_gain_with_loss_on_shifted_set():
    def losses(own, shifted):
        return {
            "dev": dict(enumerate(map(Measured, own))),
            "other": dict(enumerate(map(Measured, shifted))),
        }

    one = losses((1.0, 1.1, 1.05), (2.0, 2.1, 2.2))
    better = losses((0.8, 0.91, 0.85), (2.1, 2.2, 2.3))
    result = contest(one, better, "dev", ["other"], {})
    assert (result.outcome, result.kept) == ("better", False)
    assert contest(one, better, "dev", [], {}).kept
    assert contest(one, losses((0.8, 0.91, 0.85), (2.0, 2.1, 2.2)), "dev", ["other"], {}).kept
    assert contest(one, losses((1.2, 1.31, 1.25), (1.0,)), "dev", ["other"], {}).outcome == "worse"
    assert contest(one, losses((0.1,), ()), "dev", ["other"], {}).outcome == "not known"


def swept(two, eight):
    rows = [AtRank(2, 1e-2, dict(enumerate(two))), AtRank(8, 1e-3, dict(enumerate(eight)))]
    return Swept("held", (), rows, {}, None, judge_sweep(rows, 2.0, 0.02), 0.02)


def test_rank_choice_follows_verdict_or_is_marked():
    clear = swept((1.0, 1.001), (0.8, 0.802))
    result = choose_rank(clear)
    assert (result.rank, result.lr, result.significant) == (8, 1e-3, True)
    noisy = swept((1.0, 0.7), (0.8, 1.0))
    assert (choose_rank(noisy).rank, choose_rank(noisy).significant) == (2, False)
    wide = swept((1.0, 0.75), (0.8, 0.82))
    assert [one.enough for one in wide.verdict.standings] == ["not known", "not known"]
    assert (choose_rank(wide).rank, choose_rank(wide).significant) == (8, False)
    none = swept((3.0, 3.1), (3.2, 3.3))
    assert (choose_rank(none).rank, choose_rank(none).significant) == (2, False)


def test_stability_runs_only_if_curves_suggest():
    sound = {"gain": 0.5, "train_gain": 0.55, "spread": 0.005, "tolerance": 0.01}
    assert stability_trials(Curves(**sound)) == {}
    assert [*stability_trials(Curves(**sound | {"train_gain": 0.9}))] == [
        "dropout",
        "weight-decay",
        "fewer-steps",
    ]
    assert [*stability_trials(Curves(**sound | {"spread": 0.03}))] == ["half-alpha"]
    assert [*stability_trials(Curves(**sound | {"diverged": 2}))] == ["half-alpha"]
    assert [*stability_trials(Curves(**sound, gain_shifted=-0.1))] == ["fewer-steps"]
    assert stability_trials(Curves(**sound, gain_shifted=0.1)) == {}


@pytest.mark.parametrize(("lr", "expected"), [(1e-3, 0), (1e-2, 1)])
def test_diverged_runs_are_counted_at_one_rank(lr, expected):
    """By hand: one run of r=2 and two of r=8 diverged at 1e-2; stability of r=2 is judged by its
    own.
    """
    fields = {"probe": "sweep", "subject": "lora", "set": "dev", "data": "", "tokens": 1}
    records = [Probe(**fields | {"subject": "base"}, loss=2.0)]
    for rank, losses in ((2, (1.0, None)), (8, (None, None))):
        records += [
            Probe(**fields, rank=rank, lr=1e-2, seed=seed, loss=loss)
            for seed, loss in enumerate(losses)
        ]
    assert count_diverged(records, 2, lr) == expected


def test_frontier_has_undominated_sizes():
    points = [
        Point("a", 10, (2.0,)),
        Point("b", 20, (2.1,)),
        Point("c", 20, (1.8, 1.9)),
        Point("d", 40, (1.85,)),
    ]
    assert [point.variant for point in frontier(points)] == ["a", "c"]


def test_variant_changes_one_setting():
    one = Variant("uniform-r4", make_config(["q"], 4, 8), 1e-3, 100)
    assert change_variant(one, "dropout").config == {**one.config, "lora_dropout": 0.1}
    assert change_variant(one, "weight-decay").decay == 0.1
    patterned = Variant("prior", {**one.config, "alpha_pattern": {"k": 16}}, 1e-3, 100)
    assert change_variant(patterned, "half-alpha").config == {
        **one.config,
        "lora_alpha": 4,
        "alpha_pattern": {"k": 8},
    }
