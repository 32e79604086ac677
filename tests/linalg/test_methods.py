"""Every method against float64 NumPy, and every bound against the error it bounds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.errors import InputError, UsageError
from lora_diag.linalg import exact as gram
from lora_diag.linalg import krylov
from lora_diag.linalg.exact import Factors, decompose_factored
from lora_diag.linalg.methods import METHODS, decompose
from tests import oracles

FULL = [method for method in METHODS if method != "krylov"]

SPECTRA = {
    "flat": np.ones(40),
    "one spike": np.r_[1.0, np.full(39, 1e-3)],
    "geometric": 0.5 ** np.arange(40),
    "power law": 1 / np.arange(1, 41),
    "clustered": np.repeat([1.0, 1.0 - 1e-7, 1e-2, 1e-2 * (1 + 1e-7)], 10),
    "rank one": np.r_[3.0, np.zeros(39)],
    "rank seven": np.r_[np.linspace(2, 1, 7), np.zeros(33)],
    "zero": np.zeros(40),
    "tiny": 1e-30 / np.arange(1, 41),
    "huge": 1e15 / np.arange(1, 41),
}
SHAPES = [(40, 40), (40, 300), (300, 40)]


def true_values(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix.astype(np.float64), compute_uv=False)


def check(factors: Factors, matrix: np.ndarray, tolerance: float = 1e-6) -> None:
    """Hold an answer for the stored matrix against LAPACK's in float64, and its bound against the
    truth.
    """
    s = true_values(matrix)
    kept = s[: len(factors.s)]
    assert factors.s.dtype == torch.float64
    assert np.all(np.diff(factors.s.numpy()) <= 0)
    assert factors.fro == pytest.approx(np.sqrt((s**2).sum()), rel=1e-9)
    if s[0] == 0:
        assert not factors.s.any()
        assert factors.energy_error == 0
        return
    assert np.abs(factors.s.numpy() - kept).max() <= tolerance * s[0]
    error = np.abs(np.cumsum(factors.s.numpy() ** 2) - np.cumsum(kept**2)).max() / (s**2).sum()
    assert error <= max(factors.energy_error, 1e-15)


def check_vectors(factors: Factors, matrix: np.ndarray) -> None:
    """Orthonormal, of fixed sign, and giving the best approximation of their rank."""
    u, s, vh = factors.u.numpy(), factors.s.numpy(), factors.vh.numpy()
    k = len(s)
    assert (u.shape, vh.shape) == ((matrix.shape[0], k), (k, matrix.shape[1]))
    assert np.abs(u.T @ u - np.eye(k)).max() < 1e-9
    assert np.abs(vh @ vh.T - np.eye(k)).max() < 1e-9
    assert np.all(u[np.abs(u).argmax(0), np.arange(k)] > 0)
    best = np.linalg.norm(matrix - oracles.best_approximation(matrix, k))
    assert np.linalg.norm(matrix - (u * s) @ vh) <= best + 1e-6 * np.linalg.norm(matrix)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", [*FULL, "auto"])
def test_full_methods_on_hard_spectra(method, spectrum, shape, dtype):
    matrix = oracles.with_spectrum(SPECTRA[spectrum], *shape, seed=5).astype(dtype)
    factors = decompose(torch.from_numpy(matrix), method)
    check(factors, matrix)
    assert factors.complete
    assert factors.energy_error < 1e-9
    if dtype == np.float64 and method in FULL:
        scale = np.abs(matrix).max() or 1.0
        for top in (None, 5):
            found = decompose(torch.from_numpy(matrix), method, top, vectors=True)
            check_vectors(replace(found, s=found.s / scale), matrix / scale)


@pytest.mark.parametrize("method", FULL)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 2), (1025, 3), (2, 1100)], ids=str)
def test_small_and_thin_matrices(method, shape):
    matrix = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    factors = decompose(torch.from_numpy(matrix), method, vectors=True)
    check(factors, matrix)
    check_vectors(factors, matrix)


@pytest.mark.parametrize("digits", [0.5, 2.9, 3.5, 5.9, 6.1, 9])
@pytest.mark.parametrize("shape", [(90, 60), (60, 90)], ids=str)
def test_vectors_of_small_values_are_orthonormal(shape, digits):
    """Values on both sides of the limits from which columns of A·V are divided, orthogonalized or
    all decomposed.
    """
    matrix = oracles.with_spectrum(np.logspace(0, -digits, 60), *shape, seed=8)
    factors = decompose(torch.from_numpy(matrix), "gram", vectors=True)
    check_vectors(factors, matrix)
    u = factors.vectors[0].numpy()
    left, s, _ = np.linalg.svd(matrix, full_matrices=False)
    for rank in (1, 20, 40):  # the space of the largest
        if s[rank - 1] > 1e-6:
            angles = np.linalg.svd(left[:, :rank].T @ u[:, :rank], compute_uv=False)
            assert angles.min() > 1 - 1e-6


@pytest.mark.parametrize("large", [1, 10, 100])
def test_left_vectors_have_norm_one(large):
    """The Gram matrix has σ² to some ε·σ_1², a millionth of which the small σ² are here.

    Inner products stay below 100·ε·σ_1²/(σ_iσ_j), four times what was measured on several
    processors.
    """
    s = np.r_[np.ones(large), np.full(200 - large, 1.001e-3)]
    factors = decompose(
        torch.from_numpy(oracles.with_spectrum(s, 300, 200, seed=11)), "gram", vectors=True
    )
    u = factors.vectors[0].numpy()
    assert np.abs(np.linalg.norm(u, axis=0) - 1).max() < 1e-14
    bound = 100 * np.finfo(float).eps / np.outer(s, s)
    assert np.all(np.abs(u.T @ u - np.eye(200)) <= bound)


@pytest.mark.parametrize("method", FULL)
@pytest.mark.parametrize("top", [1, 7, 39, 40, 100])
def test_top_keeps_largest(method, top):
    matrix = oracles.with_spectrum(SPECTRA["power law"], 40, 60, seed=2)
    factors = decompose(torch.from_numpy(matrix), method, top)
    check(factors, matrix)
    assert (len(factors.s), factors.complete) == (min(top, 40), top >= 40)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 30), n=st.integers(1, 30), rank=st.integers(0, 30), seed=st.integers(0, 10**6)
)
def test_laws_of_singular_values(m, n, rank, seed):
    rng = np.random.default_rng(seed)
    s = np.sort(rng.exponential(size=min(rank, m, n)))[::-1]
    matrix = oracles.with_spectrum(s, m, n, seed)
    for method in FULL:
        values = decompose(torch.from_numpy(matrix), method).s.numpy()
        transposed = decompose(torch.from_numpy(matrix.T.copy()), method).s.numpy()
        rotation, _ = np.linalg.qr(rng.standard_normal((m, m)))
        rotated = decompose(torch.from_numpy(rotation @ matrix), method).s.numpy()
        scale = max(1e-300, values.max())
        assert np.abs(values - transposed).max() <= 1e-6 * scale
        assert np.abs(values - rotated).max() <= 1e-6 * scale


# Krylov: certified, or handed over.

N, K = 600, 24
INDEX = np.arange(1, N + 1)
ADVERSARIAL = {
    "flat": np.ones(N),
    "one spike": np.r_[1.0, np.full(N - 1, 1e-3)],
    "spike on a high floor": np.r_[10.0, np.ones(N - 1)],
    "geometric": 0.9**INDEX,
    "slow geometric": 0.99**INDEX,
    "power law 1": 1.0 / INDEX,
    "power law 1/2": INDEX**-0.5,
    "clustered at K": np.where(INDEX <= K - 3, 1.0, np.where(INDEX <= K + 20, 0.5, 1e-3)),
    "two tiny gaps": np.where(INDEX <= K // 2, 1.0, np.where(INDEX <= 2 * K, 1 - 1e-6, 0.01)),
    "rank 1": (INDEX <= 1).astype(float),
    "rank K - 1": (INDEX <= K - 1).astype(float),
    "rank K": (INDEX <= K).astype(float),
    "rank K + 1": (INDEX <= K + 1).astype(float),
    "signal and noise": np.where(INDEX <= 16, 1.0, 0.01),
    "signal and faint noise": np.where(INDEX <= 16, 1.0, 3e-4),
    "step behind K": np.where(INDEX <= K, 1.0, 0.5 * INDEX**-0.5),
    "hidden second group": np.r_[np.ones(5), np.full(60, 0.1), np.full(N - 65, 1e-4)],
}


# Every spectrum in one shape, and those with most for a certificate to miss in the two others.
SHAPED = {
    "square": ((N, N), np.float64, 1),
    "wide": ((N, 900), np.float32, 0),
    "tall": ((900, N), np.float64, 1),
}
HARD = ("power law 1/2", "clustered at K", "two tiny gaps", "rank K + 1", "hidden second group")
CERTIFIED = [(spectrum, "square") for spectrum in ADVERSARIAL]
CERTIFIED += [(spectrum, shape) for spectrum in HARD for shape in ("wide", "tall")]


@pytest.mark.slow
@pytest.mark.parametrize(("spectrum", "shape"), CERTIFIED)
def test_krylov_certificate_is_never_broken(spectrum, shape):
    shape, dtype, seed = SHAPED[shape]
    matrix = oracles.with_spectrum(ADVERSARIAL[spectrum], *shape, seed=11).astype(dtype)
    factors = decompose(torch.from_numpy(matrix), "krylov", top=K, seed=seed, vectors=True)
    s = true_values(matrix)
    assert factors.energy_error <= 5e-4
    result, true = np.cumsum(factors.s.numpy() ** 2), np.cumsum(s[:K] ** 2)
    assert ((true - result) / (s**2).sum()).max() <= factors.energy_error
    assert np.all(factors.s.numpy() <= s[:K] * (1 + 1e-9) + 1e-9 * s[0])
    assert not factors.complete
    u, vh = factors.u.numpy(), factors.vh.numpy()
    assert np.abs(u.T @ u - np.eye(K)).max() < 1e-9
    assert np.abs(vh @ vh.T - np.eye(K)).max() < 1e-9
    core = u.T @ matrix.astype(np.float64) @ vh.T
    assert np.abs(core - np.diag(factors.s.numpy())).max() <= 1e-6 * s[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e-30, np.float32),
        (1e-20, np.float64),
        (1e-12, np.float32),
        (1e12, np.float64),
        (1e25, np.float32),
    ],
)
@pytest.mark.parametrize("spectrum", ["power law 1", "power law 1/2", "geometric", "flat"])
def test_certificate_does_not_depend_on_scale(spectrum, dtype, scale):
    matrix = (oracles.with_spectrum(ADVERSARIAL[spectrum], N, 700, seed=2) * scale).astype(dtype)
    factors = decompose(torch.from_numpy(matrix), "krylov", top=9)
    s = true_values(matrix)
    error = (np.cumsum(s[:9] ** 2) - np.cumsum(factors.s.numpy() ** 2)).max() / (s**2).sum()
    assert error <= factors.energy_error <= 5e-4
    assert factors.method.startswith("gram" if spectrum == "flat" else "krylov")


@pytest.mark.parametrize("scale", [1e-170, 1e150])
@pytest.mark.parametrize("method", FULL)
def test_float64_far_from_one(method, scale):
    plain = oracles.with_spectrum(SPECTRA["power law"], 40, 60, seed=2)
    factors = decompose(torch.from_numpy(plain * scale), method)
    assert (factors.s.numpy() / scale) == pytest.approx(
        decompose(torch.from_numpy(plain), method).s.numpy(), rel=1e-6
    )
    assert factors.fro == pytest.approx(np.linalg.norm(plain) * scale, rel=1e-12)
    b, a = plain[:, :3] * scale, plain[:3]
    thin = decompose_factored(torch.from_numpy(b), torch.from_numpy(a))
    assert thin.s.numpy() / scale == pytest.approx(true_values(b / scale @ a)[:3], rel=1e-9)
    assert thin.fro > 0


def fails(*args, **options):
    raise torch.linalg.LinAlgError("did not converge")


def test_failed_solver_falls_back(monkeypatch):
    matrix = oracles.with_spectrum(ADVERSARIAL["power law 1"], N, N, 3)
    monkeypatch.setattr(torch.linalg, "cholesky", fails)
    factors = decompose(torch.from_numpy(matrix), "krylov", top=K)
    assert factors.method == "gram"
    check(factors, matrix)


def test_bound_covers_energy_outside_basis(monkeypatch):
    """Start Lanczos in a space that never meets the largest direction: the certificate must not
    pass it.
    """
    s = np.where(INDEX <= 40, 1.0 / INDEX, 1e-5)
    matrix = torch.from_numpy(np.diag(s))
    matrix[0, 0] = 0.05  # a direction worth 0.15% of the energy, on an axis of its own

    start, gaussian = krylov._make_first_block, torch.randn

    def blind(a, generator):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch,
                "randn",
                lambda *size, **options: gaussian(*size, **options).index_fill_(0, first, 0),
            )
            return start(a, generator)

    first = torch.tensor([0])
    monkeypatch.setattr(krylov, "_make_first_block", blind)
    factors = krylov.decompose_krylov(matrix, float(matrix.norm()), top=30)
    true = np.sort(np.diag(matrix.numpy()))[::-1]
    if factors is not None:
        missed = (np.cumsum(true[:30] ** 2) - np.cumsum(factors.s.numpy() ** 2)).max() / (
            true**2
        ).sum()
        assert missed <= factors.energy_error


def test_energy_outside_basis_is_bounded_above(monkeypatch):
    """The probe's Ritz value is below λ_max(N) for every matrix; μ must be above it."""
    s = np.concatenate([4.0 ** -np.arange(4.0), np.linspace(0.003, 0.001, 396)])
    seen = []
    outside = krylov._bound_outside
    monkeypatch.setattr(
        krylov,
        "_bound_outside",
        lambda a, q, probe: seen.append((a, q, outside(a, q, probe))) or seen[-1][2],
    )
    matrix = torch.from_numpy(oracles.with_spectrum(s, 500, 400, 3))
    assert krylov.decompose_krylov(matrix, float(matrix.norm()), top=4) is not None
    ((a, q, mu),) = seen
    largest = np.linalg.norm((a - a @ q @ q.T).numpy(), 2) ** 2
    assert largest <= mu <= 2 * largest


def test_krylov_repeats_and_seeds_agree_within_bound():
    matrix = torch.from_numpy(
        oracles.with_spectrum(ADVERSARIAL["power law 1"], N, N, 3).astype(np.float32)
    )
    one, two = (decompose(matrix, "krylov", top=K, seed=4) for _ in range(2))
    other = decompose(matrix, "krylov", top=K, seed=5)
    assert torch.equal(one.s, two.s)
    assert not torch.equal(one.s, other.s)
    energies = [float((factors.s**2).sum()) / factors.fro**2 for factors in (one, other)]
    assert abs(energies[0] - energies[1]) <= one.energy_error + other.energy_error


def test_eigenvalues_in_place_are_same(monkeypatch):
    matrix = oracles.with_spectrum(SPECTRA["power law"], 60, 40, seed=2)
    plain = decompose(torch.from_numpy(matrix), "gram")
    monkeypatch.setattr(gram, "IN_PLACE_FROM", 1)
    for shape in (matrix, matrix.T.copy()):
        result = decompose(torch.from_numpy(shape), "gram")
        check(result, shape)
        assert torch.allclose(result.s, plain.s, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spectrum", "shape"),
    [*((s, (N, 700)) for s in ("flat", "rank 1", *HARD)), *((s, (700, N)) for s in HARD)],
    ids=str,
)
def test_largest_vectors_without_others(monkeypatch, spectrum, shape):
    monkeypatch.setattr(gram, "SUBSET_FROM", 1)
    monkeypatch.setattr(gram, "ALL_CORES", torch.get_num_threads())
    whole = torch.linalg.eigh
    calls = []
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda *args, **options: calls.append(1) or whole(*args, **options)
    )
    matrix = oracles.with_spectrum(ADVERSARIAL[spectrum], *shape, seed=6)
    for top in (1, K):
        factors = decompose(torch.from_numpy(matrix), "gram", top, vectors=True)
        check(factors, matrix)
        check_vectors(factors, matrix)
        assert factors.energy_error == pytest.approx(
            decompose(torch.from_numpy(matrix), "gram", top).energy_error
        )
        u, vh = factors.u.numpy(), factors.vh.numpy()
        assert max(np.abs(q.T @ q - np.eye(top)).max() for q in (u, vh.T)) < 1e-10
        core = u.T @ matrix @ vh.T
        assert np.abs(core - np.diag(factors.s.numpy())).max() <= 1e-7 * factors.s.max()
    assert (
        len(calls) == 0 or spectrum == "flat"
    )  # of 600 equal values bisection may find fewer than asked for


@pytest.mark.parametrize("failure", ["raises", "finds fewer"])
def test_all_vectors_where_largest_cannot_be_had(monkeypatch, failure):
    monkeypatch.setattr(gram, "SUBSET_FROM", 1)
    monkeypatch.setattr(gram, "ALL_CORES", torch.get_num_threads())

    def fails(a, **options):
        if failure == "raises":
            raise np.linalg.LinAlgError("did not converge")
        return np.ones(3), np.ones((len(a), 3))

    monkeypatch.setattr("scipy.linalg.eigh", fails)
    matrix = oracles.with_spectrum(SPECTRA["power law"], 40, 60, seed=2)
    factors = decompose(torch.from_numpy(matrix), "gram", 5, vectors=True)
    check(factors, matrix)
    check_vectors(factors, matrix)
    assert len(factors.s) == 5


def test_tighter_tolerance_is_met_or_handed_over():
    matrix = torch.from_numpy(oracles.with_spectrum(1 / INDEX, N, N, 0))
    assert decompose(matrix, "krylov", top=K, tol=1e-9).energy_error <= 1e-9


# Factored: exact without forming the product.


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 40), r=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_factored_equals_dense(m, n, r, seed):
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((m, r)), rng.standard_normal((r, n))
    factors = decompose_factored(torch.from_numpy(b), torch.from_numpy(a), vectors=True)
    check(factors, b @ a)
    assert factors.complete
    assert np.abs((factors.u * factors.s @ factors.vh).numpy() - b @ a).max() <= 1e-12 * max(
        1, np.abs(b @ a).max()
    )


def test_factored_with_dead_and_repeated_columns():
    b, a = torch.zeros(9, 4), torch.randn(4, 7)
    assert not decompose_factored(b, a).s.any()
    assert decompose_factored(b, a).energy_error == 0
    b = torch.ones(9, 4, dtype=torch.float64)
    factors = decompose_factored(b, torch.ones(4, 7, dtype=torch.float64), top=2)
    assert factors.s.tolist() == pytest.approx([4 * np.sqrt(63), 0], abs=1e-9)
    assert not factors.complete


def test_factored_where_factors_cancel():
    """B·A is far smaller than B and A: the bound grows with it and stays true."""
    rng = np.random.default_rng(3)
    b = np.c_[rng.standard_normal((30, 1)), np.zeros((30, 1))]
    b[:, 1] = b[:, 0] * (1 + 1e-7)
    a = np.r_[rng.standard_normal((1, 20)), np.zeros((1, 20))]
    a[1] = -a[0]
    check(decompose_factored(torch.from_numpy(b), torch.from_numpy(a)), b @ a, tolerance=1e-6)


# The ladder, and requests that make no sense.


def test_next_driver_is_used_and_named(monkeypatch):
    matrix = np.random.default_rng(0).standard_normal((20, 30))
    monkeypatch.setattr(torch.linalg, "svdvals", fails)
    monkeypatch.setattr(torch.linalg, "svd", fails)
    for vectors in (False, True):
        factors = decompose(torch.from_numpy(matrix), "exact", vectors=vectors)
        assert factors.method == "exact:gesvd"
        check(factors, matrix)
    monkeypatch.setattr("scipy.linalg.svd", fails)
    with pytest.raises(InputError, match="did not converge"):
        decompose(torch.from_numpy(matrix), "exact")


def test_invalid_requests_are_refused():
    matrix = torch.ones(3, 3)
    with pytest.raises(UsageError, match="--svd"):
        decompose(matrix, "magic")
    with pytest.raises(UsageError, match="--top"):
        decompose(matrix, "krylov")
    with pytest.raises(UsageError, match="--top"):
        decompose(matrix, top=0)
    with pytest.raises(UsageError, match="--tol"):
        decompose(matrix, tol=0)
    with pytest.raises(ValueError, match="matrix"):
        decompose(torch.ones(0, 3))
