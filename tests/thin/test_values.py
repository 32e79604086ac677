"""Singular values of thin factors with NumPy, against float64 SVDs of the products."""

import os
import subprocess
import sys
from decimal import Decimal, getcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_diag import thin
from lora_diag.thin import MAX_RANK
from tests.served import ROOT


def thin_values(b: np.ndarray, a: np.ndarray, factor: float = 1.0):
    """Return the values of one product; None if a number is not finite."""
    left, right = thin.compute_triangle(b), thin.compute_triangle(a.T)
    if left is None or right is None:
        return None
    result = thin.thin_values(left, right, factor)
    if not np.isfinite(result.fro[0]):
        return None
    return thin.ThinValues(result.s[0], float(result.energy_error[0]), float(result.fro[0]), None)


def factors(m: int, n: int, rank: int, decay: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return factors whose columns and rows shrink by ``decay`` each, and are turned into each
    other in B.
    """
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
    b = rng.standard_normal((m, rank)) * decay ** np.arange(rank) @ turn
    return b, turn.T @ rng.standard_normal((rank, n))


@given(
    m=st.integers(1, 300),
    n=st.integers(1, 80),
    rank=st.integers(1, MAX_RANK),
    decay=st.sampled_from([1.0, 0.9, 0.3]),
    scale=st.sampled_from([1.0, -2.0, 1e-30]),
    seed=st.integers(0, 99),
)
def test_values_equal_product(m, n, rank, decay, scale, seed):
    b, a = factors(m, n, rank, decay, seed)
    result = thin_values(b, a, scale)
    due = np.linalg.svd(scale * (b @ a), compute_uv=False)[: min(m, n, rank)]
    assert len(result.s) == len(due)
    assert np.abs(result.s - due).max() <= 1e-12 * due[0]
    energy = np.cumsum(due**2) / (due**2).sum()
    assert (
        np.abs(np.cumsum(result.s**2) / result.fro**2 - energy).max() <= result.energy_error + 1e-13
    )
    assert result.energy_error <= 1e-8
    assert result.fro == pytest.approx(np.linalg.norm(due), rel=1e-12)


def by_cholesky(x: np.ndarray):
    result, conditioned = thin.reduce_grams(thin.compute_grams(x[None]))
    return result, bool(conditioned[0])


def test_both_ways_to_triangle_agree_within_bounds():
    """Cholesky where the factor is conditioned, reflections else; on the same factor both hold."""
    x = np.random.default_rng(0).standard_normal((3000, 16)) @ np.diag(2.0 ** -np.arange(16))
    one, conditioned = by_cholesky(x)
    assert conditioned
    other = thin._reduce_by_reflections(x)
    due = np.linalg.svd(x, compute_uv=False)
    for result in (one, other):
        s = np.linalg.svd(result.r[0], compute_uv=False) * result.scale
        slack = result.relative * due + result.backward * np.linalg.norm(x) + 1e-15 * due[0]
        assert (np.abs(s - due) <= slack).all()
    repeated = np.hstack([x, x[:, :1] * (1 + 1e-9)])
    assert not by_cholesky(repeated)[1]
    assert thin.compute_triangle(repeated).relative == 0


def test_energies_are_within_their_bound_or_refused():
    """Also where columns differ by 1e6 in size or rows of A are alike; NaN, zero and no Cholesky
    factor are refused.
    """
    pairs = [factors(700, 120, 8, decay, 9) for decay in (1.0, 0.5, 0.1, 1.0, 1.0, 1.0)]
    sizes = 10.0 ** np.linspace(-3, 3, 8)
    pairs.append((pairs[0][0] * sizes, pairs[0][1] / sizes[:, None]))
    pairs[0][1][5] = pairs[0][1][4] + 1e-6 * pairs[0][1][5]
    pairs[3][0][:, 2], pairs[5][0][7, 1] = 0.0, np.nan
    left, right = (
        thin.compute_grams(np.stack([b for b, _ in pairs])),
        thin.compute_grams(np.stack([a.T for _, a in pairs])),
    )
    scale = np.linspace(-2, 3, 7)
    right.products[4] = 1.0
    result = thin.thin_energies(left, right, scale)
    assert np.flatnonzero(result.energy_error > thin.MAX_GRAM_ERROR).tolist() == [3, 4, 5]
    for i in (0, 1, 2, 6):
        b, a = pairs[i]
        u, due, _ = np.linalg.svd(scale[i] * (b @ a), full_matrices=False)
        assert result.fro[i] == pytest.approx(np.linalg.norm(due), rel=1e-12)
        energy = np.cumsum(due[:8] ** 2) / (due**2).sum()
        assert (
            np.abs(np.cumsum(result.s[i] ** 2) / result.fro[i] ** 2 - energy)
            <= result.energy_error[i]
        ).all()
        assert np.abs((b @ result.mix[i])[:, :2].T @ u[:, :2]) == pytest.approx(np.eye(2), abs=1e-9)
        alone = thin.thin_energies(
            thin.compute_grams(b[None]),
            thin.compute_grams(np.ascontiguousarray(a.T)[None]),
            scale[i : i + 1],
        )
        for name in ("s", "energy_error", "fro", "mix"):
            assert (getattr(result, name)[i] == getattr(alone, name)[0]).all()


@pytest.mark.parametrize(("rank", "tilt"), [(16, 0.0), (64, 0.0), (16, 0.8), (64, 0.2)])
def test_condition_is_bounded_and_factors_of_rank_64_are_good(rank, tilt):
    rng = np.random.default_rng(10)
    x = rng.standard_normal((3000, rank)) + tilt * rng.standard_normal((3000, 1))
    grams = thin.compute_grams(x[None])
    result, conditioned = thin.reduce_grams(grams)
    least = rank * (grams.terms[0] + rank + 2) * thin.EPS / result.relative[0]
    unit = x / np.linalg.norm(x, axis=0)
    true = np.linalg.eigvalsh(unit.T @ unit)[0]
    assert true / 16 <= least <= true * (1 + 1e-12)
    assert conditioned[0]


@pytest.mark.parametrize("size", [1.0, 1e-16])
def test_energies_of_dependent_rows_are_refused(size):
    """Of A with two opposite rows AAᵀ has no Cholesky factor, however small A is."""
    refused = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        b, a = rng.standard_normal((64, 4)), rng.standard_normal((4, 64)) * size
        a[1] = -a[0]
        left, right = thin.compute_grams(b[None]), thin.compute_grams(a.T[None])
        result = thin.thin_energies(left, right, np.ones(1))
        refused += result.energy_error[0] == 1.0
        true = np.linalg.norm(b @ a)
        error = abs(result.fro[0] ** 2 / true**2 - 1)
        assert error <= result.energy_error[0] + 1e-12 or result.energy_error[0] == 1.0
    assert refused


def test_small_values_are_accurate_relative_to_themselves():
    """σ_i = 10^−i, i = 0…15: an eigenvalue of ΔWᵀΔW loses those below 1e-8."""
    rng = np.random.default_rng(1)
    b, a = (np.linalg.qr(rng.standard_normal((1000, 16)))[0] for _ in range(2))
    s = 10.0 ** -np.arange(16)
    assert thin_values(b * s, a.T).s == pytest.approx(s, rel=1e-8)


def test_gram_error_is_within_bound():
    x = np.random.default_rng(2).standard_normal((1500, 3)).astype(np.float32).astype(np.float64)
    getcontext().prec = 60
    columns = [[Decimal(value) for value in column] for column in x.T.tolist()]
    stack = thin.compute_grams(x[None])
    result, terms = stack.products[0], int(stack.terms[0])
    for i in range(3):
        for j in range(3):
            exact = sum(p * q for p, q in zip(columns[i], columns[j], strict=True))
            size = np.linalg.norm(x[:, i]) * np.linalg.norm(x[:, j])
            assert abs(Decimal(float(result[i, j])) - exact) <= Decimal(terms * thin.EPS * size)


@pytest.mark.parametrize("size", [1e-300, 1e-180, 1e180])
def test_ends_of_range_are_measured_or_refused(size):
    b, a = factors(300, 200, 4, 0.9, 3)
    due = np.linalg.svd(b @ a, compute_uv=False)[:4]
    assert thin_values(b * size, a / size).s == pytest.approx(due, rel=1e-11)
    assert thin_values(b * 1e200, a * 1e200) is None
    assert thin_values(b, a, np.inf) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_factor_is_refused(bad):
    b, a = factors(40, 30, 2, 1.0, 4)
    a[1, 7] = bad
    assert thin_values(b, a) is None
    assert thin_values(a.T, b.T) is None


def test_update_of_zero_has_zeros():
    result = thin_values(np.zeros((50, 3)), np.ones((3, 20)))
    assert (result.s.tolist(), result.energy_error, result.fro) == ([0.0] * 3, 0.0, 0.0)


BYTES = """
import hashlib, numpy
from lora_diag.thin import compute_grams, thin_energies, thin_values, compute_triangle
rng, found = numpy.random.default_rng(0), hashlib.sha256()
for rank, m, n in ((16, 50000, 129), (64, 11008, 1111), (33, 700, 64)):
    b, a = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
    for factor in (b, b[:, :1] + 1e-9 * b):
        values = thin_values(compute_triangle(factor), compute_triangle(a.T))
        found.update(values.s.tobytes())
    values = thin_energies(compute_grams(b[None]), compute_grams(a.T[None]), numpy.ones(1))
    found.update(values.s.tobytes() + values.mix.tobytes())
print(found.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.3.0",
    reason="OpenBLAS starts threads for small matrices",
)
def test_bytes_do_not_depend_on_threads():
    """Products and decompositions stay below the sizes from which OpenBLAS starts threads."""
    result = set()
    for threads in ("1", "2"):
        env = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", BYTES], env=env, capture_output=True, text=True, check=True
        )
        result.add(done.stdout)
    assert len(result) == 1
