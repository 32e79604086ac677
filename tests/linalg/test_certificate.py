"""Upper bounds on missed energy against float64 eigenvalues, for any basis and any μ that is large enough."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.linalg import certificate, decompose, krylov
from lora_diag.linalg.cost import LOSS, full_cost, krylov_cost
from tests import oracles

N = 400
INDEX = np.arange(1, N + 1)
NOISE = np.sort(np.linalg.svd(np.random.default_rng(0).standard_normal((N, N)), compute_uv=False))[::-1] / N
HARD = {
    "rank 8, faint noise": np.r_[np.ones(8), 0.001 * NOISE[8:]],
    "rank 8, noise": np.r_[np.ones(8), 0.3 * NOISE[8:]],
    "rank 20, loud noise": np.r_[np.ones(20), 3 * NOISE[20:]],
    "flat": np.ones(N),
    "equal beyond K": np.r_[np.full(12, 1.0), np.full(20, 0.5), np.full(N - 32, 0.05)],
    "power law": INDEX**-0.7,
    "slow power law": INDEX**-0.3,
}


def of_basis(m: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return Ritz values, FᵀF and λ_max(N) of a symmetric matrix and an orthonormal basis, from their definitions."""
    values, w = np.linalg.eigh(q.T @ m @ q)
    v = q @ w[:, ::-1]
    out = np.eye(len(m)) - q @ q.T
    f = out @ m @ v
    return values[::-1], f.T @ f, float(np.linalg.eigvalsh(out @ m @ out)[-1])


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(HARD)),
    columns=st.integers(2, 40),
    top=st.integers(1, 40),
    powers=st.integers(0, 4),
    slack=st.sampled_from([1 + 1e-6, 1.1, 1.8]),
    seed=st.integers(0, 999),
)
def test_bound_holds_for_any_basis(name, columns, top, powers, slack, seed):
    rng = np.random.default_rng(seed)
    s = HARD[name][rng.integers(0, 8) :][:60]
    a = oracles.with_spectrum(s, 60, 60, seed)
    m = a.T @ a
    q, _ = np.linalg.qr(np.linalg.matrix_power(m, powers) @ rng.standard_normal((60, columns)))
    squares, residuals, largest = of_basis(m, q)
    top = min(top, columns)
    fro = float(np.linalg.norm(a))
    bound = certificate.missed(
        torch.from_numpy(squares.copy()),
        torch.from_numpy(residuals),
        top,
        fro,
        slack * largest + 1e-12,
        torch.from_numpy(a),
    )
    truth = np.cumsum(np.linalg.svd(a, compute_uv=False)[:top] ** 2 - squares[:top]).max() / fro**2
    assert truth <= bound + 1e-12


def test_bound_sees_values_that_did_not_converge():
    """Of a basis that holds the signal only, the bound on K values is that of the noise, not of all energy."""
    s = HARD["rank 8, noise"]
    a = oracles.with_spectrum(s, N, N, 1)
    _, _, vh = np.linalg.svd(a)
    q, _ = np.linalg.qr(np.c_[vh[:8].T, np.random.default_rng(0).standard_normal((N, 24))])
    squares, residuals, largest = of_basis(a.T @ a, q)
    words = (torch.from_numpy(squares.copy()), torch.from_numpy(residuals), 32, float(np.linalg.norm(a)))
    bound = certificate.missed(*words, 1.01 * largest, torch.from_numpy(a))
    truth = (s[:32] ** 2 - squares).sum() / words[3] ** 2
    assert truth <= bound < 0.5 * certificate.missing(words[0], words[3], torch.from_numpy(a))
    assert certificate.missed(*words, 4 * largest, torch.from_numpy(a)) > bound


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", HARD)
def test_energies_of_hard_spectra_are_within_bound(name, dtype):
    matrix = oracles.with_spectrum(HARD[name], N, N + 50, 4).astype(dtype)
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    for tol in (1e-2, 5e-4):
        found = decompose(torch.from_numpy(matrix), "krylov", top=24, tol=tol)
        error = np.cumsum(s[:24] ** 2 - found.s.numpy() ** 2) / (s**2).sum()
        assert -1e-12 <= error.min() <= error.max() <= found.energy_error <= tol


def test_probability_of_small_probe_is_exact():
    """Beta(b/2, (d − 1)/2) is the distribution of the part of a block's span along a direction: against sampling."""
    rng = np.random.default_rng(0)
    d, b, found = 50, 4, []
    for _ in range(4000):
        x = rng.standard_normal((d, b))
        y = x @ x[0]
        found.append(y[0] ** 2 / (y @ y))
    for share in (0.05, 0.5):
        assert np.mean(np.array(found) < certificate.betaincinv(b / 2, (d - 1) / 2, share)) == pytest.approx(
            share, abs=0.03
        )


def test_flat_spectra_are_left_before_their_cost_counts(monkeypatch):
    widest = []
    products = krylov.normal
    monkeypatch.setattr(krylov, "normal", lambda a, x: widest.append(x.shape[1]) or products(a, x))
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal((1200, 1200)).astype(np.float32))
    rank = torch.from_numpy((rng.standard_normal((1200, 8)) @ rng.standard_normal((8, 1200))).astype(np.float32))
    for matrix in (noise, rank + noise, rank + 0.3 * noise):
        widest.clear()
        assert krylov.decompose_krylov(matrix, float(matrix.norm()), 64) is None
        assert krylov_cost(matrix.shape, [sum(widest)]) <= LOSS * full_cost(matrix.shape)
