"""Every number of a run's layers and checkpoints against float64 NumPy, of adapters and of full
checkpoints.
"""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_diag
from lora_diag.diagnostics.checkpoints.factors import UpdateFactors, measure_factors
from lora_diag.diagnostics.checkpoints.record import CheckpointLayer, RunCheckpoint
from lora_diag.diagnostics.checkpoints.stored import _decompose
from lora_diag.layers.change import Change
from tests import oracles
from tests.conftest import ROOT
from tests.diagnostics.checkpoints.making import LAYERS, save_full, save_run

K = 2
TIMES = (5, 20, 21)


def factors(rng, rank, count=3, m=14, n=9):
    """Factors of a few layers at a few steps, near each other; A moves, too."""
    first = {
        name: (rng.standard_normal((m, rank)), rng.standard_normal((rank, n)))
        for name in LAYERS[:2]
    }
    steps = [first]
    for _ in range(count - 1):
        move = 10.0 ** rng.uniform(-4, 0)
        steps.append(
            {
                name: tuple(x + move * rng.standard_normal(x.shape) for x in pair)
                for name, pair in first.items()
            }
        )
    return [
        {name: tuple(x.astype(np.float32) for x in pair) for name, pair in step.items()}
        for step in steps
    ]


def cosine(x, y):
    return float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))


def spaces(x):
    return np.linalg.svd(x)[0][:, : min(K, np.linalg.matrix_rank(x))]


def overlap(x, y):
    u, v = spaces(x), spaces(y)
    return float(np.linalg.norm(u.T @ v) ** 2 / min(u.shape[1], v.shape[1]))


def check(record: CheckpointLayer, t: int, updates: list[np.ndarray], base) -> None:
    """Compare a record of the t-th update with what the definitions give; float32 files limit small
    increments.
    """
    x, s = updates[t], np.linalg.svd(updates[t], compute_uv=False)
    before = updates[t - 1] if t else np.zeros_like(x)
    change = x - before
    size = np.linalg.norm(x)
    assert record.fro == pytest.approx(size, rel=1e-6)
    assert record.sigma_1 == pytest.approx(s[0], rel=1e-6)
    assert record.spectral_share == pytest.approx(s[0] ** 2 / size**2, rel=1e-5)
    assert record.stable_rank == pytest.approx(size**2 / s[0] ** 2, rel=1e-5)
    assert record.effective_rank == pytest.approx(oracles.effective_rank(s), rel=1e-4)
    for rank, share in record.energy.items():
        assert share == pytest.approx(oracles.energy_at(s, int(rank)), rel=1e-5)
    assert record.increment == pytest.approx(np.linalg.norm(change), abs=1e-6 * size)
    if t:
        earlier = before - (updates[t - 2] if t > 1 else 0 * x)
        assert record.cosine == pytest.approx(cosine(change, earlier), abs=1e-5)
    assert record.gram == pytest.approx(
        [(x * other).sum() for other in updates[: t + 1]], rel=1e-5, abs=1e-6 * size
    )
    assert record.overlaps == pytest.approx([overlap(x, other) for other in updates[:t]], abs=1e-4)
    if t + 1 < len(updates):
        assert record.overlap_next == pytest.approx(overlap(x, updates[t + 1]), abs=1e-4)
        assert record.overlap_last == pytest.approx(overlap(x, updates[-1]), abs=1e-4)
    assert record.overlap_random == record.directions / len(x)
    if base is not None:
        assert record.relative == pytest.approx(size / np.linalg.norm(base), rel=1e-6)


def check_checkpoints(found: list[RunCheckpoint], updates: list[list[np.ndarray]], bases) -> None:
    """Compare the records of the checkpoints with the layers stacked as one vector."""
    whole = [np.concatenate([x.ravel() for x in layers]) for layers in updates]
    moves = [after - before for before, after in zip([0 * whole[0], *whole], whole, strict=False)]
    for t, record in enumerate(found):
        assert record.fro == pytest.approx(np.linalg.norm(whole[t]), rel=1e-6)
        assert record.increment == pytest.approx(np.linalg.norm(moves[t]), rel=1e-3)
        if t:
            assert record.cosine == pytest.approx(cosine(moves[t], moves[t - 1]), abs=1e-4)
        if bases:
            total = math.hypot(*(np.linalg.norm(base) for base in bases))
            assert record.relative == pytest.approx(np.linalg.norm(whole[t]) / total, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_adapters_against_numpy(tmp_path, rank):
    steps = factors(np.random.default_rng(rank), rank)
    found = lora_diag.checkpoints(save_run(tmp_path / "run", steps, TIMES, 0.5), directions=K)
    updates = [
        [0.5 * b.astype(float) @ a.astype(float) for b, a in step.values()] for step in steps
    ]
    assert [(record.layer, record.step) for record in found] == [
        (name, t) for name in LAYERS[:2] for t in TIMES
    ]
    for i, record in enumerate(found):
        layer, t = divmod(i, len(TIMES))
        check(record, t, [each[layer] for each in updates], None)
    check_checkpoints(found.whole_of(RunCheckpoint), updates, None)


@pytest.mark.parametrize("rank", [3, 70])
def test_base_gives_relative_norm_of_adapters(tmp_path, rank):
    """Factors of more than 64 columns are measured with torch."""
    rng = np.random.default_rng(5)
    steps = factors(rng, rank, m=80, n=75)
    run = save_run(tmp_path / "run", steps, TIMES)
    base = {name: rng.standard_normal((80, 75)).astype(np.float32) for name in LAYERS[:2]}
    save_full(tmp_path, base, [], [])
    found = lora_diag.checkpoints(run, base=tmp_path / "base", directions=K)
    updates = [[b.astype(float) @ a.astype(float) for b, a in step.values()] for step in steps]
    for i, record in enumerate(found):
        layer, t = divmod(i, len(TIMES))
        check(record, t, [each[layer] for each in updates], base[LAYERS[layer]])


def test_full_checkpoints_against_numpy(tmp_path):
    rng = np.random.default_rng(3)
    base = {name: rng.standard_normal((14, 9)).astype(np.float32) for name in LAYERS[:2]}
    deltas = [{name: rng.standard_normal((14, 9)) * t for name in base} for t in TIMES]
    deltas[1] = {
        name: np.where(np.arange(9) < 4, deltas[0][name], delta)
        for name, delta in deltas[1].items()
    }
    run = save_full(tmp_path, base, deltas, TIMES)
    found = lora_diag.checkpoints(run, base=tmp_path / "base", directions=K)
    stored = [
        [
            (w + d[name]).astype(np.float32).astype(float) - w.astype(float)
            for name, w in base.items()
        ]
        for d in deltas
    ]
    for i, record in enumerate(found):
        layer, t = divmod(i, len(TIMES))
        check(record, t, [each[layer] for each in stored], base[LAYERS[layer]])
        assert record.unchanged == pytest.approx([0, 4 / 9, 0][t])
    check_checkpoints(found.whole_of(RunCheckpoint), stored, list(base.values()))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 4), min_size=2, max_size=5),
    st.floats(1e-9, 1.0),
)
def test_increments_keep_their_digits_at_any_size(seed, ranks, size):
    """⟨D_s, D_t⟩ of factors of any ranks, where increments are a billion times smaller than the
    updates.
    """
    rng = np.random.default_rng(seed)
    m, n, rank = 7, 6, max(ranks)
    b, a = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
    steps, changes = [], []
    for t, width in enumerate(ranks):
        db, da = (
            size * rng.standard_normal((m, rank)) * (t > 0),
            size * rng.standard_normal((rank, n)) * (t > 0),
        )
        db[:, width:] = 0
        after = b + db, a + da
        # The exact increment of what is stored: the differences as float64 rounds them.
        db, da = after[0] - b, after[1] - a
        changes.append(db @ after[1] + b @ da if t else after[0] @ after[1])
        b, a = after
        steps.append(UpdateFactors(b, a, 2.0))
    found = measure_factors(steps, 2)
    products = np.array([[4 * (x * y).sum() for y in changes] for x in changes])
    lengths = np.sqrt(products.diagonal())
    np.testing.assert_allclose(
        found.increments, products, atol=1e-9 * np.outer(lengths, lengths).max(axis=0).min()
    )
    np.testing.assert_allclose(
        np.square(found.fro), found.increments.cumsum(0).cumsum(1).diagonal(), rtol=1e-9
    )
    for space in found.spaces:
        np.testing.assert_allclose(space.T @ space, np.eye(space.shape[1]), atol=1e-6)


def test_ranks_may_differ_between_steps(tmp_path):
    rng = np.random.default_rng(0)
    steps = [
        {
            LAYERS[0]: (
                rng.standard_normal((8, r)).astype(np.float32),
                rng.standard_normal((r, 7)).astype(np.float32),
            )
        }
        for r in (4, 2, 3)
    ]
    found = lora_diag.checkpoints(save_run(tmp_path / "run", steps, TIMES), directions=K)
    updates = [b.astype(float) @ a.astype(float) for step in steps for b, a in step.values()]
    for t, record in enumerate(found):
        check(record, t, updates, None)
    assert [record.unchanged for record in found] == [None, 0, 0]


def test_equal_checkpoints_have_increment_zero(tmp_path):
    steps = factors(np.random.default_rng(0), 2)
    found = lora_diag.checkpoints(save_run(tmp_path / "run", [steps[0], steps[0], steps[2]], TIMES))
    again = [record for record in found if record.step == TIMES[1]]
    assert [(record.increment, record.cosine, record.unchanged) for record in again] == [
        (0, None, 1)
    ] * 2
    assert found.whole[-1].repeated == (TIMES[1],)
    still = lora_diag.checkpoints(save_run(tmp_path / "still", [steps[0]] * 3, TIMES)).whole[-1]
    assert (still.repeated, still.cosine) == (TIMES[1:], None)
    assert still.state != "random walk"


def test_update_that_is_not_finite_leaves_others_measured(tmp_path):
    steps = factors(np.random.default_rng(0), 2, count=4)
    steps[1][LAYERS[0]][1][1, 3] = np.nan
    found = lora_diag.checkpoints(save_run(tmp_path / "run", steps, (*TIMES, 30)))
    bad, good = (found.layers[i * 4 : i * 4 + 4] for i in range(2))
    assert [record.fro is None for record in bad] == [False, True, False, False]
    assert "[1, 3]" in bad[1].non_finite
    assert [record.increment is None for record in bad] == [False, True, True, False]
    assert all(record.increment is not None for record in good)
    assert [record.non_finite for record in found.whole_of(RunCheckpoint)] == [0, 1, 0, 0]
    assert (found.whole[-1].state, found.whole[-1].step) == ("non-finite", TIMES[1])


@pytest.mark.slow
def test_factors_alone_need_no_torch(tmp_path):
    run = save_run(tmp_path / "run", factors(np.random.default_rng(0), 2), TIMES)
    code = (
        f"import lora_diag, sys; lora_diag.checkpoints({str(run)!r}); assert 'torch' not in "
        "sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_numbers_equal_those_of_spectrum():
    """Of a checkpoint of the sample model's run, as both commands read it."""
    run = ROOT / "sample_checkpoints" / "run"
    found = lora_diag.checkpoints(run)
    last = found.whole_of(RunCheckpoint)[-1]
    by_layer = {record.layer: record for record in lora_diag.spectrum(last.path)}
    for record in found:
        if record.step == last.step:
            spectrum = by_layer[record.layer]
            assert record.fro == pytest.approx(spectrum.fro, rel=1e-6)
            assert record.effective_rank == pytest.approx(spectrum.effective_rank, rel=1e-6)
            assert record.spectral_share == pytest.approx(spectrum.spike, rel=1e-6)


@pytest.mark.parametrize("shape", [(9, 14), (180, 140), (140, 180)])
@pytest.mark.parametrize("factored", [False, True])
def test_stored_update_gives_all_values_and_largest_vectors(shape, factored):
    b, a = torch.randn(shape[0], 5).double(), torch.randn(5, shape[1]).double()
    x = (b @ a).numpy()
    change = (
        Change(None, None, factors=(b, a))
        if factored
        else Change(float(np.linalg.norm(x)), None, matrix=b @ a)
    )
    found = _decompose(change, shape, K)
    u, sigma, _ = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(found.s[:5], sigma[:5], rtol=1e-10)
    assert len(found.s) == (5 if factored else min(shape))
    assert found.s[5:].sum() < 1e-5 * sigma[0]
    own = found.vectors[0][:, :K].numpy()
    np.testing.assert_allclose(own @ own.T, u[:, :K] @ u[:, :K].T, atol=1e-9)


def test_stored_update_whose_norm_overflows_is_refused():
    huge = torch.full((3, 1), 1e200, dtype=torch.float64)
    assert _decompose(Change(None, None, factors=(huge, huge.T)), (3, 3), 2) is None
