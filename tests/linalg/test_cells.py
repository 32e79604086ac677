"""Cells of storage formats against all codes of each, and against rounding itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.linalg.cells import GRIDS, Cells, cell_halves, round_to_nearest
from lora_diag.linalg.hidden_models import Scales

SHORT = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "int8"]


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
@given(start=st.floats(-60000, 60000, width=32), move=st.floats(-1, 1, width=32), size=st.integers(-40, 15))
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
        np.testing.assert_array_equal(above.numpy(), (np.nextafter(values, number(np.inf)) - values) / 2)
        np.testing.assert_array_equal(below.numpy(), (values - np.nextafter(values, number(-np.inf))) / 2)


@pytest.mark.parametrize("first", [0, 2, 5])
def test_derived_cell_rows_equal_whole(first):
    lo = -torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    cells = Cells(lo, lo + 1)
    rows, columns = torch.arange(1.0, 7), torch.tensor([1.0, 2, 4, 8])
    scaled = Scales(rows, columns, rows * 0, columns * 0).divide(cells).rows(first, 6)
    assert torch.equal(scaled.lo, (lo / torch.outer(rows, columns))[first:])
    opened = cells.open_entries(torch.tensor([1, 9, 22])).rows(first, 6)
    expected = lo.clone()
    expected.view(-1)[[1, 9, 22]] = -math.inf
    assert torch.equal(opened.lo, expected[first:])
    assert torch.equal(opened.hi.isinf(), expected[first:].isinf())
