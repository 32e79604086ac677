"""Row blocks compared with the whole matrix and float64 NumPy; used memory compared with the
estimate.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.errors import MemoryLimitError, UsageError
from lora_diag.linalg import methods as limits
from lora_diag.linalg.methods import Allowance, decompose, decompose_streamed
from lora_diag.linalg.streamed import (
    COLUMNS,
    Streamed,
    gram_of_rows,
    merge_small_blocks,
    normal,
    times_in_float64,
)
from tests import oracles
from tests.served import peak

pytestmark = pytest.mark.slow

PLENTY = 10**9


def streamed(matrix: torch.Tensor, rows: int) -> Streamed:
    return Streamed(lambda: iter(matrix.split(rows)), tuple(matrix.shape), matrix.dtype)


def power_law(m: int, n: int, dtype=np.float32, exponent: float = 1.0) -> np.ndarray:
    return oracles.with_spectrum(np.arange(1, min(m, n) + 1) ** -exponent, m, n, seed=3).astype(
        dtype
    )


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    rows=st.integers(1, 41),
    held=st.integers(1, 9),
    columns=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_products_do_not_depend_on_blocks(m, n, rows, held, columns, seed):
    rng = np.random.default_rng(seed)
    a, x, y = (
        rng.standard_normal((m, n)),
        rng.standard_normal((n, columns)),
        rng.standard_normal((m, columns)),
    )
    blocks = streamed(torch.from_numpy(a), rows)
    close = {"rtol": 1e-12, "atol": 1e-12 * (1 + np.abs(a).sum())}
    assert np.allclose(blocks.times(torch.from_numpy(x)), a @ x, **close)
    assert np.allclose(blocks.T.times(torch.from_numpy(y)), a.T @ y, **close)
    whole = torch.from_numpy(a)
    for matrix, b, v in ((blocks, a, x), (blocks.T, a.T, y), (whole, a, x), (whole.T, a.T, y)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lora_diag.linalg.streamed.SMALL_ROWS", rows)
            patch.setattr("lora_diag.linalg.streamed.ROWS", rows)
            product, back = normal(matrix, torch.from_numpy(v))
            assert np.allclose(times_in_float64(matrix, torch.from_numpy(v)), product, **close)
        assert np.allclose(product, b @ v, **close)
        assert np.allclose(back, b.T @ (b @ v), rtol=1e-10, atol=1e-10 * (1 + np.abs(a).sum() ** 2))
    lower = np.tril(a @ a.T)
    assert np.allclose(
        np.tril(gram_of_rows(blocks, held)),
        lower,
        rtol=1e-10,
        atol=1e-10 * (1 + np.abs(lower).sum()),
    )
    assert torch.equal(
        torch.cat(list(merge_small_blocks(torch.from_numpy(a).split(rows), 7))), torch.from_numpy(a)
    )


def test_products_of_rows_longer_than_part_of_columns():
    a = np.random.default_rng(5).standard_normal((7, 2 * COLUMNS + 3))
    gram = gram_of_rows(streamed(torch.from_numpy(a), 3), 1)
    assert np.allclose(np.tril(gram), np.tril(a @ a.T), rtol=0, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    rows=st.integers(1, 61),
    dtype=st.sampled_from([np.float32, np.float64]),
    scale=st.sampled_from([1e-30, 1.0, 1e20]),
    in_place=st.booleans(),
)
def test_all_values_equal_float64_for_any_blocks(shape, rows, dtype, scale, in_place):
    matrix = (power_law(*shape) * scale).astype(dtype)
    true = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    fro = math.sqrt((true**2).sum())
    least = limits.READING_BYTES + limits.gram_bytes(shape, Allowance(0), in_place)
    result = decompose_streamed(streamed(torch.from_numpy(matrix), rows), Allowance(least), fro)
    assert result.method == "gram"
    assert result.complete
    assert np.abs(result.s.numpy() - true).max() <= 1e-7 * true[0]
    curve = np.cumsum(true**2) / fro**2
    assert (
        np.abs(np.cumsum(result.s.numpy() ** 2) / fro**2 - curve).max()
        <= result.energy_error + 1e-12
    )


def test_norm_beyond_float32_is_computed():
    matrix = (np.random.default_rng(4).uniform(-1, 1, (60, 50)) * 1e38).astype(np.float32)
    true = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    fro = math.sqrt((true**2).sum())
    assert fro > float(np.finfo(np.float32).max)
    result = decompose_streamed(
        streamed(torch.from_numpy(matrix), 20), Allowance(PLENTY, "gram"), fro
    )
    np.testing.assert_allclose(result.s, true, rtol=1e-9)
    assert result.fro == fro


@pytest.mark.parametrize("shape", [(700, 600), (600, 700)], ids=str)
@pytest.mark.parametrize("rows", [11, 256, 1000])
def test_top_values_equal_whole_matrix_with_same_certificate(shape, rows):
    matrix = power_law(*shape)
    whole = decompose(torch.from_numpy(matrix), "krylov", top=24, vectors=True)
    blocks = streamed(torch.from_numpy(matrix), rows)
    result = decompose_streamed(
        blocks, Allowance(PLENTY, "krylov", top=24, vectors=True), whole.fro
    )
    true = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:24]
    assert result.method == whole.method
    assert result.method.startswith("krylov")
    missed = (np.cumsum(true**2) - np.cumsum(result.s.numpy() ** 2)).max() / whole.fro**2
    assert -1e-12 <= missed <= result.energy_error <= 5e-4
    assert result.s.numpy() == pytest.approx(whole.s.numpy(), rel=1e-5)
    core = result.u.T.numpy() @ matrix.astype(np.float64) @ result.vh.T.numpy()
    assert np.abs(core - np.diag(result.s.numpy())).max() <= 1e-6 * true[0]
    assert (result.u.gather(0, result.u.abs().argmax(0, keepdim=True)) > 0).all()


def test_vectors_from_gram_matrix_of_row_blocks():
    for shape in ((90, 60), (60, 90)):
        matrix = power_law(*shape, dtype=np.float64)
        blocks = streamed(torch.from_numpy(matrix), 7)
        result = decompose_streamed(
            blocks, Allowance(PLENTY, "gram", vectors=True), float(np.linalg.norm(matrix))
        )
        assert np.abs((result.u * result.s @ result.vh).numpy() - matrix).max() < 1e-12


def test_flat_spectrum_falls_back_to_gram_or_states_memory():
    matrix = oracles.with_spectrum(np.ones(600), 640, 600, seed=1).astype(np.float32)
    blocks, fro = (
        streamed(torch.from_numpy(matrix), 100),
        float(np.linalg.norm(matrix.astype(np.float64))),
    )
    assert decompose_streamed(blocks, Allowance(PLENTY, top=24), fro).method == "gram"
    few = limits.READING_BYTES + limits.krylov_bytes(blocks.shape, 4, limits.first_basis(4))
    assert few < limits.READING_BYTES + limits.gram_bytes(blocks.shape, Allowance(0), in_place=True)
    with pytest.raises(
        MemoryLimitError,
        match=r"640x600: --memory leaves 5\d MB .* too flat for krylov .* give \d+ MB more",
    ):
        decompose_streamed(blocks, Allowance(few, top=4), fro)


def test_krylov_runs_where_gram_matrix_does_not_fit():
    matrix = power_law(4000, 500, exponent=2.0)  # below the order from which krylov is tried first
    blocks, fro = (
        streamed(torch.from_numpy(matrix), 300),
        float(np.linalg.norm(matrix.astype(np.float64))),
    )
    few = limits.READING_BYTES + limits.krylov_bytes(blocks.shape, 4, limits.first_basis(4))
    assert decompose_streamed(blocks, Allowance(PLENTY, top=4), fro).method == "gram"
    assert (
        limits.gram_bytes(blocks.shape, Allowance(0, top=4), in_place=True)
        > few - limits.READING_BYTES
    )
    assert decompose_streamed(blocks, Allowance(few, top=4), fro).method.startswith("krylov")


def test_oversized_layer_is_reported_before_reading():
    unread = Streamed(lambda: pytest.fail("it was read"), (128256, 8192))
    with pytest.raises(
        MemoryLimitError,
        match=r"all values take 6\d\d MB; give 32\d MB more .*, or --top 64 \(\d\d\d MB",
    ):
        decompose_streamed(unread, Allowance(300 * 10**6), 1.0)
    with pytest.raises(MemoryLimitError, match=r"exact takes .* --svd gram"):
        decompose_streamed(unread, Allowance(PLENTY, "exact"), 1.0)
    with pytest.raises(
        MemoryLimitError, match=r"at least \d+ MB; give \d+ MB more .*, or fewer values"
    ):
        decompose_streamed(unread, Allowance(100 * 10**6, top=64), 1.0)
    with pytest.raises(UsageError, match="--top 0"):
        decompose_streamed(unread, Allowance(PLENTY, top=0), 1.0)


def print_peak(job: dict) -> None:
    """Print the method by which a process decomposes a matrix, and by how many MiB its resident
    memory grows.
    """
    m, n, top, vectors, limit = map(int, job["words"])
    scale = torch.arange(1, n + 1) ** -1.0
    rows = 2**20 // n
    block = torch.randn(rows, n) * scale

    def read():  # 2^20 entries at a time, the same in every pass
        for first in range(0, m, rows):
            yield torch.cos(torch.arange(first, min(m, first + rows)))[:, None] * block[: m - first]

    warm = torch.randn(300, 300, dtype=torch.float64)
    torch.linalg.eigh(warm @ warm.T), torch.linalg.qr(warm), torch.linalg.eigvalsh(warm @ warm.T)
    fro = sum(float(block.double().square().sum()) for block in read()) ** 0.5
    before = peak(anew=True)
    allowance = Allowance(limit * 2**20, top=top or None, vectors=bool(vectors))
    result = decompose_streamed(Streamed(read, (m, n)), allowance, fro)
    raise SystemExit(f"{result.method} {(peak() - before) / 2**20}")


@pytest.mark.parametrize(
    ("shape", "top", "vectors", "limit", "method"),
    [
        ((24000, 1000), 0, 0, 80, "gram"),
        ((1000, 24000), 0, 0, 80, "gram"),
        ((24000, 1024), 24, 1, 80, "krylov"),
        ((1024, 24000), 24, 1, 80, "krylov"),
    ],
)
def test_memory_stays_within_limit(shape, top, vectors, limit, method, server, tmp_path):
    """Resident memory of a process of its own; the limit is less than the bytes of the matrix."""
    assert limit * 2**20 < 4 * math.prod(shape)
    words, prepare = (*shape, top, vectors, limit), "tests.linalg.test_limited:print_peak"
    _, _, err = server.run(words, tmp_path, environment={}, prepare=prepare)
    ran, grown = err.decode().split()
    assert ran.split(":")[0] == method
    assert float(grown) <= limit
