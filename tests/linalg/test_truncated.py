"""Moments in a cell against quadrature of their definition, and laws."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import fixed_quad

from lora_diag.linalg.cells import Cells, moments


def by_definition(lo, hi, start, mean, deviation):
    """E, Var and log-likelihood of x ~ N(mean, deviation²) stored in the cell; start: (below, above) of W, or None."""

    def weight(x):
        if start is None:
            return np.ones_like(x)
        below, above = start  # share of starts W + e, e uniform, for which x + e lies in the cell
        return np.maximum(0.0, np.minimum(hi - x, above) - np.maximum(lo - x, -below)) / (below + above)

    first, last = (lo, hi) if start is None else (lo - start[1], hi + start[0])
    peak = min(max(mean, first), last)
    inner = () if start is None else (lo + start[0], hi - start[1])
    marks = {max(first, peak - 40 * deviation), min(last, peak + 40 * deviation)}
    low, high = min(marks), max(marks)
    steps = [peak + k * deviation for k in (-20, -12, *range(-6, 7), 12, 20)]
    marks = sorted(marks | {x for x in (*inner, *steps) if low < x < high})

    def integral(power):
        def density(x):
            return np.exp(-((x - mean) ** 2 - (peak - mean) ** 2) / 2 / deviation**2) * weight(x) * (x - peak) ** power

        return sum(fixed_quad(density, a, b, n=60)[0] for a, b in pairwise(marks))

    mass, one, two = (integral(k) for k in range(3))
    log_mass = math.log(mass) - ((peak - mean) / deviation) ** 2 / 2 - math.log(deviation * math.sqrt(2 * math.pi))
    return peak + one / mass, two / mass - (one / mass) ** 2, log_mass


def one(lo, hi, start, dtype):
    parts = (lo, hi, *(start or (None, None)))
    return Cells(*(None if part is None else torch.tensor([[part]], dtype=dtype) for part in parts))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-8), (torch.float32, 1e-4)], ids=str)
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
    lo, hi, *start, mu = (float(torch.tensor(x, dtype=dtype)) for x in numbers)  # as they are in the dtype
    result = moments(one(lo, hi, start, dtype), mu, s)
    expected = by_definition(lo, hi, start or None, mu, s)
    assert abs(float(result.mean) - expected[0]) <= error * math.sqrt(expected[1])
    assert float(result.variance) == pytest.approx(expected[1], rel=error)
    assert float(result.log_mass) == pytest.approx(expected[2], abs=error)


@given(power=st.integers(-20, 20), seed=st.integers(0, 99), rounded=st.booleans())
def test_powers_of_two_scale_moments_exactly(power, seed, rounded):
    rng = torch.Generator().manual_seed(seed)
    lo = torch.randn(4, 5, generator=rng)
    parts = [lo, lo + torch.rand(4, 5, generator=rng)]
    parts += [torch.rand(4, 5, generator=rng) + 0.1, torch.rand(4, 5, generator=rng) + 0.1] if rounded else []
    c = 2.0**power
    plain, scaled = moments(Cells(*parts), 0.0, 0.5), moments(Cells(*(part * c for part in parts)), 0.0, 0.5 * c)
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
    wide = Cells(torch.full((1, 2), -math.inf), torch.full((1, 2), math.inf), torch.ones(1, 2), torch.ones(1, 2))
    for cells in (wide, wide.exact_start()):
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
