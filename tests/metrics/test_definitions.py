"""Metrics of matrices against their definitions in float64, and baselines against random draws."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lora_diag.metrics.energy import gavish_donoho, hard_threshold, knee, spectral_error
from lora_diag.metrics.statistics import (
    Estimate,
    degrees_of_freedom,
    find_near_duplicates,
    find_norm_outliers,
    find_outlier_kinds,
    order_by_rarity,
    paired_difference,
)
from lora_diag.metrics.subspaces import (
    below_at_random,
    classify_direction,
    classify_relation,
    compute_distances,
    find_limit,
    is_near_chance,
    pool_distances,
    similarity_at_random,
    split_epsilon,
    task_interference,
    task_interference_at_random,
)
from tests import oracles

RNG = np.random.default_rng(0)


@dataclass
class Layer:
    """Norms of one layer's update D and adapter X, of rank 2."""

    d: np.ndarray
    x: np.ndarray

    @property
    def floor(self):
        return float(np.linalg.norm(self.d - oracles.best_approximation(self.d, 2)))

    fro = property(lambda self: float(np.linalg.norm(self.d)))
    adapter_fro = property(lambda self: float(np.linalg.norm(self.x)))
    gap = property(lambda self: float(np.linalg.norm(self.d - self.x)))
    inner = property(lambda self: float((self.d * self.x).sum()))


def layer(d, x):
    return Layer(np.asarray(d, dtype=np.float64), np.asarray(x, dtype=np.float64))


def found(one):
    return compute_distances(
        one.fro, one.adapter_fro, one.gap, one.inner, one.floor / one.fro if one.fro else None
    )


def test_pooled_distances_equal_block_diagonal():
    layers = [layer(RNG.normal(size=(4, 3)), RNG.normal(size=(4, 3))) for _ in range(3)]
    layers.append(layer(np.zeros((4, 3)), np.ones((4, 3))))
    whole = layer(np.hstack([each.d for each in layers]), np.hstack([each.x for each in layers]))
    got, expected = pool_distances(layers), found(whole)
    for name in ("epsilon", "norm_ratio", "cosine", "best_scale", "epsilon_best_scale"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=1e-12), name
    floor = math.sqrt(sum(each.floor**2 for each in layers)) / whole.fro
    assert got.epsilon_min == pytest.approx(floor)
    assert pool_distances([layer(np.zeros((2, 2)), np.ones((2, 2)))]).epsilon is None


def test_limit_names_what_was_changed():
    d = np.diag([3.0, 2.0, 0.1, 0.1])
    best = oracles.best_approximation(d, 2)
    turned = np.roll(best, 1, axis=1)
    assert find_limit(found(layer(d, 0 * d))) == "not adapted"
    assert find_limit(found(layer(best, best * (1 + 1e-4)))) == "exact"
    assert find_limit(found(layer(d, best))) == "rank"
    assert find_limit(found(layer(d, best / 2))) == "scale"
    assert find_limit(found(layer(d, -best))) == "direction"
    assert find_limit(found(layer(d, turned))) == "direction"
    assert find_limit(found(layer(d, best + 0.3 * turned))) == "direction"
    assert (
        find_limit(found(layer(d, 5 * (best + 1.5 * turned)))) == "direction"
    )  # of which no scale makes much
    assert find_limit(found(layer(d, 3 * best))) == "scale"
    assert find_limit(found(layer(0 * d, d))) is None


@pytest.mark.parametrize("length", [0.05, 0.5, 1.0, 2.5, 8.0])
@pytest.mark.parametrize("aligned", [-0.5, 0.0, 0.1, 0.6, 0.95, 1.0])
def test_parts_sum_to_epsilon_squared(length, aligned):
    """Scale is what a search over scales gains, from the better of X and nothing, if X does not
    pass 2D along D.
    """
    rng = np.random.default_rng(7)
    d = rng.normal(size=(7, 5))
    best = oracles.best_approximation(d, 2)
    other = oracles.best_approximation(rng.normal(size=(7, 5)), 2)
    other -= (other * d).sum() / (d * d).sum() * d  # orthogonal to D
    x = aligned * best / np.linalg.norm(best) + math.sqrt(1 - aligned**2) * other / np.linalg.norm(
        other
    )
    x *= length * np.linalg.norm(d)
    along = (x * d).sum() / (d * d).sum() * d
    whole, overshoot = (
        ((d - other) ** 2).sum() / (d * d).sum() for other in (x, along if aligned > 0 else 0 * d)
    )
    floor = ((d - best) ** 2).sum() / (d * d).sum()
    got = split_epsilon(found(layer(d, x)))
    assert got.rank == pytest.approx(floor)
    assert got.rank + got.direction + got.scale == pytest.approx(whole)
    assert min(got.rank, got.direction, got.scale) >= 0
    found_scale = minimize_scalar(
        lambda c: ((d - c * x) ** 2).sum() / (d * d).sum(), bounds=(0, 40), method="bounded"
    )
    assert got.scale == pytest.approx(
        min(whole, max(1.0, overshoot)) - min(1.0, found_scale.fun), abs=1e-6
    )


def updates(count, rank, m, n, rng):
    """Return singular vectors and values of random updates."""
    parts = [np.linalg.svd(rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n)), full_matrices=False)
             for _ in range(count)]  # fmt: skip
    u, v = np.hstack([p[0][:, :rank] for p in parts]), np.hstack([p[2][:rank].T for p in parts])
    return u, np.concatenate([p[1][:rank] for p in parts]), v


def test_task_interference_of_random_updates_is_as_expected():
    m, n, rng, ratios = 80, 60, np.random.default_rng(1), []
    owner = np.repeat(np.arange(3), 4)
    for _ in range(20):
        u, s, v = updates(3, 4, m, n, rng)
        sti, ratio = task_interference(u.T @ u, v.T @ v, s)
        left, right = u.T @ u - np.eye(12), v.T @ v - np.eye(12)
        assert sti == pytest.approx(sum(abs(x) for x in (left @ np.diag(s) @ right).ravel()))
        ratios.append(ratio / task_interference_at_random(s, owner, (m, n)))
    assert 0.9 < np.mean(ratios) < 1  # the entries are not quite normal


def test_overlap_of_random_updates_is_near_chance():
    rng, near = np.random.default_rng(2), []
    for _ in range(100):
        space = np.linalg.qr(rng.normal(size=(64, 8)))[0]
        d = rng.normal(size=(64, 4)) @ rng.normal(size=(4, 32))
        share = float((space.T @ d).ravel() @ (space.T @ d).ravel() / (d.ravel() @ d.ravel()))
        near.append(
            is_near_chance(share, 8, 64, oracles.effective_rank(np.linalg.svd(d, compute_uv=False)))
        )
        inside = space @ rng.normal(size=(8, 32))
        assert not is_near_chance(
            1.0, 8, 64, oracles.effective_rank(np.linalg.svd(inside, compute_uv=False))
        )
    assert np.mean(near) > 0.97
    pairs = {
        classify_relation(near, c, 0.01)
        for near, c in ((True, 0.02), (False, 0.02), (True, 0.5), (True, -0.5))
    }
    assert pairs == {"apart", "share", "reinforce", "cancel"}
    assert classify_relation(False, 0.5, 0.2) == "share"  # within three standard deviations


def test_random_similarity_equals_monte_carlo():
    m, vectors, rng = 64, 32, np.random.default_rng(4)
    draws = rng.normal(size=(4000, m))
    largest = np.abs(draws[:, :vectors] / np.linalg.norm(draws, axis=1)[:, None]).max(axis=1)
    assert np.median(largest) == pytest.approx(similarity_at_random(m, vectors), rel=0.05)
    assert np.mean(largest < 0.3) == pytest.approx(below_at_random(m, vectors, 0.3), abs=0.06)
    assert below_at_random(m, vectors, 0.0) == 0
    # In the span of close neighbours it rotated; all of a random span is no evidence.
    kinds = [
        classify_direction(0.6, 0, 0.1, 0.5),
        classify_direction(0.1, 0.9, 0.1, 0.5),
        classify_direction(0.1, 0.2, 0.1, 0.5),
        classify_direction(0.1, 1.0, 1.0, 0.5),
    ]
    assert kinds == ["kept", "rotated", "intruder", "intruder"]


def test_hard_threshold_is_near_polynomial_of_its_paper():
    for beta in np.linspace(0.05, 1, 9):
        assert hard_threshold(beta) == pytest.approx(
            0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.02
        )
    rng = np.random.default_rng(5)
    noisy = 20 * rng.normal(size=(60, 3)) @ rng.normal(size=(3, 40)) + rng.normal(size=(60, 40))
    assert gavish_donoho(np.linalg.svd(noisy, compute_uv=False), (60, 40)) == 3


def test_knee_is_furthest_above_chord():
    curve = np.cumsum([0.5, 0.3, 0.1, 0.05, 0.05])
    heights = [0.0, *(c - (r + 1) / 5 for r, c in enumerate(curve))]
    assert knee(curve) == int(np.argmax(heights)) == 2
    assert knee(np.arange(1, 6) / 5) == 0
    # A value that lost at most so much energy is at most so far off, both ways.
    for moved in (-0.2, 0.2):
        assert abs(math.sqrt(1 + moved) - 1) <= spectral_error(1.0, 1.0, 0.1) + 1e-15
    assert spectral_error(1e200, 2e200, 0.1) == pytest.approx(1e200 * spectral_error(1.0, 2.0, 0.1))


def test_alike_finds_planted_copies_and_shared_spaces():
    rows = np.random.default_rng(6).normal(size=(5, 50))
    rows[3] = -2 * rows[0]
    rows[4] = rows[1] + 0.2 * rows[2]
    spaces = np.eye(5)
    spaces[2] = spaces[0]
    found = {
        (pair.first, pair.second): pair
        for pair in find_near_duplicates(rows.tolist(), spaces.tolist())
    }
    assert {key: pair.relation for key, pair in found.items()} == {
        (0, 3): "same",
        (1, 4): "near",
        (0, 2): "space",
    }
    cosine = rows[1] @ rows[4] / np.linalg.norm(rows[1]) / np.linalg.norm(rows[4])
    assert (found[0, 3].cosine, found[1, 4].cosine) == pytest.approx((-1, cosine))
    assert find_near_duplicates([[1.0]], [[1.0]]) == []


@dataclass
class Adapter:
    fro: float = 1.0
    dead: int = 0
    rank: int | None = 8
    used: float | None = 0.9
    spike: float | None = 0.3


def test_outlier_kinds_equal_planted_kinds():
    fleet = [Adapter(), Adapter(1.1), Adapter(0.9), Adapter(30.0), Adapter(used=0.5), Adapter(spike=0.95),
             Adapter(spike=1.0, rank=1), Adapter(0.0, dead=3, used=0.1, spike=None), Adapter(used=None)]  # fmt: skip
    expected = [(), (), (), ("norm",), ("over-ranked",), ("spiked",), (), ("dead",), ()]
    assert find_outlier_kinds(fleet) == expected
    assert order_by_rarity(expected) == [3, 4, 5, 7]
    assert find_norm_outliers([1.0, 100.0]) == [None, None]  # two have no median to be far from


def test_paired_error_is_that_of_batch_means():
    rng = np.random.default_rng(7)
    for count in (2, 3, 4, 9, 50):
        losses = rng.normal(2.0, 1.0, (2, count))
        assert paired_difference(*losses, [1] * count)[1] == pytest.approx(
            oracles.error_of_mean(losses[0] - losses[1]), rel=1e-12
        )
    assert paired_difference([3.0], [1.0], [4]) == (0.5, None)


def test_paired_error_is_spread_of_ratio_over_samples():
    rng, gaps = np.random.default_rng(7), []
    counts = rng.integers(5, 50, 40)
    errors = []
    for _ in range(400):
        drawn = rng.normal(0.1, 1.0, 40) * np.sqrt(counts) + 0.1 * counts
        gap, error = paired_difference(drawn, np.zeros(40), counts)
        gaps.append(gap)
        errors.append(error)
    assert np.std(gaps) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.12)


@pytest.mark.parametrize(("memory", "least"), [(0.0, 0.93), (0.6, 0.87)])
def test_paired_interval_holds_for_dependent_sequences(memory, least):
    """Values of which each keeps a share of the one before; the error of independent values covers
    68% at 0.6.
    """
    rng, held = np.random.default_rng(3), 0
    half = Estimate(0.0, 1.0, degrees_of_freedom(100)).half(0.975)
    for _ in range(1000):
        values = np.zeros(200)
        for i in range(1, 200):
            values[i] = memory * values[i - 1] + rng.normal()
        gap, error = paired_difference(values[100:], np.zeros(100), np.ones(100))
        held += abs(gap) <= half * error
    assert least <= held / 1000 <= 0.97
