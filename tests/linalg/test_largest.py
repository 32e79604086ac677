"""The lower bound of σ_1 from one pass, against float64 singular values of NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.linalg.largest import LargestValue


def bound_of(matrix, rows, dtype=torch.float32):
    stored = torch.from_numpy(matrix).to(dtype)
    largest = LargestValue(matrix.shape)
    for block in stored.split(rows):
        largest.add(block)
    exact = stored.double().numpy()
    return largest.bound(math.hypot(*exact.ravel())), float(np.linalg.norm(exact, 2))


@settings(max_examples=40)
@given(
    *[st.integers(1, 40)] * 3,
    st.sampled_from(["noise", "rank 1", "sparse", "equal", "zero rows first"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([1e-170, 1e-30, 1.0, 1e15, 1e170]),
    st.integers(0, 5),
)
def test_bound_is_at_most_largest_value(m, n, rows, kind, dtype, scale, seed):
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((m, n))
    if kind == "rank 1":
        matrix = np.outer(random.standard_normal(m), random.standard_normal(n))
    elif kind == "sparse":
        matrix *= random.random((m, n)) < 0.1
    elif kind == "equal":
        matrix = np.linalg.qr(random.standard_normal((max(m, n), max(m, n))))[0][:m, :n]
    elif kind == "zero rows first":
        matrix[: m // 2] = 0
    scale = scale if dtype == torch.float64 or 1e-100 < scale < 1e100 else 1.0
    bound, exact = bound_of(matrix * scale, rows, dtype)
    assert exact * min(m, n) ** -0.5 * 0.5 <= bound <= exact * (1 + 1e-9)


@pytest.mark.parametrize("rows", [300, 16])
def test_bound_is_close_where_one_direction_leads(rows):
    random = np.random.default_rng(1)
    spike = 60 * np.outer(random.standard_normal(300) / 17, random.standard_normal(200) / 14)
    bound, exact = bound_of(random.standard_normal((300, 200)) + spike, rows)
    assert 0.9 * exact <= bound <= exact


def test_bound_of_rounded_products_stays_below():
    """Large blocks of float32: the error of their products may exceed the distance from σ_1."""
    matrix = np.outer(np.random.default_rng(2).standard_normal(20_000), np.ones(3)) + 1e-9
    bound, exact = bound_of(matrix, 20_000)
    assert 0.99 * exact <= bound <= exact
