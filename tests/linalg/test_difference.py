"""ΔW and its norms in one pass, against NumPy float64."""

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.errors import UsageError
from lora_diag.linalg.devices import resolve_device
from lora_diag.linalg.difference import difference
from tests.conftest import as_numpy

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def in_blocks(base, tuned, rows):
    return ((base[i : i + rows], tuned[i : i + rows]) for i in range(0, len(base), rows))


@pytest.mark.parametrize("before", DTYPES, ids=str)
@pytest.mark.parametrize("after", DTYPES, ids=str)
def test_norms_and_entries_for_every_pair_of_dtypes(before, after):
    torch.manual_seed(0)
    base = (torch.randn(50, 30) * 0.02).to(before)
    tuned = (base.to(torch.float64) + torch.randn(50, 30) * 1e-3).to(after)
    tuned[:10] = base[:10].to(after)
    expected = as_numpy(tuned) - as_numpy(base)
    result = difference(in_blocks(base, tuned, 7), (50, 30), CPU)
    assert result.fro == pytest.approx(np.sqrt((expected**2).sum()), rel=1e-7)
    assert result.base_fro == pytest.approx(np.sqrt((as_numpy(base) ** 2).sum()), rel=1e-12)
    assert np.abs(as_numpy(result.matrix) - expected).max() <= 1e-7 * np.abs(expected).max()
    assert result.unchanged == np.mean(as_numpy(tuned) == as_numpy(base))
    assert result.non_finite is None


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    piece=st.integers(1, 300),
    shape=st.sampled_from(((40, 5), (5, 40))),
    seed=st.integers(0, 99),
)
def test_result_is_independent_of_blocks(rows, piece, shape, seed):
    rng = torch.Generator().manual_seed(seed)
    base, tuned = (torch.randn(shape, generator=rng).bfloat16() for _ in range(2))
    step = torch.rand(shape, generator=rng).add_(0.5)
    whole = difference(in_blocks(base, tuned, 40), shape, CPU, steps=iter(((None, step),)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("lora_diag.linalg.difference"), "PIECE_ENTRIES", piece)
        result = difference(
            in_blocks(base, tuned, rows),
            shape,
            CPU,
            steps=((None, part) for part in torch.split(step, rows)),
        )
    assert torch.equal(result.matrix, whole.matrix)
    assert result.fro == pytest.approx(whole.fro, rel=1e-14)
    assert result.rounding.bound == pytest.approx(whole.rounding.bound, rel=1e-6)
    assert result.matrix.T.is_contiguous() == (shape[0] < shape[1])


@pytest.mark.slow
def test_norm_of_large_matrix_is_accurate():
    """torch's own float32 norm is off by 8e-4 here."""
    torch.manual_seed(0)
    base = torch.zeros(4096, 4096, dtype=torch.bfloat16)
    tuned = torch.randn(4096, 4096).to(torch.bfloat16)
    result = difference(in_blocks(base, tuned, 512), (4096, 4096), CPU)
    assert result.fro == pytest.approx(
        math.sqrt(float((tuned.to(torch.float64) ** 2).sum())), rel=1e-9
    )


def test_minus_zero_is_a_change_within_dtype():
    result = difference([(torch.tensor([[0.0, 1.0]]), torch.tensor([[-0.0, 1.0]]))], (1, 2), CPU)
    assert result.unchanged == 0.5
    assert result.fro == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_non_finite_entry_is_named(value, side, dtype):
    pair = [torch.zeros(9, 4, dtype=dtype), torch.zeros(9, 4, dtype=dtype)]
    pair[side][5, 2] = pair[side][7, 0] = value
    result = difference(in_blocks(*pair, 2), (9, 4), CPU)
    assert result.matrix is None
    assert "[5, 2]" in result.non_finite
    assert ("BASE", "TUNED")[side] in result.non_finite


def test_overflow_of_difference_or_norm_is_reported():
    big = torch.full((2, 2), 3e38)
    assert "overflows" in difference([(-big, big)], (2, 2), CPU).non_finite
    huge = torch.full((2, 2), 1.7e308, dtype=torch.float64)
    assert "overflow" in difference([(torch.zeros_like(huge), huge)], (2, 2), CPU).non_finite


@pytest.mark.parametrize("scale", [1e-170, 1e200])
def test_norms_of_float64_far_from_one(scale):
    tuned = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64) * scale
    result = difference(in_blocks(torch.zeros_like(tuned), tuned, 1), (2, 2), CPU)
    assert result.fro == pytest.approx(5 * scale, rel=1e-14)


@pytest.mark.parametrize(
    ("word", "problem"),
    [("tpu", "use auto"), ("", "use auto"), ("cuda:99", "this torch sees"), ("mps", "no float64")],
)
def test_missing_devices_are_refused(word, problem):
    with pytest.raises(UsageError, match=f"--device {word}: .*{problem}"):
        resolve_device(word)
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_limit_of_unchanged_entries_may_exceed_float32():
    """RuntimeError: √12·rms(ΔW) in units of 2⁻²³ overflowed, where one entry moved by 10³⁶ and
    others stayed.
    """
    base = torch.full((4, 4), 1.1)  # uses all mantissa bits
    tuned = base.clone()
    tuned[0, 0] = 1.1e36
    result = difference([(base, tuned)], (4, 4), CPU)
    assert result.unchanged == 15 / 16
    assert result.rounding is not None
