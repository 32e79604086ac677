"""Cells of storage formats, moments in them and binades, against definitions written out and
rounding itself.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import fixed_quad
from scipy.optimize import minimize_scalar
from scipy.special import ndtr
from scipy.stats import truncnorm

from lora_diag.linalg.cells import (
    GRIDS,
    MIN_MERGED,
    Binades,
    Cells,
    cell_halves,
    encode_widths,
    moments,
    round_to_nearest,
)
from lora_diag.linalg.hidden_models import Scales

SHORT = [
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "int8",
]


def values_of(name: str) -> torch.Tensor:
    """Every finite value of a format, ascending, zero once; float64."""
    dtype = getattr(torch, name)
    bits = 8 * dtype.itemsize
    codes = torch.arange(2**bits, dtype=torch.int32).to(torch.int16 if bits == 16 else torch.uint8)
    values = codes.view(dtype).double()
    values = values[values.isfinite()]
    if name == "int8":
        values = values[values > -128]  # symmetric quantizers leave it out
    return torch.tensor(sorted({float(value) + 0.0 for value in values}), dtype=torch.float64)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SHORT)
def test_cells_end_at_midpoints_of_all_neighbours(name, wide):
    values = values_of(name)
    below, above = (half.double() for half in cell_halves(values.to(wide), GRIDS[name]))
    middle = np.diff(values.numpy()) / 2
    np.testing.assert_array_equal(above[:-1].numpy(), middle)
    np.testing.assert_array_equal(below[1:].numpy(), middle)
    largest = float(values[-1])
    assert largest == GRIDS[name].largest
    outer = math.inf if GRIDS[name].saturates else middle[-1]
    assert float(above[-1]) == float(below[0]) == outer


@pytest.mark.parametrize("name", SHORT)
def test_values_in_cell_round_to_its_value(name):
    values = values_of(name).float()
    below, above = cell_halves(values, GRIDS[name])
    low, high = values - below, values + above
    for end, inside in ((low, math.inf), (high, -math.inf)):
        finite = end.isfinite()
        within = torch.nextafter(end, torch.tensor(inside))[finite]
        outside = torch.nextafter(end, torch.tensor(-inside))[finite]
        assert torch.equal(round_to_nearest(within, name), values[finite])
        different = round_to_nearest(outside, name) != values[finite]
        assert different.sum() >= len(values) - 2  # beyond the largest value a format may saturate
    assert torch.equal(round_to_nearest(values, name), values)


@pytest.mark.parametrize("name", SHORT)
def test_tie_goes_to_even_code(name):
    values = values_of(name).float()
    values = values[values > 0]
    tie = values[:-1] + cell_halves(values, GRIDS[name])[1][:-1]
    chosen = round_to_nearest(tie, name)
    dtype = getattr(torch, name)
    codes = chosen.to(dtype).view(torch.int16 if dtype.itemsize == 2 else torch.uint8)
    assert not (codes & 1).any()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@given(
    start=st.floats(-60000, 60000, width=32),
    move=st.floats(-1, 1, width=32),
    size=st.integers(-40, 15),
)
def test_sum_is_in_stored_cell(name, start, move, size):
    start, move = (torch.tensor(value, dtype=torch.float64) for value in (start, move * 2.0**size))
    total = (start + move).float()
    stored = round_to_nearest(total, name)
    if stored.isfinite():
        below, above = cell_halves(stored, GRIDS[name])
        assert stored - below <= total <= stored + above


def test_wider_formats_step_as_numpy_does():
    for name, number in (("float32", np.float32), ("float64", np.float64)):
        values = np.array([1.0, -1.5, 2.0**-100, 3.7e5, 1e-30], dtype=number)
        below, above = cell_halves(torch.tensor(values), GRIDS[name])
        np.testing.assert_array_equal(
            above.numpy(), (np.nextafter(values, number(np.inf)) - values) / 2
        )
        np.testing.assert_array_equal(
            below.numpy(), (values - np.nextafter(values, number(-np.inf))) / 2
        )


@pytest.mark.parametrize("first", [0, 2, 5])
def test_derived_cell_rows_equal_whole(first):
    lo = -torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    cells = Cells(lo, lo + 1)
    rows, columns = torch.arange(1.0, 7), torch.tensor([1.0, 2, 4, 8])
    scaled = Scales(rows, columns, rows * 0, columns * 0).divide(cells).rows(first, 6)
    assert torch.equal(scaled.lo, (lo / torch.outer(rows, columns))[first:])


def by_definition(lo, hi, start, mean, deviation):
    """E, Var and log-likelihood of x ~ N(mean, deviation²) stored in the cell; start: (below,
    above) of W, or None.
    """

    def weight(x):
        if start is None:
            return np.ones_like(x)
        below, above = start  # share of starts W + e, e uniform, for which x + e lies in the cell
        return np.maximum(0.0, np.minimum(hi - x, above) - np.maximum(lo - x, -below)) / (
            below + above
        )

    first, last = (lo, hi) if start is None else (lo - start[1], hi + start[0])
    peak = min(max(mean, first), last)
    inner = () if start is None else (lo + start[0], hi - start[1])
    marks = {max(first, peak - 40 * deviation), min(last, peak + 40 * deviation)}
    low, high = min(marks), max(marks)
    steps = [peak + k * deviation for k in (-20, -12, *range(-6, 7), 12, 20)]
    marks = sorted(marks | {x for x in (*inner, *steps) if low < x < high})

    def integral(power):
        def density(x):
            return (
                np.exp(-((x - mean) ** 2 - (peak - mean) ** 2) / 2 / deviation**2)
                * weight(x)
                * (x - peak) ** power
            )

        return sum(fixed_quad(density, a, b, n=60)[0] for a, b in pairwise(marks))

    mass, one, two = (integral(k) for k in range(3))
    log_mass = (
        math.log(mass)
        - ((peak - mean) / deviation) ** 2 / 2
        - math.log(deviation * math.sqrt(2 * math.pi))
    )
    return peak + one / mass, two / mass - (one / mass) ** 2, log_mass


def one(lo, hi, start, dtype):
    parts = (lo, hi, *(start or (None, None)))
    return Cells(*(None if part is None else torch.tensor([[part]], dtype=dtype) for part in parts))


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-8), (torch.float32, 1e-4)], ids=str
)
@pytest.mark.parametrize("rounded", [False, True])
@settings(max_examples=25)
@given(
    scale=st.floats(-6, 0),
    mean=st.floats(-2, 2),
    center=st.floats(-6, 6),
    half=st.floats(-2, 1.5),
    ratios=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
)
def test_moments_equal_definition(dtype, error, rounded, scale, mean, center, half, ratios):
    s, h = 10**scale, 10 ** (scale + half)
    start = tuple(h * 10**ratio for ratio in ratios) if rounded else None
    numbers = [center * s - h, center * s + h, *(start or ()), mean * s]
    lo, hi, *start, mu = (
        float(torch.tensor(x, dtype=dtype)) for x in numbers
    )  # as they are in the dtype
    result = moments(one(lo, hi, start, dtype), mu, s)
    expected = by_definition(lo, hi, start or None, mu, s)
    assert abs(float(result.mean) - expected[0]) <= error * math.sqrt(expected[1])
    assert float(result.variance) == pytest.approx(expected[1], rel=error)
    assert float(result.log_mass) == pytest.approx(expected[2], abs=error)


@pytest.mark.parametrize("rounded", [False, True])
@settings(max_examples=15)
@given(seed=st.integers(0, 999), scale=st.integers(-12, 0), deviation=st.floats(0.03, 2))
def test_tabulated_moments_equal_definition(rounded, seed, scale, deviation):
    """Cells narrower and wider than s, far outside and too wide for a table; 1 and 1.5 times a
    power of two wide.
    """
    rng = np.random.default_rng(seed)
    stored, start = (
        (1 + rng.integers(0, 2, 12) / 2) * 2.0 ** rng.integers(-8, 4, 12) for _ in range(2)
    )
    stored[0] = 2.0**12
    center, mu = rng.normal(size=12) * 2, rng.normal(size=12)
    center[1] = 30.0
    c = 2.0**scale
    parts = [
        center - stored / 2,
        center + stored / 2,
        *((start / 4, 3 * start / 4) if rounded else ()),
    ]
    lo, hi, *halves = (torch.tensor(part * c).float()[None] for part in parts)
    widths = [torch.tensor(width * c).float()[None] for width in (stored, start)]
    codes = encode_widths(widths[0], widths[1] if rounded else None)
    cells = Cells(lo, hi, *(halves or (None, None)), None, codes, tuple(codes.unique().tolist()))
    result = moments(cells, torch.tensor(mu * c).float()[None], deviation * c)
    rough = moments(cells, torch.tensor(mu * c).float()[None], deviation * c, likelihood=False)
    assert torch.equal(rough.mean, result.mean)
    assert float((rough.variance - result.variance).abs().max()) <= 3e-3 * (deviation * c) ** 2
    for i in range(12):
        ends = [float(part[0, i]) for part in (lo, hi, *halves)]
        expected = by_definition(
            *ends[:2], tuple(ends[2:]) or None, float(np.float32(mu[i] * c)), deviation * c
        )
        assert abs(float(result.mean[0, i]) - expected[0]) <= 2e-5 * deviation * c + 4e-7 * c * abs(
            center[i]
        )
        assert abs(float(result.variance[0, i]) - expected[1]) <= 1e-4 * (deviation * c) ** 2
        assert float(result.log_mass[0, i]) == pytest.approx(
            expected[2], abs=2e-5 + 1e-5 / deviation, rel=1e-5
        )


def test_other_widths_have_no_code():
    widths = torch.tensor([[0.5, 1.5, 1.75, 1.1]])
    assert (encode_widths(widths, None) == 0).tolist() == [[False, False, True, True]]
    assert (encode_widths(widths[:, :2], widths[:, [0, 3]]) == 0).tolist() == [[False, True]]


@pytest.mark.parametrize("block", [2**20, 50])
def test_merged_cells_count_every_entry(block, monkeypatch):
    monkeypatch.setattr("lora_diag.linalg.cells.MERGED_AT_ONCE", block)
    rng = np.random.default_rng(3)
    lo, below = (torch.tensor(rng.integers(0, 3, (80, 40)) / 4).float() for _ in range(2))
    cells = Cells(lo, lo + 1, below + 1, below + 2)
    merged = cells.merge()
    numbers = np.stack([part.numpy().ravel() for part in (lo, below)], 1)
    distinct, counts = np.unique(numbers, axis=0, return_counts=True)
    found = torch.cat([merged.lo, merged.below - 1, merged.counts]).T.tolist()
    assert sorted(found) == [
        [*pair, count] for pair, count in zip(distinct.tolist(), counts.tolist(), strict=True)
    ]
    assert merged.count == merged.exact_start().rows(0, 1).count == 3200
    assert torch.equal(merged.hi, merged.lo + 1)
    assert merged.total(merged.lo**2) == pytest.approx(float(lo.double().square().sum()))
    assert merged.sample(2) is merged
    many = torch.rand(40, MIN_MERGED)
    different = Cells(many, many + 1)
    assert different.merge() is different


@given(power=st.integers(-20, 20), seed=st.integers(0, 99), rounded=st.booleans())
def test_powers_of_two_scale_moments_exactly(power, seed, rounded):
    rng = torch.Generator().manual_seed(seed)
    lo = torch.randn(4, 5, generator=rng)
    parts = [lo, lo + torch.rand(4, 5, generator=rng)]
    parts += (
        [torch.rand(4, 5, generator=rng) + 0.1, torch.rand(4, 5, generator=rng) + 0.1]
        if rounded
        else []
    )
    c = 2.0**power
    plain, scaled = (
        moments(Cells(*parts), 0.0, 0.5),
        moments(Cells(*(part * c for part in parts)), 0.0, 0.5 * c),
    )
    assert torch.equal(scaled.mean, plain.mean * c)
    assert torch.equal(scaled.variance, plain.variance * c * c)
    assert torch.allclose(scaled.log_mass, plain.log_mass, atol=1e-5)


@given(seed=st.integers(0, 999), far=st.floats(0, 40))
def test_mean_lies_in_cell(seed, far):
    rng = np.random.default_rng(seed)
    lo = torch.tensor(rng.normal(size=(3, 7)) * far)
    hi = lo + torch.tensor(np.exp(rng.uniform(-8, 3, size=(3, 7))))
    result = moments(Cells(lo, hi), 0.0, 1.0)
    slack = 1e-12 * (1 + lo.abs())
    assert (result.mean >= lo - slack).all()
    assert (result.mean <= hi + slack).all()
    assert (result.variance <= torch.minimum((hi - lo) ** 2 / 4, torch.ones(())) * (1 + 1e-9)).all()


def test_unbounded_cell_gives_no_information():
    wide = Cells(
        torch.full((1, 2), -math.inf),
        torch.full((1, 2), math.inf),
        torch.ones(1, 2),
        torch.ones(1, 2),
    )
    for cells in (wide, wide.exact_start().rows(0, 1)):
        result = moments(cells, torch.tensor([[0.0, 3.0]]), 2.0)
        assert torch.allclose(result.mean, torch.tensor([[0.0, 3.0]]), atol=1e-6)
        assert torch.allclose(result.variance, torch.full((1, 2), 4.0), rtol=1e-4)
        assert torch.allclose(result.log_mass, torch.zeros(1, 2), atol=1e-5)


@pytest.mark.parametrize("start", [None, (0.25, 0.5), (2e-7, 1e-7)], ids=str)
@pytest.mark.parametrize(("at", "mean"), [(1.0, 0.0), (-1.0, 0.0), (0.75, 40.0), (-3.0, -900.0)])
def test_cell_of_one_float32_spacing_has_moments(at, mean, start):
    """t loses the ends of such a cell where the mean is far."""
    lo = torch.tensor(at)
    hi = torch.nextafter(lo, torch.tensor(math.inf))
    result = moments(one(float(lo), float(hi), start, torch.float32), mean, 1.0)
    # What goes beyond float32's own rounding of t is checked against float64.
    exact = moments(one(float(lo), float(hi), start, torch.float64), mean, 1.0)
    assert abs(float(result.mean - exact.mean)) <= 4e-7 * max(1.0, abs(mean))
    assert float(result.variance) <= float(exact.variance) + 1e-6 * max(1.0, mean**2)
    assert float(result.log_mass) == pytest.approx(float(exact.log_mass), abs=0.2, rel=1e-5)


@pytest.mark.parametrize(("growth", "bad"), [(0.0, False), (0.3, True)])
def test_change_proportional_to_weight_is_uneven(growth, bad):
    rng = np.random.default_rng(1)
    w = torch.tensor(2.0 ** rng.uniform(-8, -4, size=(80, 100))).bfloat16().double()
    binade = torch.frexp(w)[1].numpy() + 6
    x = 2e-4 * np.exp(growth * binade) * rng.normal(size=w.shape)
    t = (w + torch.tensor(x)).bfloat16().double()
    ulp = 2.0 ** (
        torch.frexp(t)[1].numpy() - 8
    )  # not exact at powers of two, of which there are few
    lo, hi = ((t - w).numpy() + side * ulp / 2 for side in (-1, 1))

    def size(where):
        def loss(log_s):
            return -np.log(
                ndtr(hi[where] / math.exp(log_s)) - ndtr(lo[where] / math.exp(log_s))
            ).sum()

        return minimize_scalar(loss, bounds=(-10, -6.5), method="bounded").x

    whole = math.exp(size(np.ones(w.shape, bool)))
    mean, variance = truncnorm.stats(lo / whole, hi / whole)
    known = 1 - variance
    counts = Binades()
    for rows in (slice(0, 30), slice(30, 80)):
        parts = (mean[rows] ** 2 + variance[rows], known[rows])
        changed, chance = t[rows] != w[rows], torch.full((rows.stop - rows.start, 100), 0.5)
        counts.add(w[rows], changed, chance, *map(torch.tensor, parts))
    result = np.array([size(binade == b) for b in np.unique(binade)])
    weight = np.array([known[binade == b].sum() for b in np.unique(binade)])
    spread = math.sqrt(np.cov(result, aweights=weight, ddof=0))
    assert counts.unevenness == pytest.approx(spread if bad else 0.0, rel=0.15, abs=0.02)
    assert (counts.unevenness > counts.most_uneven) is bad
