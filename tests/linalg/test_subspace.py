"""Overlaps from thin products, against the dense projections of their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.linalg.distance import measure_shares
from lora_diag.metrics.subspaces import overlap_by_chance


def dense_overlaps(delta: np.ndarray, gradient: np.ndarray, rank: int) -> dict[str, float]:
    """The four shares from their definitions: NumPy's SVD, projections formed in full, float64."""
    u, _, vh = np.linalg.svd(delta.astype(np.float64))
    g = gradient.astype(np.float64)
    p, q = u[:, :rank] @ u[:, :rank].T, vh[:rank].T @ vh[:rank]
    parts = {
        "kappa": p @ g @ q,
        "left": p @ g,
        "right": g @ q,
        "tangent": p @ g + g @ q - p @ g @ q,
    }
    return {name: float(np.sqrt((part**2).sum() / (g**2).sum())) for name, part in parts.items()}


def random_basis(rng: np.random.Generator, m: int, r: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((m, r)))[0]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.floats(1e-12, 1e12),
)
def test_shares_equal_dense_projections_for_any_blocks(m, n, seed, rows, scale):
    rng = np.random.default_rng(seed)
    delta, gradient = rng.standard_normal((m, n)), rng.standard_normal((m, n)) * scale
    ranks = tuple(range(1, min(m, n) + 1))
    u, _, vh = np.linalg.svd(delta)
    u, v = torch.from_numpy(u[:, : ranks[-1]].copy()), torch.from_numpy(vh[: ranks[-1]].T.copy())
    result = measure_shares(torch.from_numpy(gradient).split(rows), u, v, ranks)
    assert result.fro == pytest.approx(np.linalg.norm(gradient), rel=1e-12)
    for at, rank in enumerate(ranks):
        expected = dense_overlaps(delta, gradient, rank)
        assert result.both[at] == pytest.approx(expected["kappa"], abs=1e-10)
        assert result.left[at] == pytest.approx(expected["left"], abs=1e-10)
        assert result.right[at] == pytest.approx(expected["right"], abs=1e-10)
        assert result.tangent[at] == pytest.approx(expected["tangent"], abs=1e-10)
        assert 0 <= result.both[at] <= min(result.left[at], result.right[at])
        assert max(result.left[at], result.right[at]) <= result.tangent[at] <= 1


@pytest.mark.parametrize("shape", [(48, 48), (24, 80)])
@pytest.mark.parametrize("gradient_rank", [1, 24])
def test_random_subspaces_meet_baselines_within_sampling_error(shape, gradient_rank):
    """The mean square over 400 draws, within four standard errors of the draws themselves."""
    rng = np.random.default_rng(1)
    m, n = shape
    gradient = rng.standard_normal((m, gradient_rank)) @ rng.standard_normal((gradient_rank, n))
    blocks, rank = [torch.from_numpy(gradient)], 6
    draws = []
    for _ in range(400):
        u, v = (
            torch.from_numpy(random_basis(rng, m, rank)),
            torch.from_numpy(random_basis(rng, n, rank)),
        )
        result = measure_shares(blocks, u, v, [rank])
        draws.append(
            [result.both[0] ** 2, result.tangent[0] ** 2, result.left[0] ** 2, result.right[0] ** 2]
        )
    mean, error = np.mean(draws, 0), np.std(draws, 0) / 20
    expected = np.array(overlap_by_chance(shape, rank)) ** 2
    assert (np.abs(mean - expected) < 4 * error).all(), (mean, expected, error)


def test_non_finite_entry_is_named_zero_gradient_has_no_share():
    e = torch.eye(4, dtype=torch.float64)[:, :2]
    g = torch.ones(4, 4)
    g[3, 1] = torch.nan
    assert measure_shares(g.split(2), e, e, [1, 2]) == "the gradient holds nan at [3, 1]"
    assert measure_shares([torch.zeros(4, 4)], e, e, [1, 2]).both == (0.0, 0.0)
