"""Numbers from singular values, against the definitions and their laws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.metrics.energy import (
    effective_rank,
    energy_curve,
    rank_at,
    stable_rank,
    truncation_error,
)
from lora_diag.metrics.subspaces import random_angles
from tests import oracles

values = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40).map(
    lambda v: np.sort(np.array(v))[::-1]
)


@given(values)
def test_energy_curves_equal_definition(s):
    fro = math.sqrt(float((s**2).sum()))
    curve = energy_curve(s, fro, complete=True)
    assert np.all(np.diff(curve) >= 0)
    assert curve[-1] == 1.0
    for rank in range(1, len(s) + 1):
        assert curve[rank - 1] == pytest.approx(oracles.energy_at(s, rank), abs=1e-12)


@given(values, st.integers(1, 40), st.sampled_from([0.9, 0.95, 0.99]))
def test_incomplete_spectrum_gives_same_fractions(s, top, threshold):
    fro = math.sqrt(float((s**2).sum()))
    whole, part = energy_curve(s, fro, complete=True), energy_curve(s[:top], fro, complete=False)
    assert part[: top - 1] == pytest.approx(whole[: min(top, len(s))][: top - 1], abs=1e-12)
    rank = rank_at(part, threshold)
    if rank is not None:
        assert part[rank - 1] >= threshold
        assert rank == 1 or part[rank - 2] < threshold


@given(values, st.integers(0, 45))
def test_error_squared_and_energy_are_one(s, rank):
    fro = math.sqrt(float((s**2).sum()))
    error, spectral = truncation_error(s, fro, rank, complete=True)
    kept = float((s[:rank] ** 2).sum())
    assert error**2 + kept == pytest.approx(fro**2, rel=1e-12)
    assert spectral == (s[rank] if rank < len(s) else 0.0)


@given(values, st.integers(1, 40), st.integers(0, 45))
def test_errors_of_incomplete_spectrum(s, top, rank):
    fro = math.sqrt(float((s**2).sum()))
    result = truncation_error(s[:top], fro, rank, complete=False)
    if rank > min(top, len(s)):
        assert result is None
        return
    exact, _ = truncation_error(s, fro, rank, complete=True)
    assert result[0] == pytest.approx(
        exact, abs=1e-7 * fro
    )  # √ of a few rounding errors in ‖A‖² and in what is kept
    assert result[1] == (s[rank] if rank < min(top, len(s)) else None)


def test_exact_threshold_is_met():
    curve = np.array([0.5, 0.9, 0.95, 1.0])
    assert [rank_at(curve, share) for share in (0.5, 0.9, 0.95, 0.99, 1.0)] == [1, 2, 3, 4, 4]


def test_truncation_is_error_of_best_approximation():
    delta = oracles.with_spectrum(1 / np.arange(1, 11), 10, 14, seed=3)
    s = np.linalg.svd(delta, compute_uv=False)
    for rank in (0, 1, 4, 10):
        error, spectral = truncation_error(s, float(np.linalg.norm(delta)), rank, complete=True)
        rest = delta - oracles.best_approximation(delta, rank)
        assert error == pytest.approx(np.linalg.norm(rest), abs=1e-12)
        assert spectral == pytest.approx(np.linalg.norm(rest, 2), abs=1e-12)


@given(values)
def test_scalar_ranks_equal_definition(s):
    fro = math.sqrt(float((s**2).sum()))
    assert effective_rank(s) == pytest.approx(oracles.effective_rank(s), rel=1e-9)
    assert 1 <= stable_rank(s, fro) <= len(s) * (1 + 1e-12)
    assert 1 - 1e-12 <= effective_rank(s) <= len(s) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("first", "second", "dimension"),
    [(8, 8, 128), (4, 16, 128), (64, 64, 384), (60, 50, 100), (8, 8, 16), (8, 1, 128), (9, 9, 9)],
)
def test_random_subspace_angles_follow_their_distribution(first, second, dimension):
    """Against simulated subspaces; and exactly in the mean squared cosine, max(p, q)/m."""
    rng = np.random.default_rng(dimension)
    result = []
    for _ in range(80 if dimension < 200 else 20):
        u, v = (np.linalg.qr(rng.normal(size=(dimension, k)))[0] for k in (first, second))
        result += list(np.clip(np.linalg.svd(u.T @ v, compute_uv=False), 0, 1))
    grid = np.linspace(0, 1, 4001)
    shares = random_angles(grid, first, second, dimension)
    assert shares[-1] == 1
    assert np.all(np.diff(shares) >= 0)
    simulated = np.searchsorted(np.sort(result), grid[:-1], side="right") / len(result)
    # Small spaces spread beyond the edges of the law, by about 1/√(p·q) of its mass.
    assert np.abs(shares[:-1] - simulated).max() < 0.05 + 0.3 / np.sqrt(first * second)
    mean = float(np.sum(np.diff(shares) * (grid[1:] ** 2 + grid[:-1] ** 2) / 2))
    assert mean == pytest.approx(max(first, second) / dimension, abs=3e-4)
