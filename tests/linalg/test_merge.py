"""The entrywise check of a merge against roundings made in NumPy, bit by bit."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.linalg.merge import MergeRounding, Product, Whole, check_merge, shortest_dtype, ulp
from tests.oracles import bf16

# dtype -> NumPy's rounding to it (as float64), unit roundoff, smallest number.
ROUND = {
    torch.float32: (lambda x: x.astype(np.float32).astype(np.float64), 2.0**-24, 2.0**-149),
    torch.float16: (lambda x: x.astype(np.float16).astype(np.float64), 2.0**-11, 2.0**-24),
}


def bf16_of_float64(x: np.ndarray) -> np.ndarray:
    """Round float64 to bfloat16 in one step: to odd in float32 first, so that no tie is rounded
    twice.
    """
    nearest = x.astype(np.float32)
    wrong_side = np.abs(nearest.astype(np.float64)) > np.abs(x)
    toward_zero = np.where(wrong_side, np.nextafter(nearest, np.float32(0)), nearest)
    inexact = toward_zero.astype(np.float64) != x
    odd = (toward_zero.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32)
    return bf16(odd).astype(np.float64)


ROUND[torch.bfloat16] = (bf16_of_float64, 2.0**-8, 2.0**-133)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


@st.composite
def problems(draw):
    """W, B, A of random sizes over many orders of magnitude, W already in the dtype."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    m, n, r = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([*ROUND]))
    to = ROUND[dtype][0]
    w = to(rng.standard_normal((m, n)) * 0.02)
    b = (
        (rng.standard_normal((m, r)) * 10.0 ** draw(st.integers(-5, -1)))
        .astype(np.float32)
        .astype(np.float64)
    )
    a = (rng.standard_normal((r, n)) * 0.1).astype(np.float32).astype(np.float64)
    return dtype, w, b, a


def merged(path: str, dtype, w, b, a, s):
    """Merge as a real merger does, rounding in NumPy; B without its scaling s."""
    to = ROUND[dtype][0]
    single = ROUND[torch.float32][0]
    if path == "exact":
        return to(w + s * (b @ a))
    if path == "float32 product":
        return to(single(w + single(single(b @ a) * s)))
    if path == "rounded twice":
        return to(w + to(single(single(b @ a) * s)))
    if path == "scaled in the dtype":
        return to(w + to(to(single(b @ a)) * s))
    assert path == "factors cast"
    return to(w + to(to(to(b) @ to(a)) * s))


PATHS = ("exact", "float32 product", "rounded twice", "scaled in the dtype", "factors cast")


def rounding_of(dtype, s=1.0) -> MergeRounding:
    return MergeRounding(dtype, ROUND[dtype][1], cast=dtype != torch.float32, scale=s)


def counted(dtype, w, m, b, a, s=1.0):
    stored_w, stored_m, left, right = tensors(w, m, b * s, a)
    block = (stored_w.to(dtype), stored_m.to(dtype), None)
    return check_merge([block], tuple(w.shape), Product(left, right), rounding_of(dtype, s))


@settings(deadline=None, max_examples=150)
@given(
    problems(), st.sampled_from(PATHS), st.sampled_from([0.5, 1.0, 2.0, 2.5, 11.313708498984761])
)
def test_every_documented_merge_is_correct(problem, path, s):
    dtype, w, b, a = problem
    m = merged(path, dtype, w, b, a, s)
    result = counted(dtype, w, m, b, a, s)
    assert (result.count, result.drifted) == (0, False)


@settings(deadline=None, max_examples=150)
@given(
    problems(),
    st.sampled_from(["exact", "rounded twice"]),
    st.sampled_from([0.0, 2.0, -1.0, 0.5, 4.0, 0.9]),
    st.sampled_from([1.0, 2.0]),
)
def test_wrong_scale_above_rounding_fails(problem, path, factor, s):
    dtype, w, b, a = problem
    m = merged(path, dtype, w, b * factor, a, s)
    change = s * (b @ a)
    u, small = ROUND[dtype][1], ROUND[dtype][2]
    product = s * (np.abs(b) @ np.abs(a))
    grain = 2 * u * np.maximum.reduce([np.abs(w), np.abs(m), np.abs(change)]) + small
    # Half a spacing for each of the two roundings of M that could hide it, and all that ΔW itself
    # may be off by.
    above = np.abs((factor - 1) * change) > grain + 1.02 * (
        2 * u * np.abs(change) + (6 * u + 2.0**-20) * product
    )
    above &= np.abs((factor - 1) * change) > 20 * small * (
        2 + s + np.abs(b).sum() + np.abs(a).sum()
    )
    result = counted(dtype, w, m, b, a, s)
    assert result.count >= int(above.sum()) > 0 or not above.any()


def test_counts_equal_direct_count():
    """Planted errors of one spacing, so many as were planted, where they were planted."""
    rng = np.random.default_rng(0)
    w = bf16_of_float64(rng.standard_normal((40, 30)) * 0.02)
    b, a = rng.standard_normal((40, 3)) * 1e-4, rng.standard_normal((3, 30)) * 0.1
    m = bf16_of_float64(w + b @ a)
    at = [(3, 4), (3, 5), (17, 29)]
    for row, column in at:
        m[row, column] += 2 * float(ulp(torch.tensor(m[row, column]), torch.bfloat16))
    result = counted(torch.bfloat16, w, m, b, a)
    assert result.count == 3
    assert result.beyond[0].nonzero().flatten().tolist() == [3, 17]
    assert result.beyond[1].nonzero().flatten().tolist() == [4, 5, 29]
    assert 1.5 < result.worst < 2.5


def test_merge_sums_equal_numpy():
    rng = np.random.default_rng(1)
    w = bf16_of_float64(rng.standard_normal((50, 700)) * 0.02)
    b, a = rng.standard_normal((50, 3)) * 3e-3, rng.standard_normal((3, 700)) * 0.1
    m, d = bf16_of_float64(w + b @ a), b @ a
    stored_w, stored_m, left, right = tensors(w, m, b, a)
    blocks = [
        (stored_w[i:j].bfloat16(), stored_m[i:j].bfloat16(), None)
        for i, j in pairwise([0, 7, 30, 50])
    ]
    result = check_merge(blocks, (50, 700), Product(left, right), rounding_of(torch.bfloat16))
    o = m - w
    expected = [(o * d).sum(), (d**2).sum(), (o**2).sum(), ((o - d) ** 2).sum(), (w**2).sum()]
    ours = [result.inner, result.expected, result.observed, result.residual, result.base]
    assert np.allclose(ours, expected, rtol=1e-12)
    assert (result.unchanged, result.entries) == (int((m == w).sum()), m.size)
    assert (
        0.99 * (m != w).sum() < result.moved <= (m != w).sum()
    )  # tiny entries may move within ½ulp(M)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_rows_taken_from_addend_equal_rows_of_matrix(factor):
    rng = np.random.default_rng(5)
    b, a = rng.standard_normal((9, 2)), rng.standard_normal((2, 4))
    delta, rows = factor * (b @ a), np.array([0, 3, 8])
    whole = torch.from_numpy(b @ a)
    for addend in (Product(*tensors(b, a)), Whole((9, 4), lambda first, last: whole[first:last])):
        taken = addend.times(factor).take(torch.from_numpy(rows))
        np.testing.assert_allclose(taken.rows(0, 3), delta[rows], rtol=1e-14)
        np.testing.assert_allclose(taken.rows(1, 2), delta[rows[1:2]], rtol=1e-14)


def test_unadapted_rows_are_counted_also_where_equal():
    w = np.random.default_rng(6).standard_normal((3000, 8)).astype(np.float32)
    m = w.copy()
    m[2500, 3] += 1
    addend = Product(torch.zeros(3000, 0).double(), torch.zeros(0, 8).double())
    check = check_merge(
        [(*tensors(w, m), None)], w.shape, addend, MergeRounding(torch.float32, 2**-24)
    )
    assert (check.entries, check.unchanged, check.count, check.moved) == (w.size, w.size - 1, 1, 1)
    assert check.beyond[0].nonzero().tolist() == [[2500]]
    assert (check.base, check.observed) == pytest.approx(
        ((w.astype(float) ** 2).sum(), 1), rel=1e-6
    )


def test_small_update_is_rounded_entrywise():
    """ΔW = 0.6 spacings everywhere: every entry must move.

    A tolerance of one ulp would let a dropped merge pass.
    """
    w = np.full((8, 8), 1.0)
    b, a = np.full((8, 1), 0.6 * 2.0**-7), np.ones((1, 8))
    assert counted(torch.bfloat16, w, bf16_of_float64(w + b @ a), b, a).count == 0
    assert counted(torch.bfloat16, w, w, b, a).count == 64


def test_verify_merge_allows_base_in_dtype_of_merge():
    rng = np.random.default_rng(2)
    w = (rng.standard_normal((16, 16)) * 0.02).astype(np.float32).astype(np.float64)
    b, a = rng.standard_normal((16, 2)) * 0.01, rng.standard_normal((2, 16)) * 0.1
    m = bf16_of_float64(bf16_of_float64(w) + b @ a)
    stored_w, stored_m, left, right = tensors(w, m, b, a)
    block = (stored_w.float(), stored_m.bfloat16(), None)
    how = rounding_of(torch.bfloat16)
    assert check_merge([block], (16, 16), Product(left, right), how).count > 0
    how = MergeRounding(torch.bfloat16, how.roundoff, True, bases=(torch.bfloat16,))
    assert check_merge([block], (16, 16), Product(left, right), how).count == 0


def test_sum_rounded_to_float32_on_way_may_lose_tie():
    """W is between two bf16 numbers, and ΔW moves it past the middle by less than
    float32 resolves.
    """
    w, delta = torch.tensor([[1 + 2.0**-8]]), torch.tensor([[2.0**-30]], dtype=torch.float64)
    m = (w + delta.float()).bfloat16()
    assert m.item() == 1.0 != bf16_of_float64((w.double() + delta).numpy()).item()
    addend = Product(torch.ones(1, 1, dtype=torch.float64), delta)
    assert check_merge([(w, m, None)], (1, 1), addend, rounding_of(torch.bfloat16)).count == 0


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, np.float32), (torch.float16, np.float16)]
)
def test_spacing_equals_numpy(dtype, kind):
    values = np.concatenate(
        [np.random.default_rng(3).standard_normal(500) * 10.0**k for k in range(-7, 4)]
    )
    values = np.concatenate([values, [0.0, 1.0, -2.0, 2.0**-24, 6e-8]]).astype(kind)
    assert (
        ulp(torch.from_numpy(values.astype(np.float64)), dtype).tolist()
        == np.spacing(np.abs(values)).tolist()
    )


def test_products_and_matrices_agree_within_tolerance():
    torch.manual_seed(0)
    product = Product(
        torch.randn(6, 2, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    )
    matrix = product.rows(0, 6)
    whole = Whole((6, 6), lambda first, last: matrix[first:last])
    for left, right in (
        (product, whole),
        (product.times(2.0), whole.times(2.0)),
        (product.transpose(), whole.transpose()),
        (product.swap_halves(), whole.swap_halves()),
    ):
        assert torch.allclose(left.rows(1, 5), right.rows(1, 5))
    assert torch.equal(product.swap_halves().rows(0, 6), torch.cat([matrix[3:], matrix[:3]]))


def test_numbers_of_shorter_dtype_are_recognised():
    values = torch.randn(1000)
    assert shortest_dtype(values) == torch.float32
    assert shortest_dtype(values.bfloat16().float()) == torch.bfloat16
    assert shortest_dtype(values.half().float()) == torch.float16
    assert shortest_dtype(values.half()) == torch.float16
    assert (
        shortest_dtype((values * 1e-7).half()) == torch.float16
    )  # subnormal numbers have few bits


@pytest.mark.parametrize(("side", "bad"), [("BASE", 0), ("MERGED", 1)])
def test_non_finite_entry_is_named(side, bad):
    sides = [torch.ones(2, 3), torch.ones(2, 3)]
    sides[bad][1, 2] = float("nan")
    empty = Product(torch.zeros(2, 0, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64))
    result = check_merge([(*sides, None)], (2, 3), empty, rounding_of(torch.float32))
    assert (result.base_non_finite, result.non_finite)[bad] == f"{side} holds nan at [1, 2]"


@pytest.mark.parametrize("factor", [1.0, 1.05, 0.95])
def test_scale_within_entry_rounding_is_detected(factor):
    """With r = 512, |B||A| is 14 times |ΔW|, and the bound for factors that were cast lets 5% pass
    everywhere.
    """
    rng = np.random.default_rng(0)
    w = bf16_of_float64(rng.standard_normal((96, 96)) * 0.02)
    b, a = rng.standard_normal((96, 512)) * 0.05, rng.standard_normal((512, 96)) * 0.1
    for change in (b @ a, bf16_of_float64(b) @ bf16_of_float64(a)):
        result = counted(torch.bfloat16, w, bf16_of_float64(w + factor * change), b, a)
        assert result.count == 0
        assert result.drifted == (factor != 1.0)
