"""The random walk by simulation, the order of checkpoints, spikes; and which state a planted run
has.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_diag
from lora_diag.diagnostics.checkpoints import verdict
from lora_diag.diagnostics.checkpoints.record import CheckpointLayer
from lora_diag.diagnostics.checkpoints.verdict import find_collapses
from tests.diagnostics.checkpoints.making import LAYERS, STEPS, healthy, save_run
from tests.messages import assert_names


def walk(rng, lengths, dimension=6000):
    """The Gram matrix of one random walk."""
    steps = rng.standard_normal((len(lengths), dimension))
    path = np.cumsum(
        steps / np.linalg.norm(steps, axis=1, keepdims=True) * np.array(lengths)[:, None], axis=0
    )
    return path @ path.T


def line(lengths):
    path = np.cumsum(lengths)
    return np.outer(path, path)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.floats(0.2, 5), min_size=4, max_size=12))
def test_expected_walk_is_near_simulated_walks(seed, lengths):
    gram = walk(np.random.default_rng(seed), lengths)
    expected, steps = verdict.random_walk(gram), range(1, len(lengths) + 1)
    np.testing.assert_allclose(expected, gram, atol=0.12 * gram.max())
    for found, null in zip(
        *(verdict.first_direction(each, steps) for each in (gram, expected)), strict=True
    ):
        assert found == pytest.approx(null, abs=0.08)


def test_long_walk_has_limits_of_brownian_motion():
    """Its covariance min(s, t) has the eigenfunction sin(πt/2), whose share is 4/π² of 1/2."""
    t = (np.arange(600) + 1) / 600
    share, linear = verdict.first_direction(
        verdict.random_walk(np.minimum.outer(t, t)), range(1, 601)
    )
    assert share == pytest.approx(8 / np.pi**2, abs=3e-3)
    assert linear == pytest.approx(np.corrcoef(t, np.sin(np.pi * t / 2))[0, 1] ** 2, abs=3e-3)


def test_line_is_one_direction():
    share, linear = verdict.first_direction(line([1.0] * 8), range(1, 9))
    assert (share, linear) == pytest.approx((1, 1))
    assert verdict.settled_from(verdict.distances(line([1.0] * 8))[1:, -1] / 8) == 7


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(5, 12), st.booleans(), st.data())
def test_exchange_of_checkpoints_is_found(seed, count, straight, data):
    rng = np.random.default_rng(seed)
    lengths = rng.uniform(0.9, 1.1, count)
    gram = line(lengths) if straight else walk(rng, lengths)
    assert verdict.best_swap(gram)[0] > 0.9
    first = data.draw(st.integers(0, count - 3))
    second = data.draw(st.integers(first + 1, count - 2))
    order = np.arange(count)
    order[[first, second]] = second, first
    ratio, *positions = verdict.best_swap(gram[np.ix_(order, order)])
    assert ratio < 0.9
    assert positions == [first, second]


def test_outlier_is_no_exchange():
    gram = walk(np.random.default_rng(0), [1.0] * 8)
    gram[3, 3] += 400
    assert verdict.best_swap(gram)[0] > 0.9


def zero(update, name):
    return {layer: (0 * b if layer == name else b, a) for layer, (b, a) in update.items()}


def one_direction(update, name=None):
    return {
        layer: (b * ([1, 0, 0, 0] if name in {None, layer} else 1), a)
        for layer, (b, a) in update.items()
    }


def add(update, size, seed=0):
    rng = np.random.default_rng(seed)
    return {
        layer: (b + size * rng.standard_normal(b.shape) * np.abs(b).mean(), a)
        for layer, (b, a) in update.items()
    }


def late(runs, change, first=6):
    return [change(update) if t >= first else update for t, update in enumerate(runs)]


def one(runs, change, place=5):
    return [change(update) if t == place else update for t, update in enumerate(runs)]


def swapped(runs):
    runs = list(runs)
    runs[3], runs[4] = runs[4], runs[3]
    return runs


def random_walk(runs):
    rng, total, made = np.random.default_rng(3), {}, []
    for update in runs:
        total = {
            name: total.get(name, 0) + rng.standard_normal(b.shape)
            for name, (b, a) in update.items()
        }
        made.append({name: (total[name], a) for name, (b, a) in update.items()})
    return made


PLANTED = {
    "healthy": (lambda runs: runs, "settled", None),
    "never trained": (lambda runs: late(runs, lambda u: zero(u, LAYERS[1]), 0), "dead", None),
    "died": (lambda runs: late(runs, lambda u: zero(u, LAYERS[1])), "dead", None),
    "all dead": (
        lambda runs: [{n: (0 * b, a) for n, (b, a) in u.items()} for u in runs],
        "dead",
        None,
    ),
    "one collapses": (
        lambda runs: late(runs, lambda u: one_direction(u, LAYERS[1])),
        "collapsed",
        70,
    ),
    "all collapse": (lambda runs: late(runs, one_direction), "collapsed", 70),
    "spike and return": (lambda runs: one(runs, lambda u: add(u, 5)), "spiked", 60),
    "jump": (lambda runs: late(runs, lambda u: add(u, 5), 5), "spiked", 60),
    "exchanged": (swapped, "out of order", 40),
    "walk": (random_walk, "random walk", None),
}


@pytest.mark.parametrize("case", PLANTED)
def test_state_of_planted_run(tmp_path, case):
    change, state, step = PLANTED[case]
    updates = [
        {name: tuple(x.astype(np.float32) for x in pair) for name, pair in update.items()}
        for update in change(healthy(shape=(160, 140)))
    ]
    run = save_run(tmp_path / "run", updates, state=case != "walk")
    found = lora_diag.checkpoints(run).whole[-1]
    assert found.state == state
    if step is not None:
        assert found.step == step
    counts = {name: len(layers) for name, layers in found.affected.items()}
    assert counts == {name: getattr(found, name) for name in counts}
    if case in {"never trained", "died"}:
        assert found.affected["dead"] == (LAYERS[1],)
    if case == "one collapses":
        assert found.affected["collapsed"] == (LAYERS[1],)


@pytest.mark.parametrize("seed", range(3))
def test_healthy_run_raises_no_alarm(tmp_path, seed):
    found = lora_diag.checkpoints(save_run(tmp_path / "run", healthy(seed))).whole[-1]
    assert (found.state, found.dead, found.collapsed, found.spiked, found.swapped) == (
        "settled",
        0,
        0,
        0,
        None,
    )
    assert found.settled == found.settled_schedule  # it moves along a line, by its learning rates
    assert found.growth == pytest.approx(found.growth_schedule, abs=0.01)


def test_constant_steps_still_grow(tmp_path):
    last = healthy()[-1]
    updates = [
        {n: ((b * t / STEPS[-1]).astype(np.float32), a) for n, (b, a) in last.items()}
        for t in STEPS
    ]
    results = lora_diag.checkpoints(save_run(tmp_path / "run", updates, state=False))
    found = results.whole[-1]
    assert (found.state, found.settled, found.settled_schedule) == ("growing", None, None)
    assert found.growth == pytest.approx(0.1, abs=1e-6)
    from lora_diag.diagnostics.checkpoints.show import checkpoints_lines

    assert_names(
        "\n".join(statement.text for statement in checkpoints_lines(results)),
        "learning rates are not known",
    )


def test_noise_at_the_end_of_a_schedule_is_no_spike(tmp_path):
    """Where learning rates go to zero, rounding or noise of a fixed size has a large
    ratio to them.
    """
    rng = np.random.default_rng(0)
    updates = [
        {
            name: ((b + 0.03 * rng.standard_normal(b.shape)).astype(np.float32), a)
            for name, (b, a) in update.items()
        }
        for update in healthy()
    ]
    assert lora_diag.checkpoints(save_run(tmp_path / "run", updates)).whole[-1].state == "settled"


@pytest.mark.parametrize(
    ("ranks", "shares", "found"),
    [
        ([3, 3, 3, 1, 1], [0.5, 0.5, 0.5, 0.9, 0.9], {"w": 3}),
        ([3, 3, 8, 3, 3], [0.5, 0.5, 0.2, 0.5, 0.5], {}),  # one noisy checkpoint
        ([3, 3, 3, 1, 3], [0.5, 0.5, 0.5, 0.9, 0.5], {}),  # it recovers
        ([6, 5, 3, 2, 1], [0.3, 0.5, 0.6, 0.8, 0.9], {"w": 3}),  # in all layers
    ],
)
def test_collapse_is_sudden_or_common_and_stays(ranks, shares, found):
    layers = [
        CheckpointLayer(
            layer="w", step=t, shape=(9, 9), fro=1.0, effective_rank=rank, spectral_share=share
        )
        for t, (rank, share) in enumerate(zip(ranks, shares, strict=True))
    ]
    assert find_collapses({"w": layers}) == found
