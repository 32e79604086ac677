"""Bounds on missed energy and both ends of a spectrum from products alone, against NumPy's dense
eigenvalues.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.errors import InputError
from lora_diag.linalg import krylov
from lora_diag.linalg.krylov import (
    DENSE_UP_TO,
    LOSS,
    PROBE,
    WORTH,
    eigenpairs,
    extreme_eigenpairs,
    full_cost,
    krylov_cost,
)
from lora_diag.linalg.methods import decompose
from tests import oracles
from tests.messages import raises_naming

N = 400
INDEX = np.arange(1, N + 1)
NOISE = (
    np.sort(np.linalg.svd(np.random.default_rng(0).standard_normal((N, N)), compute_uv=False))[::-1]
    / N
)
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
    """Return Ritz values, FᵀF and λ_max(N) of a symmetric matrix and an orthonormal basis, from
    their definitions.
    """
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
    bound = krylov.inertia_bound(
        torch.from_numpy(squares.copy()),
        torch.from_numpy(residuals),
        top,
        fro,
        slack * largest + 1e-12,
        torch.from_numpy(a),
    )
    truth = np.cumsum(np.linalg.svd(a, compute_uv=False)[:top] ** 2 - squares[:top]).max() / fro**2
    assert truth <= bound + 1e-12


def test_bound_covers_unconverged_values():
    """Of a basis that holds the signal only, the bound on K values is that of the noise, not of all
    energy.
    """
    s = HARD["rank 8, noise"]
    a = oracles.with_spectrum(s, N, N, 1)
    _, _, vh = np.linalg.svd(a)
    q, _ = np.linalg.qr(np.c_[vh[:8].T, np.random.default_rng(0).standard_normal((N, 24))])
    squares, residuals, largest = of_basis(a.T @ a, q)
    words = (
        torch.from_numpy(squares.copy()),
        torch.from_numpy(residuals),
        32,
        float(np.linalg.norm(a)),
    )
    bound = krylov.inertia_bound(*words, 1.01 * largest, torch.from_numpy(a))
    truth = (s[:32] ** 2 - squares).sum() / words[3] ** 2
    assert truth <= bound < 0.5 * krylov.trace_bound(words[0], words[3], torch.from_numpy(a))
    assert krylov.inertia_bound(*words, 4 * largest, torch.from_numpy(a)) > bound


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", HARD)
def test_energies_of_hard_spectra_are_within_bound(name, dtype):
    matrix = oracles.with_spectrum(HARD[name], N, N + 50, 4).astype(dtype)
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    rounding = 1e-12 if dtype == np.float64 else 2e-7
    for tol in (1e-2, 5e-4):
        result = decompose(torch.from_numpy(matrix), "krylov", top=24, tol=tol)
        error = np.cumsum(s[:24] ** 2 - result.s.numpy() ** 2) / (s**2).sum()
        assert -rounding <= error.min() <= error.max() <= result.energy_error <= tol


LARGE = np.arange(1, 1505.0)  # the first order of which 64 values are tried
GAUSSIAN = np.random.default_rng(0).standard_normal((1504, 1504))
FLOOR = np.sqrt(np.linalg.eigvalsh(GAUSSIAN.T @ GAUSSIAN).clip(0))[::-1] / 45
TEMPTING = {
    "noise": FLOOR,
    "rank 60, noise": np.hypot(2.0 * (LARGE <= 60), FLOOR),
    "slow power law": LARGE**-0.3,
    "step behind K": np.where(LARGE <= 100, 1.0, 0.3 * LARGE**-0.5),
    "long plateau": np.where(
        LARGE <= 50, LARGE**-0.7, np.where(LARGE <= 600, 50**-0.7, 0.2 * 50**-0.7)
    ),
    "equal values": np.where(
        LARGE <= 20, 1.0, np.where(LARGE <= 80, 0.3, np.where(LARGE <= 320, 0.2, 0.01))
    ),
}


@pytest.mark.parametrize("name", TEMPTING)
def test_failed_attempts_cost_at_most_bound(monkeypatch, name):
    """Of a diagonal matrix: its Krylov space from a Gaussian start is that of any matrix with these
    values.
    """
    checks, probes = [], []
    solve, probe = krylov._rayleigh_ritz, krylov._bound_outside
    monkeypatch.setattr(
        krylov, "_rayleigh_ritz", lambda qq, *rest: checks.append(len(qq)) or solve(qq, *rest)
    )
    monkeypatch.setattr(krylov, "_bound_outside", lambda *words: probes.append(1) or probe(*words))
    matrix = torch.from_numpy(np.diag(np.sort(TEMPTING[name])[::-1]).astype(np.float32))
    full, probing = full_cost(matrix.shape), PROBE * matrix.numel()
    for tol in (5e-4, 1e-2):
        checks.clear(), probes.clear()
        if krylov.decompose_krylov(matrix, float(matrix.norm()), 64, tol=tol) is None:
            cost = krylov_cost(matrix.shape, checks) + len(probes) * probing
            assert cost <= (LOSS + krylov.STEP) * full + probing
            assert cost <= LOSS * full or "plateau" in name or "equal" in name
        else:
            assert (
                krylov_cost(matrix.shape, checks, 64) + (len(probes) - 1) * probing
                <= WORTH * full + probing
            )


@pytest.mark.slow
def test_attempt_ends_at_loss_if_value_k_is_below_noise(monkeypatch):
    """Its bound falls as predicted at first; followed to the end, the attempt cost half of all
    values.
    """
    checks, solve = [], krylov._rayleigh_ritz
    monkeypatch.setattr(
        krylov, "_rayleigh_ritz", lambda qq, *rest: checks.append(len(qq)) or solve(qq, *rest)
    )
    matrix = torch.diag(torch.arange(1, 2561.0) ** -0.4)
    assert krylov.decompose_krylov(matrix, float(matrix.double().norm()), 128) is None
    assert len(checks) > 1
    assert krylov_cost(matrix.shape, checks) <= LOSS * full_cost(matrix.shape)


@pytest.mark.parametrize("name", ["power law", "rank 20, loud noise"])
def test_stated_bound_is_not_below_that_of_its_basis(monkeypatch, name):
    """Not below the bound (2) of the basis that was probed, with λ_max(N) from float64
    eigenvalues.
    """
    bases, probe = [], krylov._bound_outside
    monkeypatch.setattr(
        krylov, "_bound_outside", lambda a, q, *rest: bases.append(q) or probe(a, q, *rest)
    )
    a = oracles.with_spectrum(HARD[name], N, N, 3)
    fro = float(np.linalg.norm(a))
    result = krylov.decompose_krylov(torch.from_numpy(a), fro, 20, tol=2e-2, budget=np.inf)
    squares, residuals, largest = of_basis(a.T @ a, np.linalg.qr(bases[-1].double().numpy())[0])
    exact = krylov.inertia_bound(
        torch.from_numpy(squares.copy()),
        torch.from_numpy(residuals),
        20,
        fro,
        largest,
        torch.from_numpy(a),
    )
    assert exact * 0.99 <= result.energy_error <= 2e-2


def test_bound_of_low_rank_matrix_covers_all_energy_not_found():
    """Its values are in float64: a bound from float32 products could be smaller than what they
    lack.
    """
    for seed in range(4):
        rng = np.random.default_rng(seed)
        u, v = (np.linalg.qr(rng.standard_normal((n, 300)))[0] for n in (400, 300))
        s = np.concatenate([np.linspace(1, 0.3, 24), np.full(276, 1e-5)])
        matrix = torch.tensor((u * s) @ v.T, dtype=torch.float32)
        fro = float(matrix.double().norm())
        result = krylov.decompose_krylov(matrix, fro, 24, budget=float("inf"))
        assert result is not None
        assert 1e-9 < 1 - float(result.s.square().sum()) / fro**2 <= result.energy_error


# Eigenpairs.


def symmetric(values, seed):
    """A symmetric matrix with these eigenvalues, float64."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return (q * np.asarray(values)) @ q.T


def found(h, count, seed=0):
    matrix = torch.from_numpy(h).float()
    return eigenpairs(lambda x: matrix @ x, len(h), count, seed, torch.device("cpu"))


@given(
    st.integers(2, 2 * DENSE_UP_TO),
    st.integers(1, 6),
    st.sampled_from(["spread", "spikes", "repeated", "negative", "low rank", "zero"]),
    st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_values_and_vectors_equal_dense_solver(size, count, kind, seed):
    rng = np.random.default_rng(seed)
    values = {
        "spread": rng.standard_normal(size),
        "spikes": np.r_[100.0, -50.0, rng.standard_normal(size)][:size],
        "repeated": np.r_[
            np.full(min(3, size), 2.0), np.full(min(3, size), -3.0), rng.random(size)
        ][:size],
        "negative": -1 - rng.random(size),
        "low rank": np.r_[3.0, 1.0, np.zeros(size)][:size],
        "zero": np.zeros(size),
    }[kind]
    count = min(count, size)
    h = symmetric(values, seed)
    truth = np.linalg.eigvalsh(h)[::-1]
    answer = found(h, count)
    scale = max(np.abs(truth).max(), 1e-6)
    assert len(answer.values) == count
    values = answer.values.numpy()
    near = 2e-3 * scale
    assert values[0] == pytest.approx(truth[0], abs=near)
    # Behind the first one may be passed over, as a copy is that comes by rounding alone; never is
    # one beyond its place.
    assert np.abs(values[:, None] - truth).min(1).max() <= near
    assert (values - truth[:count]).max() <= near
    v = answer.vectors.double().numpy()
    np.testing.assert_allclose(v.T @ v, np.eye(count), atol=1e-4)
    rest = h @ v[:, 0] - answer.values[0].item() * v[:, 0]
    assert answer.residual == pytest.approx(np.linalg.norm(rest), abs=1e-5 * scale)
    assert np.linalg.norm(rest) <= 2e-3 * scale
    # no unit vector bends more than the largest eigenvalue: what the loss bound stands on
    x = rng.standard_normal((size, 20))
    quotients = np.einsum("ij,ij->j", x, h @ x) / (x**2).sum(0)
    outermost = answer.values[0].item()
    assert (quotients <= outermost + 1e-3 * scale).all()


@given(
    st.integers(1, 2 * DENSE_UP_TO),
    st.sampled_from(["spread", "spikes", "repeated", "positive", "negative", "low rank", "zero"]),
    st.integers(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_both_ends_of_one_process_equal_dense_solver(size, kind, seed):
    rng = np.random.default_rng(seed)
    values = {
        "spread": rng.standard_normal(size),
        "spikes": np.r_[100.0, -5.0, 0.1 * rng.standard_normal(size)][:size],
        "repeated": np.r_[[2.0] * 3, [-3.0] * 3, rng.random(size)][:size],
        "positive": np.r_[[7.0, 5.0], np.zeros(size)][:size] + 1e-3 * rng.random(size),
        "negative": -1 - rng.random(size),
        "low rank": np.r_[3.0, 1.0, np.zeros(size)][:size],
        "zero": np.zeros(size),
    }[kind]
    h, calls = symmetric(values, seed), []
    matrix = torch.from_numpy(h).float()
    ends = extreme_eigenpairs(
        lambda x: calls.append(x) or matrix @ x, size, seed, torch.device("cpu")
    )
    truth, scale = np.linalg.eigvalsh(h), np.abs(values).max()
    for end, exact in zip(ends, truth[[-1, 0]], strict=True):
        value = end.values.item()
        assert (
            np.abs(truth - value).min() <= end.residual + 1e-5 * scale
        )  # what the residual promises
        assert value == pytest.approx(exact, abs=2e-3 * scale)
        assert end.residual <= 2e-3 * scale
    assert ends[0].products + ends[1].products == len(calls)


def test_products_are_counted_and_one_seed_gives_one_answer():
    h = symmetric(np.linspace(-1, 1, 200), 3)
    matrix, calls = torch.from_numpy(h).float(), []

    def product(x):
        calls.append(x)
        return matrix @ x

    one = eigenpairs(product, 200, 3, 5, torch.device("cpu"))
    assert one.products == len(calls)
    again = eigenpairs(product, 200, 3, 5, torch.device("cpu"))
    assert torch.equal(one.vectors, again.vectors)


def test_non_finite_or_unconverged_matrix_is_reported(monkeypatch):
    with pytest.raises(InputError, match="not finite"):
        eigenpairs(lambda x: x * float("nan"), 100, 1, 0, torch.device("cpu"))
    with pytest.raises(InputError, match="not finite"):
        extreme_eigenpairs(lambda x: x * float("nan"), 100, 0, torch.device("cpu"))
    monkeypatch.setattr("lora_diag.linalg.krylov.MAX_RESTARTS", 1)
    wide = torch.from_numpy(symmetric(np.linspace(0, 1, 400), 0)).float()
    with raises_naming(InputError, "converge", 19):
        extreme_eigenpairs(lambda x: wide @ x, 400, 0, torch.device("cpu"))
    with raises_naming(InputError, "converge", 1):
        found(symmetric(np.linspace(0, 1, 400), 0), 8)
