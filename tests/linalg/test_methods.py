"""Every method against float64 NumPy, and every bound against the error it bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.errors import UsageError
from lora_diag.linalg import METHODS, decompose
from tests import oracles

NAMES = [name for name, _ in METHODS]

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


def check(matrix: np.ndarray, method: str, top: int | None = None) -> None:
    """Hold a method's answer for the stored matrix against LAPACK's in float64, and its bound against the truth."""
    factors = decompose(torch.from_numpy(matrix), method, top)
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    kept = s[: len(factors.s)]
    assert factors.complete == (len(factors.s) == min(matrix.shape))
    assert np.all(np.diff(factors.s.numpy()) <= 0)
    if s[0] == 0:
        assert not factors.s.any()
        assert factors.energy_error == 0
        return
    assert np.abs(factors.s.numpy() - kept).max() <= 1e-6 * s[0]
    total = (s**2).sum()
    error = np.abs(np.cumsum(factors.s.numpy() ** 2) - np.cumsum(kept**2)).max() / total
    assert error <= max(factors.energy_error, 1e-15)
    assert factors.energy_error <= 1e-8


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", [*NAMES, "auto"])
def test_methods_on_hard_spectra(method, spectrum, shape, dtype):
    check(oracles.with_spectrum(SPECTRA[spectrum], *shape, seed=5).astype(dtype), method)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 2), (1025, 3), (2, 1100)], ids=str)
def test_small_and_thin_matrices(method, shape):
    check(np.random.default_rng(1).standard_normal(shape).astype(np.float32), method)


@pytest.mark.parametrize("method", NAMES)
def test_top_keeps_the_largest(method):
    matrix = oracles.with_spectrum(SPECTRA["power law"], 40, 60, seed=2)
    for top in (1, 7, 39, 40, 100):
        check(matrix, method, top)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 30), n=st.integers(1, 30), rank=st.integers(0, 30), seed=st.integers(0, 10**6))
def test_laws_of_singular_values(m, n, rank, seed):
    rng = np.random.default_rng(seed)
    s = np.sort(rng.exponential(size=min(rank, m, n)))[::-1]
    matrix = oracles.with_spectrum(s, m, n, seed)
    for method in NAMES:
        values = decompose(torch.from_numpy(matrix), method).s.numpy()
        transposed = decompose(torch.from_numpy(matrix.T.copy()), method).s.numpy()
        rotation, _ = np.linalg.qr(rng.standard_normal((m, m)))
        rotated = decompose(torch.from_numpy(rotation @ matrix), method).s.numpy()
        scale = max(1e-300, values.max())
        assert np.abs(values - transposed).max() <= 1e-6 * scale
        assert np.abs(values - rotated).max() <= 1e-6 * scale


def test_auto_takes_lapack_for_small_matrices_and_gram_for_the_rest():
    rng = np.random.default_rng(0)
    assert decompose(torch.from_numpy(rng.standard_normal((64, 500)))).method.startswith("exact")
    assert decompose(torch.from_numpy(rng.standard_normal((200, 300)))).method == "gram"


def test_requests_that_make_no_sense():
    matrix = torch.ones(3, 3)
    with pytest.raises(UsageError, match="--method"):
        decompose(matrix, "magic")
    with pytest.raises(UsageError, match="--top"):
        decompose(matrix, top=0)
    with pytest.raises(ValueError, match="matrix"):
        decompose(torch.ones(0, 3))
