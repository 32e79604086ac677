"""Rounding cells: the interval of real numbers that a storage format rounds to one of its values.

Under rounding to nearest a stored T stands for every number from the midpoint to its predecessor to the midpoint to its
successor. Both midpoints are in the closed cell; a tie goes to the neighbour with the even code, a set of measure zero.
The halves are unequal at powers of two, where the spacing below is half of that above (not at the smallest normal
number, below which the spacing stays the same), and at the largest value of a format that saturates, whose cell has no
outer end. Both zeros share one cell, since a zero is written with either sign.

Reference: IEEE 754-2019, §4.3.1; Micikevicius et al. 2022, arXiv:2209.05433 (8-bit formats).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """The values of a storage format.

    Args:
        mantissa: Stored mantissa bits p.
        smallest: Exponent of the smallest normal number.
        largest: The largest finite value.
        saturates: Whether larger numbers are stored as ``largest``, as by quantizers, instead of infinity.
    """

    mantissa: int
    smallest: int
    largest: float
    saturates: bool = False


GRIDS = {
    "bfloat16": Grid(7, -126, float(torch.finfo(torch.bfloat16).max)),
    "float16": Grid(10, -14, 65504.0),
    "float32": Grid(23, -126, float(torch.finfo(torch.float32).max)),
    "float64": Grid(52, -1022, float(torch.finfo(torch.float64).max)),
    "float8_e4m3fn": Grid(3, -6, 448.0, saturates=True),
    "float8_e5m2": Grid(2, -14, 57344.0, saturates=True),
    "float8_e4m3fnuz": Grid(3, -7, 240.0, saturates=True),
    "float8_e5m2fnuz": Grid(2, -15, 57344.0, saturates=True),
    "int8": Grid(7, 7, 127.0, saturates=True),  # integers: constant spacing
}


def cell_halves(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the extent of the cell of each value below and above it.

    Args:
        values: Values of the format, float32 or float64; any shape.
        grid: The format.

    Returns:
        Two tensors like ``values``, not negative; infinite where the cell of a saturated value is open.

    Example:
        >>> below, above = cell_halves(torch.tensor([1.0, -1.5, 448.0]), GRIDS["float8_e4m3fn"])
        >>> below.tolist(), above.tolist()
        ([0.03125, 0.0625, 16.0], [0.0625, 0.0625, inf])
    """
    fraction, exponent = torch.frexp(values)  # |fraction| in [1/2, 1), so ⌊log2|v|⌋ is one less
    exponent = torch.where(values == 0, grid.smallest, exponent - 1)
    outer = torch.ldexp(torch.ones_like(values), exponent.clamp(min=grid.smallest) - grid.mantissa - 1)
    power = (fraction.abs() == 0.5) & (exponent > grid.smallest)
    inner = torch.where(power, outer / 2, outer)
    if grid.saturates:
        outer = torch.where(values.abs() >= grid.largest, math.inf, outer)
    negative = values < 0
    return torch.where(negative, outer, inner), torch.where(negative, inner, outer)


def round_to_nearest(values: Tensor, dtype: str) -> Tensor:
    """Round to a format, ties to even; numbers beyond the range of a saturating format become its largest value.

    Args:
        values: Real numbers, float32 or float64.
        dtype: A key of ``GRIDS``.
    """
    grid = GRIDS[dtype]
    if grid.saturates:
        values = values.clamp(-grid.largest, grid.largest)
    if dtype == "int8":
        return values.round()
    return values.to(getattr(torch, dtype)).to(values.dtype)


class Source(ABC):
    """Cells of the entries of a matrix, in memory or computed when they are read.

    Every way to read gives the same numbers, block by block, so that estimates do not depend on memory.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the ends."""

    @property
    @abstractmethod
    def rounded(self) -> bool:
        """Whether the start of training lies anywhere in BASE's cells."""

    @abstractmethod
    def rows(self, first: int, last: int) -> Cells:
        """Return the rows from ``first`` to before ``last``."""

    @property
    def count(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def spans(self, entries: int = 2**17) -> Iterator[tuple[int, int]]:
        """Yield row ranges of blocks of about this many entries, which stay in the cache."""
        step = max(1, entries // self.shape[1])
        for first in range(0, self.shape[0], step):
            yield first, min(self.shape[0], first + step)

    def at(self, entries: Tensor) -> Cells:
        """Return entries by row-major index, ascending, as one row."""
        columns, parts = self.shape[1], []
        for first, last in self.spans():
            inside = _select_between(entries, first * columns, last * columns)
            if len(inside):
                parts.append(self.rows(first, last).at(inside - first * columns))
        return join_cells(parts, 1)

    def open_entries(self, entries: Tensor) -> Opened:
        """Return the same cells with some entries unknown.

        Args:
            entries: Row-major indices, ascending.
        """
        return Opened(self, entries)


def _select_between(entries: Tensor, first: int, last: int) -> Tensor:
    """Return the ascending indices in a range."""
    ends = torch.tensor([first, last], device=entries.device)
    start, stop = torch.searchsorted(entries, ends).tolist()
    return entries[start:stop]


@dataclass(frozen=True, slots=True)
class Cells(Source):
    """Cells of the entries of X = (trained weight) − (start of training), given both stored matrices.

    The trained weight is in the cell of the stored T, so with an exact start W the entry is in ``[lo, hi]``. If BASE
    was itself rounded after the start, the start is anywhere in [W − below, W + above], uniformly: the likelihood of x
    is then a trapezoid on [lo − above, hi + below].

    Args:
        lo: ``(m, n)``, lower end of T's cell minus W.
        hi: Upper end, likewise.
        below: Extent of the cell of W below it; None if the start is W.
        above: Extent above it.
    """

    lo: Tensor
    hi: Tensor
    below: Tensor | None = None
    above: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.lo.shape[0], self.lo.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the ends."""
        return self.lo.device

    @property
    def rounded(self) -> bool:
        """Whether the start of training lies anywhere in BASE's cells."""
        return self.below is not None

    def rows(self, first: int, last: int) -> Cells:
        """Return the rows from ``first`` to before ``last``, as views."""
        parts = (None if part is None else part[first:last] for part in (self.lo, self.hi, self.below, self.above))
        return Cells(*parts)  # type: ignore[arg-type]

    def at(self, entries: Tensor) -> Cells:
        """Return entries by row-major index, as one row."""
        parts = (
            None if part is None else part.reshape(-1)[entries][None]
            for part in (self.lo, self.hi, self.below, self.above)
        )
        return Cells(*parts)  # type: ignore[arg-type]

    def exact_start(self) -> Cells:
        """Return the same cells with the stored BASE as the start."""
        return replace(self, below=None, above=None)


def join_cells(blocks: list[Cells], dim: int = 0) -> Cells:
    """Return the cells of all blocks, joined along a dimension."""
    fields = [[getattr(block, name) for block in blocks] for name in ("lo", "hi", "below", "above")]
    return Cells(*(None if tensors[0] is None else torch.cat(tensors, dim) for tensors in fields))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Derived(Source):
    """Cells computed from other cells of the same matrix.

    Args:
        cells: The other cells.
    """

    cells: Source

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.cells.shape

    @property
    def device(self) -> torch.device:
        """Device of the ends."""
        return self.cells.device

    @property
    def rounded(self) -> bool:
        """Whether the start of training lies anywhere in BASE's cells."""
        return self.cells.rounded


@dataclass(frozen=True, slots=True)
class Opened(Derived):
    """Cells of which some entries are unknown: from −∞ to ∞.

    Args:
        cells: All of them.
        entries: Row-major indices of the unknown, ascending.
    """

    entries: Tensor

    def rows(self, first: int, last: int) -> Cells:
        """Return the rows from ``first`` to before ``last``."""
        block, columns = self.cells.rows(first, last), self.shape[1]
        inside = _select_between(self.entries, first * columns, last * columns) - first * columns
        low, high = block.lo.clone(), block.hi.clone()
        low.view(-1)[inside], high.view(-1)[inside] = -math.inf, math.inf
        return replace(block, lo=low, hi=high)
