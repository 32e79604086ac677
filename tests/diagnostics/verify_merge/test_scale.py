"""A wrong scale is found, named and not taken for anything else; right merges in any order of
arithmetic pass.
"""

import math
import re

import numpy as np
import pytest
import torch

from benchmarks.merge_scale import ORDERS, factors, verified
from lora_diag.linalg.merge import MergeRounding, Product, check_merge

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RSLORA = 16 / math.sqrt(8)


def add_terms(w, b, a, s):
    """Add the terms of the product to W one by one in float32, as a matrix product without FMA
    does.
    """
    total = w.float()
    for k in range(b.shape[1]):
        total = total + (s * b[:, k : k + 1]) * a[k : k + 1]
    return total.to(w.dtype)


def split_terms(w, b, a, s):
    """Add partial products to W one by one in float32 (split-K)."""
    half = b.shape[1] // 2
    return add_terms(w.float() + s * (b[:, :half] @ a[:half]), b[:, half:], a[half:], s).to(w.dtype)


CORRECT = ORDERS | {"term by term": add_terms, "split terms": split_terms}


def oracle(w, m, b, a, s, u, casts):
    """Return c, c* and the standard error of c, entry by entry in NumPy float64."""
    w64, m64, b64, a64 = (t.double().numpy() for t in (w, m, b, a))
    d = s * (b64 @ a64)
    once = torch.from_numpy(w64 + d).to(m.dtype).double().numpy()
    energy = (d**2).sum()
    variance = (((m64 - once) * d) ** 2).sum()
    if casts:
        for i, k in np.ndindex(
            *b64.shape
        ):  # B_ik rounded twice moves row i by B_ik·s·A_k, of relative variance 0.18u²
            variance += 2 * 0.18 * u**2 * (b64[i, k] * s * (a64[k] @ d[i])) ** 2
        for k, j in np.ndindex(*a64.shape):
            variance += 2 * 0.18 * u**2 * (a64[k, j] * s * (b64[:, k] @ d[:, j])) ** 2
    return (
        ((m64 - w64) * d).sum() / energy,
        ((once - w64) * d).sum() / energy,
        math.sqrt(variance) / energy,
    )


@pytest.mark.parametrize(("dtype", "u"), [(torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-24)])
@pytest.mark.parametrize("s", [2.0, 1.5])
def test_scale_and_error_equal_oracle(dtype, u, s):
    w, b, a = factors((24, 20), 2, 0.1, s, dtype, 0)
    m = ORDERS["product rounded first"](w, b, a, s)
    record = verified(w, m, b, a, s)
    c, expected, error = oracle(w, m, b, a, s, u, dtype != torch.float32 or s == 1.5)
    assert record.status == "ok"
    assert record.scale == record.retained == pytest.approx(c, rel=1e-12)
    assert record.scale_expected == pytest.approx(expected, rel=1e-12)
    assert record.scale_error == pytest.approx(error, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("order", CORRECT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_correct_merges_pass_within_error(dtype, order):
    for seed, s in enumerate((2.0, 1.5, RSLORA) * 2):
        for relative in (3e-4, 0.001, 0.005, 0.01, 0.3):
            w, b, a = factors((64, 48), 4, relative, s, dtype, seed)
            record = verified(w, CORRECT[order](w, b, a, s), b, a, s)
            assert record.status == "ok" or (relative < 0.01 and not record.failed), record.cause
            off = abs(record.scale - record.scale_expected)
            rounded = abs(float(torch.tensor(s, dtype=torch.float64).to(dtype)) / s - 1)
            assert off < 5 * record.scale_error + rounded + 6 * 2.0**-24


@pytest.mark.parametrize("order", [name for name in CORRECT if name != "scale in the dtype"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [0.98, 0.99, 0.995, 1.005, 1.01, 1.015, 1.02, 1.05])
def test_wrong_scale_is_named(dtype, order, c):
    w, b, a = factors((96, 96), 8, 0.3, RSLORA, dtype, 1)
    record = verified(w, CORRECT[order](w, b, a, RSLORA * c), b, a, RSLORA)
    assert record.status == "wrong scale", record.cause
    assert record.scale == pytest.approx(c, abs=2e-3)
    assert record.retained is None
    named = float(record.cause.removeprefix("ΔW was added times ").split()[0])
    assert named == pytest.approx(c, abs=1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("c", [0.999, 1.0001, 1.00001])
def test_float32_distinguishes_scale_from_coarse_arithmetic(c):
    w, b, a = factors((64, 64), 4, 0.1, 2.0, torch.float32, 2)
    assert verified(w, ORDERS["in float32"](w, b, a, 2.0 * c), b, a, 2.0).status == "wrong scale"


def test_scaling_rounded_to_16_bits_is_correct():
    w, b, a = factors((128, 128), 8, 0.3, RSLORA, torch.bfloat16, 3)
    rounded = float(torch.tensor(RSLORA).bfloat16())
    assert abs(rounded / RSLORA - 1) > 1e-4
    assert verified(w, ORDERS["in float32"](w, b, a, rounded), b, a, RSLORA).status == "ok"
    wide = w.float()
    assert (
        verified(wide, ORDERS["in float32"](wide, b, a, rounded), b, a, RSLORA).status == "coarse"
    )


def test_hidden_scale_is_inconclusive():
    w, b, a = factors((16, 16), 2, 1e-4, 2.0, torch.bfloat16, 0)
    for c in (1.0, 1.02):
        record = verified(w, ORDERS["in float32"](w, b, a, 2.0 * c), b, a, 2.0)
        assert (record.status, record.failed) == ("inconclusive", False)


def test_scale_is_found_despite_lost_half():
    w, b, a = factors((256, 256), 8, 0.001, 2.0, torch.bfloat16, 0)
    record = verified(w, ORDERS["in float32"](w, b, a, 2.1), b, a, 2.0)
    assert record.scale < 0.7
    assert record.cause.startswith("ΔW was added times 1.05")


@pytest.mark.parametrize("c", [0.98, 0.99, 1.01, 1.02])
@pytest.mark.parametrize("relative", [0.002, 0.005])
def test_precise_merge_resolves_scale_within_error(relative, c):
    w, b, a = factors((128, 128), 8, relative, RSLORA, torch.bfloat16, 4)
    record = verified(w, ORDERS["in float32"](w, b, a, RSLORA * c), b, a, RSLORA)
    assert record.status == "wrong scale", record.cause
    named, error = map(
        float,
        record.cause.removeprefix("ΔW was added times ").split(":")[0].split(",")[0].split(" ± "),
    )
    assert abs(named - c) < 6 * error < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_scale_in_float32_is_within_its_error(seed):
    c = 1.23456789012
    w, b, a = factors((192, 160), 8, 0.01, 2.0, torch.float32, seed)
    cause = verified(w, ORDERS["in float32"](w, b, a, 2.0 * c), b, a, 2.0).cause
    named, error = map(float, cause.removeprefix("ΔW was added times ").split(",")[0].split(" ± "))
    assert abs(named - c) < 6 * error < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_diagonal_is_not_a_wrong_scale(dtype):
    """AdaLoRA's E and VeRA's d: each rounding of them is shared by a whole column of B."""
    result = []
    for seed in range(6):
        w, b, a = factors((256, 256), 4, 0.2, 2.0, dtype, seed)
        e = torch.rand(4, 1, generator=torch.Generator().manual_seed(seed)) + 0.5
        m = w + (b.to(dtype) @ (a.to(dtype) * e.to(dtype))) * 2.0
        record, as_lora = (
            verified(w, m, b, a * e.double(), 2.0, diagonal) for diagonal in (True, False)
        )
        assert record.status == "ok", record.cause
        exact = (b.double() @ (a.double() * e.double()) * 2.0).numpy()
        parts = [
            (b.double()[:, k : k + 1] @ (a.double() * e.double())[k : k + 1] * 2.0).numpy()
            for k in range(4)
        ]
        u = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        least = (
            sum(0.18 * u**2 * (part * exact).sum() ** 2 for part in parts) / (exact**2).sum() ** 2
        )
        assert record.scale_error**2 - as_lora.scale_error**2 >= 0.99 * least
        result.append(as_lora.status)
    assert "wrong scale" in result  # so that the diagonal is what makes the difference


def test_entry_off_by_more_than_casts_of_factors_is_found():
    """Two casts of either factor are 4u·|B||A|, two roundings of ΔW 2u|ΔW|, and half an ulp u|ΔW|:
    7u·|B||A|.
    """
    w, b, a = factors((64, 64), 4, 0.3, 2.0, torch.bfloat16, 6)
    w[3, 5] = 0
    m = ORDERS["in float32"](w, b, a, 2.0)
    assert verified(w, m, b, a, 2.0).status == "ok"
    m[3, 5] += 10 * 2.0**-8 * 2.0 * float(b[3].abs() @ a[:, 5].abs())
    record = verified(w, m, b, a, 2.0)
    assert (record.status, record.differing) == ("other", 1)


@pytest.mark.parametrize("order", ["term by term", "split terms"])
@pytest.mark.parametrize("rank", [4, 64, 128])
def test_order_of_sum_is_no_coarse_arithmetic(rank, order):
    w, b, a = factors((128, 160), rank, 0.01, 1.5, torch.float32, 1)
    m = CORRECT[order](w, b, a, 1.5)
    assert verified(w, m, b, a, 1.5).status == "ok"
    i, j = 7, 11  # an entry beyond what r roundings of W, and of the terms, can be
    terms = 1.5 * float(b[i].abs() @ a[:, j].abs())
    m[i, j] += 2 * 2.0**-24 * ((rank + 1) * float(w[i, j].abs()) + (rank + 12) * terms)
    record = verified(w, m, b, a, 1.5)
    assert (record.status == "ok", record.differing) == (False, 1)


def spread(w, b, a, s, dtype, pattern, c):
    """Merge in float32 with ΔW times 1 + c in one half of the rows or columns, and times 1 − c in
    the other.
    """
    rows, columns = torch.ones(w.shape[0], 1), torch.ones(w.shape[1])
    lines = columns if "columns" in pattern else rows
    half = slice(None, None, 2) if "every other" in pattern else slice(0, len(lines) // 2)
    lines -= c
    lines[half] += 2 * c
    return ORDERS["in float32"](w, b * rows, a * columns, s)


@pytest.mark.parametrize("pattern", ["rows", "columns", "every other rows", "every other columns"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [0.01, 0.02])
def test_scales_that_cancel_are_found(dtype, pattern, c):
    w, b, a = factors((384, 256), 8, 0.1, 2.0, dtype, 5)
    record = verified(w, spread(w, b, a, 2.0, dtype, pattern, c), b, a, 2.0)
    assert record.status == "wrong scale", record.cause
    assert record.scale == pytest.approx(1, abs=c / 4)  # the scale of the layer does not show it
    more, less = re.findall(r"(\S+)% ± (\S+)% (?:more|less) in", record.cause)
    for off, error in (more, less):
        assert abs(float(off) / 100 - c) < 6 * float(error) / 100 + c / 20
    assert f"more in {pattern.split()[-1]}" in record.cause


def test_uneven_block_is_named():
    w, b, a = factors((576, 192), 8, 0.1, 2.0, torch.bfloat16, 6)
    scales = torch.ones(576, 1)
    scales[128:192] = 1.05
    record = verified(w, ORDERS["in float32"](w, b * scales, a, 2.0), b, a, 2.0)
    assert record.status == "wrong scale"
    assert "more in rows 128-191" in record.cause


@pytest.mark.parametrize(("dtype", "u"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_line_sums_equal_oracle(dtype, u):
    """Errors of factors: those of its own row of B move a row; those of A move all rows, and are
    bounded row by row.
    """
    w, b, a = factors((24, 20), 2, 0.1, 1.5, dtype, 0)
    m = ORDERS["in the dtype"](w, b, a, 1.5)
    left, right = b.double() * 1.5, a.double()
    tiny = torch.finfo(dtype).smallest_normal * 2 * u
    check = check_merge(
        [(w, m, None)],
        (24, 20),
        Product(left, right),
        MergeRounding(dtype, u, cast=True, scale=1.5),
    )
    w64, m64, b64, a64 = (t.double().numpy() for t in (w, m, left, right))
    d = b64 @ a64
    off = (m64 - torch.from_numpy(w64 + d).to(dtype).double().numpy()) * d
    for side, lines in enumerate(check.lines):
        other = 1 - side
        assert np.allclose(lines.difference, off.sum(other), rtol=1e-9, atol=1e-15)
        assert np.allclose(lines.energy, (d**2).sum(other), rtol=1e-12)
        factor, across = (b64, a64) if side == 0 else (a64.T, b64.T)
        delta = d if side == 0 else d.T
        for i, row in enumerate(delta):
            own = sum(2 * 0.18 * u**2 * (factor[i, k] * across[k] @ row) ** 2 for k in range(2))
            own += sum(2 * tiny**2 / 12 * (across[k] @ row) ** 2 for k in range(2)) * (
                2.25 if side == 0 else 1
            )
            shared = sum(
                2 * 0.18 * u**2 * ((factor[i, k] * across[k] * row) ** 2).sum() for k in range(2)
            )
            shared += (
                2
                * tiny**2
                / 12
                * (factor[i] ** 2).sum()
                * (row**2).sum()
                * (1 if side == 0 else 2.25)
            )
            entries = (off[i] if side == 0 else off[:, i]) ** 2
            assert float(lines.variance[i]) == pytest.approx(entries.sum() + own, rel=1e-6)
            assert float(lines.deviation[i]) == pytest.approx(math.sqrt(shared), rel=1e-6)


def test_line_errors_cover_merges():
    """In right merges with rounded factors, a row is off by what its standard error says, and
    rarely by more.
    """
    off = []
    for seed in range(30):
        w, b, a = factors((64, 96), 4, 0.3, 1.5, torch.bfloat16, seed)
        m = ORDERS["in the dtype"](w, b, a, 1.5)
        how = MergeRounding(torch.bfloat16, 2.0**-8, cast=True, scale=1.5)
        check = check_merge([(w, m, None)], (64, 96), Product(b.double() * 1.5, a.double()), how)
        off += [
            lines.difference / (lines.variance + lines.deviation.square()).sqrt()
            for lines in check.lines
        ]
    z = torch.cat(off).numpy()
    assert (
        0.4 < np.sqrt((z**2).mean()) <= 1.05
    )  # both roundings of a factor are counted, and an order may make one
    assert np.abs(z).max() < 5
