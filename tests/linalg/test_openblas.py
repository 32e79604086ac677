"""Eigenvalue solvers of OpenBLAS, compared with NumPy's decomposition of the whole matrix."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.linalg import openblas
from lora_diag.linalg.exact import decompose_gram

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not openblas.FOUND, reason="NumPy is not linked to OpenBLAS here")


@given(
    n=st.integers(1, 60), top=st.integers(1, 60), rank=st.integers(0, 60), seed=st.integers(0, 99)
)
def test_largest_eigenpairs_are_those_of_all(n, top, rank, seed):
    top = min(top, n)
    x = np.random.default_rng(seed).standard_normal((rank, n))
    gram = x.T @ x
    found = openblas.largest_eigenpairs(torch.from_numpy(np.tril(gram)), top)
    if found is None:  # equal values may not be separable
        return
    values, vectors = (each.numpy() for each in found)
    tolerance = 1e-13 * max(1.0, np.abs(gram).sum())
    np.testing.assert_allclose(values, np.linalg.eigvalsh(gram)[n - top :], rtol=0, atol=tolerance)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(top), atol=1e-12)
    np.testing.assert_allclose(gram @ vectors, vectors * values, rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        openblas.eigenvalues(torch.from_numpy(np.tril(gram)))[n - top :], values, atol=tolerance
    )


@pytest.mark.parametrize("top", [0, -1, 4])
def test_number_of_eigenpairs_out_of_range_is_refused(top, capfd):
    with pytest.raises(ValueError, match=f"top {top}"):
        openblas.largest_eigenpairs(torch.eye(3, dtype=torch.float64), top)
    assert capfd.readouterr() == ("", "")


def test_gram_is_the_same_without_openblas(monkeypatch):
    matrix = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    fro = float(matrix.double().norm())
    runs = [
        decompose_gram(matrix, fro, top, vectors) for top, vectors in ((None, False), (8, True))
    ]
    monkeypatch.setattr(openblas, "FOUND", ())
    for run, top, vectors in zip(runs, (None, 8), (False, True), strict=True):
        other = decompose_gram(matrix, fro, top, vectors)
        torch.testing.assert_close(run.s, other.s, rtol=1e-12, atol=0)
        assert run.complete == other.complete
        if vectors:
            u, vh = other.vectors
            torch.testing.assert_close(
                run.vectors[0] * run.s @ run.vectors[1], u * other.s @ vh, rtol=0, atol=1e-9
            )
            assert run.rest is None
            assert len(other.rest) == 292


def test_threads_of_openblas_are_restored():
    count, setting = openblas.FOUND[0], openblas.FOUND[1]
    before = count()
    gram = torch.eye(200, dtype=torch.float64)
    setting(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(
                found is not None
                for found in pool.map(lambda _: openblas.largest_eigenpairs(gram + 0, 1), "abcd")
            )
        assert count() == 3
    finally:
        setting(before)


@pytest.mark.slow
def test_bytes_do_not_depend_on_threads_of_openblas():
    code = """if True:
        import hashlib, torch
        from lora_diag.linalg.exact import decompose_gram
        a = torch.randn(700, 576, generator=torch.Generator().manual_seed(0))
        one, two = decompose_gram(a, 1.0), decompose_gram(a, 1.0, 8, True)
        parts = [part.contiguous().numpy().tobytes() for part in (one.s, two.s, *two.vectors)]
        print(hashlib.sha256(b"".join(parts)).hexdigest())"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            check=True,
        ).stdout
        for threads in ("1", "3")
    }
    assert len(hashes) == 1
    assert len(hashes.pop()) == 2 * hashlib.sha256().digest_size + 1
