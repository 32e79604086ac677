"""Rounding cells: the interval of numbers that a format rounds to one value, and estimates from
such intervals.

Cells. Under rounding to nearest a stored T stands for every number from the midpoint to its
predecessor to the midpoint to its successor. Both midpoints are in the closed cell; a tie goes to
the neighbour with the even code, a set of measure zero. The halves are unequal at powers of two,
where the spacing below is half of that above (not at the smallest normal number, below which the
spacing stays the same), and at the largest value of a format that saturates, whose cell has no
outer end. Both zeros share one cell, since a zero is written with either sign.

Reference: IEEE 754-2019, §4.3.1; Micikevicius et al. 2022, arXiv:2209.05433 (8-bit formats).

Moments. The moments of a normal distribution truncated to a cell are stable in float32. With t = (x
− μ)/s, the density on a cell is proportional to exp(−t²/2)·w(t), w being 1 in the cell, or a
trapezoid where the start of training was rounded, too. Differences of Φ and φ lose all digits in
narrow cells and in tails, so the integrals are computed by Gauss-Legendre quadrature on the
relevant part of the cell: with t₀ its point nearest to 0, exp(−(t² − t₀²)/2) is below e^−K beyond
|t − t₀| = 2K/(|t₀| + √(t₀² + 2K)). With 16 nodes and K = 16 means are within 3e-6 standard
deviations and variances within 4e-5 of quadrature with 200 nodes, over cells from e^−7 to e^4
standard deviations wide and up to 50 away; float32 adds the rounding of the ends of the cells.

Shrinkage. Observed through cells, a low-rank L in noise of variance s² has a posterior mean that
is, on average over entries, m = (1 − q)·L + q·Y, where q = 1 − mean(variance)/s² is the fraction of
information and Y = L + noise of variance τ² = s²/q the score. A singular value σ of m belongs to
the y of Y with σ = (1 − q)·η(y) + q·y, where

    η(y) = √((y² − (m + n)τ²)² − 4mn·τ⁴) / y   for y > τ(√m + √n), else 0

is the shrinker of least Frobenius risk (Gavish and Donoho 2017, *Optimal shrinkage of singular
values*, IEEE Trans. Inf. Theory 63), and x with y² = (x + mτ²/x)(x + nτ²/x) the singular value of L
without noise (Benaych-Georges and Nadakuditi 2012, *The singular values and vectors of low rank
perturbations*, J. Multivariate Anal. 111).

Binades. Whether one size explains the changed entries is checked by binade of |W|: how many changed
and how far. The size of a binade's updates relative to that of all is one scoring step, log s_b −
log s = ½·log g/q, g = mean E[(x − L)²]/s² over its entries and q the mean fraction of the variance
that a cell removes. Steps of optimizers do not depend on |W|; errors of stochastic rounding grow
with the spacing of the numbers, hence with |W|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_diag.linalg.rounding import LAYOUT

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ValueGrid:
    """The values of a storage format.

    Args:
        mantissa: Stored mantissa bits p.
        smallest: Exponent of the smallest normal number.
        largest: The largest finite value.
        saturates: Whether larger numbers are stored as ``largest``, as by quantizers, instead of
            infinity.
    """

    mantissa: int
    smallest: int
    largest: float
    saturates: bool = False


GRIDS = {
    "bfloat16": ValueGrid(7, -126, float(torch.finfo(torch.bfloat16).max)),
    "float16": ValueGrid(10, -14, 65504.0),
    "float32": ValueGrid(23, -126, float(torch.finfo(torch.float32).max)),
    "float64": ValueGrid(52, -1022, float(torch.finfo(torch.float64).max)),
    "float8_e4m3fn": ValueGrid(3, -6, 448.0, saturates=True),
    "float8_e5m2": ValueGrid(2, -14, 57344.0, saturates=True),
    "float8_e4m3fnuz": ValueGrid(3, -7, 240.0, saturates=True),
    "float8_e5m2fnuz": ValueGrid(2, -15, 57344.0, saturates=True),
    "int8": ValueGrid(7, 7, 127.0, saturates=True),  # integers: constant spacing
}


def cell_halves(values: Tensor, grid: ValueGrid) -> tuple[Tensor, Tensor]:
    """Return the extent of the cell of each value below and above it.

    Args:
        values: Values of the format, float32 or float64; any shape.
        grid: The format.

    Returns:
        Two tensors like ``values``, not negative; infinite where the cell of a saturated value is
            open.

    Example:
        >>> below, above = cell_halves(torch.tensor([1.0, -1.5, 448.0]), GRIDS["float8_e4m3fn"])
        >>> below.tolist(), above.tolist()
        ([0.03125, 0.0625, 16.0], [0.0625, 0.0625, inf])
    """
    integer, exponents, mantissa = LAYOUT[values.dtype]
    bits, tiny = values.view(integer), 2.0**grid.smallest
    power = (
        (bits & exponents).view(values.dtype).clamp_(min=tiny)
    )  # 2^⌊log2|v|⌋; frexp took three times as long
    outer = power * 2.0 ** -(grid.mantissa + 1)
    inner = torch.where((bits & ((1 << mantissa) - 1) == 0) & (power > tiny), outer / 2, outer)
    if grid.saturates:
        outer = torch.where(values.abs() >= grid.largest, math.inf, outer)
    negative = values < 0
    return torch.where(negative, outer, inner), torch.where(negative, inner, outer)


def round_to_nearest(values: Tensor, dtype: str) -> Tensor:
    """Return numbers rounded to a format, ties to even; those beyond a saturating format become its
    largest value.

    Args:
        values: Real numbers, float32 or float64.
        dtype: A key of ``GRIDS``.

    Returns:
        A tensor like ``values``; infinite beyond the range of a format that does not saturate.
    """
    grid = GRIDS[dtype]
    if grid.saturates:
        values = values.clamp(-grid.largest, grid.largest)
    if dtype == "int8":
        return values.round()
    return values.to(getattr(torch, dtype)).to(values.dtype)


# How many entries are merged at a time, and the least number of entries per distinct cell.
MERGED_AT_ONCE, MIN_MERGED = 2**20, 8

# Odd random factors of the hash of a cell: two of 10⁵ different cells have the same one with a
# probability of 10⁻⁹.
HASH_FACTORS = (0x2545F4914F6CDD1D, 0x5851F42D4C957F2D, 0x1B03738712FAD5C9, 0x6C8E9CF570932BD5)


class CellMatrix:
    """Cells of the entries of a matrix, in memory or computed when they are read.

    Every way to read gives the same numbers, block by block, so that estimates do not depend on
    memory.
    """

    if TYPE_CHECKING:

        @property
        def shape(self) -> tuple[int, int]:
            """``(m, n)``."""

        @property
        def device(self) -> torch.device:
            """Device of the ends."""

        @property
        def rounded(self) -> bool:
            """Whether the start of training lies anywhere in BASE's cells."""

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
        """Return entries by row-major index, ascending, at least one, as one row."""
        columns, parts = self.shape[1], []
        for first, last in self.spans():
            inside = select_between(entries, first * columns, last * columns)
            if len(inside):
                parts.append(self.rows(first, last).at(inside - first * columns))
        return join_cells(parts, 1)

    def sample(self, entries: int) -> CellMatrix:
        """Return about this many entries, as one row; these cells themselves if at most twice as
        many, or merged.

        The step is odd, so that of 2^k columns they are not from a few only.
        """
        if math.prod(self.shape) <= 2 * entries or math.prod(self.shape) < self.count:
            return self
        return self.at(torch.arange(0, self.count, self.count // entries | 1, device=self.device))

    def merge(self) -> CellMatrix:
        """Return the distinct cells with their counts, as one row; these cells themselves if there
        are too many.
        """
        merged: Cells | None = None
        for first, last in self.spans(MERGED_AT_ONCE):
            block = self.rows(first, last)
            distinct = block.merge_block()[0]
            merged = (
                distinct if merged is None else join_cells([merged, distinct], 1).merge_block()[0]
            )
            if merged.shape[1] * MIN_MERGED > min(self.count, 2 * block.count):
                return self
        return self if merged is None else merged

    def change_rows(self, function: Callable[[Cells, int], Cells]) -> ComputedCells:
        """Return the cells that a function makes of a block of rows and the number of its first
        row.
        """
        return ComputedCells(
            self.shape,
            self.device,
            self.rounded,
            lambda first, last: function(self.rows(first, last), first),
        )

    def exact_start(self) -> CellMatrix:
        """Return the same cells with the stored BASE as the start."""
        exact = self.change_rows(lambda block, first: replace(block, below=None, above=None))
        return replace(exact, rounded=False)


def select_between(entries: Tensor, first: int, last: int) -> Tensor:
    """Return the ascending indices in a range."""
    ends = torch.tensor([first, last], device=entries.device)
    start, stop = torch.searchsorted(entries, ends).tolist()
    return entries[start:stop]


@dataclass(frozen=True, slots=True)
class Cells(CellMatrix):
    """Cells of the entries of X = (trained weight) − (start of training), given both stored
    matrices.

    The trained weight is in the cell of the stored T, so with an exact start W the entry is in
    ``[lo, hi]``. If BASE was itself rounded after the start, the start is anywhere in [W − below, W
    + above], uniformly: the likelihood of x is then a trapezoid on [lo − above, hi + below].

    Args:
        lo: ``(m, n)``, lower end of T's cell minus W.
        hi: Upper end, likewise.
        below: Extent of the cell of W below it; None if the start is W.
        above: Extent above it.
        counts: Number of entries with the cell, float64; None for 1.
        codes: ``encode_widths`` of the entries, int32; None without ``widths``.
        widths: The codes for which moments are tabulated.
    """

    lo: Tensor
    hi: Tensor
    below: Tensor | None = None
    above: Tensor | None = None
    counts: Tensor | None = None
    codes: Tensor | None = None
    widths: tuple[int, ...] = ()

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

    @property
    def count(self) -> int:
        """Number of entries."""
        return self.lo.numel() if self.counts is None else int(self.counts.sum())

    @property
    def weights(self) -> Tensor:
        """Number of entries of every cell, float64; one row."""
        return (
            torch.ones_like(self.lo, dtype=torch.float64).view(-1)
            if self.counts is None
            else self.counts.view(-1)
        )

    def total(self, values: Tensor) -> float:
        """Return the sum of one value per cell over all entries, in float64."""
        return float(
            (values if self.counts is None else values * self.counts).sum(dtype=torch.float64)
        )

    def merge_block(self) -> tuple[Cells, Tensor]:
        """Return the distinct cells with their counts, as one row without codes, and the number of
        every entry's.

        Cells of one 64-bit hash count as equal.
        """
        ends = [part for part in (self.lo, self.hi, self.below, self.above) if part is not None]
        key = torch.zeros(self.lo.numel(), dtype=torch.int64, device=self.device)
        for part, factor in zip(ends, HASH_FACTORS, strict=False):
            bits = torch.int32 if part.dtype == torch.float32 else torch.int64
            key.mul_(factor).add_(part.reshape(-1).view(bits))
        distinct, index = torch.unique(key, return_inverse=True)
        first = torch.zeros_like(distinct).scatter_(
            0, index, torch.arange(len(key), device=self.device)
        )
        counts = torch.zeros_like(distinct, dtype=torch.float64).index_add_(0, index, self.weights)
        return replace(
            self.map(lambda part: part.reshape(-1)[first][None]), counts=counts[None]
        ), index

    def rows(self, first: int, last: int) -> Cells:
        """Return the rows from ``first`` to before ``last``, as views."""
        return self._select(lambda part: part[first:last])

    def at(self, entries: Tensor) -> Cells:
        """Return entries by row-major index, as one row."""
        return self._select(lambda part: part.reshape(-1)[entries][None])

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """One number per entry each, in the order of the fields."""
        return self.lo, self.hi, self.below, self.above, self.counts, self.codes

    def map(self, function: Callable[[Tensor], Tensor]) -> Cells:
        """Return the cells, without codes, with a function applied to both ends and
        both extents.
        """
        return replace(self, counts=None, codes=None, widths=())._select(function)

    def _select(self, function: Callable[[Tensor], Tensor]) -> Cells:
        parts = [None if part is None else function(part) for part in self.parts]
        return Cells(*parts, widths=self.widths)  # type: ignore[arg-type, misc]


def join_cells(blocks: list[Cells], dim: int = 0) -> Cells:
    """Return the cells of all blocks, joined along a dimension."""
    columns = zip(*(block.parts for block in blocks), strict=True)
    parts = (None if tensors[0] is None else torch.cat(tensors, dim) for tensors in columns)
    return Cells(*parts, widths=blocks[0].widths)  # type: ignore[arg-type, misc]


@dataclass(frozen=True)
class ComputedCells(CellMatrix):
    """Cells that are computed whenever they are read.

    Args:
        shape: ``(m, n)``.
        device: Device of the ends.
        rounded: Whether the start of training lies anywhere in BASE's cells.
        read: Returns the rows from the first to before the last.
    """

    shape: tuple[int, int]
    device: torch.device
    rounded: bool
    read: Callable[[int, int], Cells]

    def rows(self, first: int, last: int) -> Cells:
        """Return the rows from ``first`` to before ``last``."""
        return self.read(first, last)


# Nodes and K, by dtype; the fast ones are accurate to 0.3% of s².
NODES = {torch.float32: (16, 16.0), torch.float64: (40, 40.0)}
FAST = (10, 10.0)

# Bytes of an array of entries at all nodes that are integrated at once.
NODE_BYTES = 2**18


class Moments(NamedTuple):
    """E[x], Var[x] and the log-likelihood of the cell, for every entry."""

    mean: Tensor
    variance: Tensor
    log_mass: Tensor


@cache
def _gauss_legendre(nodes: int) -> Tensor:
    """Return nodes on [−1, 1] and their weights; float64."""
    return torch.from_numpy(np.stack(np.polynomial.legendre.leggauss(nodes)))


def moments(
    cells: Cells,
    mean: Tensor | float,
    deviation: float,
    fast: bool = False,
    likelihood: bool = True,
) -> Moments:
    """Return the moments of x ~ N(mean, deviation²) given that it was rounded into its cell.

    They are interpolated in a table if the cells have codes.

    Args:
        cells: The cells, float32 or float64; an infinite end is open.
        mean: μ, a number or a tensor of the cells' shape.
        deviation: s > 0.
        fast: Use fewer nodes where there is no table.
        likelihood: Compute log-likelihoods; without them, variances from a table are within 0.3% of
            s².

    Example:
        >>> cell = Cells(
        ...     torch.tensor([[0.0]], dtype=torch.float64),
        ...     torch.tensor([[math.inf]], dtype=torch.float64),
        ... )
        >>> found = moments(cell, 0.0, 1.0)
        >>> (
        ...     round(float(found.mean) ** 2, 9) == round(2 / math.pi, 9),
        ...     round(float(found.log_mass.exp()), 9),
        ... )
        (True, 0.5)
    """
    if cells.widths:
        return _interpolate(cells, mean, deviation, likelihood)
    nodes, reach = FAST if fast else NODES[cells.lo.dtype]
    return _integrate_cells(cells, mean, deviation, nodes, reach)


def _integrate_cells(
    cells: Cells, mean: Tensor | float, deviation: float, nodes: int, reach: float
) -> Moments:
    """Return the moments by quadrature with a number of nodes per smooth part, up to K
    = ``reach``.
    """
    low, high = cells.lo, cells.hi
    if cells.below is not None and cells.above is not None:
        low, high = low - cells.above, high + cells.below
    first, last, width = (
        (low - mean) / deviation,
        (high - mean) / deviation,
        (high - low) / deviation,
    )
    nearest = torch.clamp(torch.zeros_like(first), first, last)
    distance = nearest.abs()
    beyond = 2 * reach / (distance + (distance * distance + 2 * reach).sqrt())
    # From here on u = t − t₀, in which t² − t₀² = u(u + 2t₀) loses no digits. A cell that does not
    # contain 0 gets its width from its own ends: far out, the difference of two rounded t may be 0.
    left = torch.where(last < 0, -width, first.clamp(max=0.0))
    right = torch.where(first > 0, width, last.clamp(min=0.0))
    start, stop = torch.maximum(left, -beyond), torch.minimum(right, beyond)
    if cells.below is None or cells.above is None:
        mass, first_moment, second_moment = _integrate(start, stop, nearest, nodes)
        log_height: Tensor | float = 0.0
    else:
        width = (cells.below + cells.above) / deviation
        flat = torch.minimum((cells.hi - cells.lo) / deviation, width)
        edges = [
            torch.minimum(torch.maximum(edge, start), stop) for edge in (left + flat, right - flat)
        ]
        ends = pairwise((start, *edges, stop))
        # The trapezoid, not normalized: the distance to the nearer end of the cell, which may be
        # infinite, at most ``flat``.
        heights = (
            lambda u: torch.minimum(u - left, flat).clamp_(min=0.0),
            lambda u: flat,
            lambda u: torch.minimum(right - u, flat).clamp_(min=0.0),
        )
        parts = [
            _integrate(*end, nearest, nodes, height)
            for end, height in zip(ends, heights, strict=True)
        ]
        mass, first_moment, second_moment = (a + b + c for a, b, c in zip(*parts, strict=True))
        log_height = -torch.log(width)
    center = first_moment / mass
    return Moments(
        mean=(center + nearest) * deviation + mean,
        variance=(second_moment / mass - center * center).clamp_(min=0.0) * (deviation * deviation),
        log_mass=torch.log(mass) - nearest * nearest / 2 - math.log(2 * math.pi) / 2 + log_height,
    )


def _integrate(
    start: Tensor,
    stop: Tensor,
    nearest: Tensor,
    nodes: int,
    height: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ∫ e^{−u(u/2 + t₀)}·w du, and the same with u and with u² under the integral; w =
    ``height`` or 1.
    """
    half = (stop - start) / 2
    middle = start + half
    sums = torch.zeros(3, middle.numel(), dtype=middle.dtype, device=middle.device)
    # Several nodes at once where cells are few, and calls would take longer than the numbers.
    together = max(1, NODE_BYTES // (middle.element_size() * middle.numel()))
    for points, weights in torch.split(_gauss_legendre(nodes).to(middle), together, 1):
        u = torch.addcmul(middle, half, points[:, None, None])
        density = torch.add(nearest, u, alpha=0.5).mul_(u).neg_().exp_()
        if height is not None:
            density *= height(u)
        for power, total in enumerate(sums):
            total.addmv_((density if power == 0 else density.mul_(u)).view(len(u), -1).T, weights)
    mass, first_moment, second_moment = (sums * half.view(-1)).view(3, *middle.shape)
    return mass, first_moment, second_moment


# Grid points of a table per standard deviation, how far it goes beyond the cell, its largest
# distance from the cell's center and the width taken for narrower cells, in standard deviations,
# and how many points are interpolated for one.
POINTS, MARGIN, MAX_DISTANCE, MIN_WIDTH = 4, 8.0, 128.0, 2.0**-8
REFINED = 16

# Widths of cells are powers of two, or 1.5 times one: without the low bits of the mantissa of
# float32, 9 bits are left.
_LOW_BITS, _CODE_BITS = 22, 9


def encode_widths(stored: Tensor, start: Tensor | None) -> Tensor:
    """Return the widths of both cells of each entry as one int32 number; 0 if one is not 1 or 1.5
    times 2^k.

    Args:
        stored: Widths of the cells of T; float32.
        start: Widths of the cells of W; None without them.
    """
    bits = (
        stored.view(torch.int32),
        (torch.zeros_like(stored) if start is None else start).view(torch.int32),
    )
    codes = (bits[0] >> _LOW_BITS << _CODE_BITS) | (bits[1] >> _LOW_BITS)
    return codes.mul_(((bits[0] | bits[1]) & ((1 << _LOW_BITS) - 1)) == 0)


class _Table(NamedTuple):
    """Moments of x ~ N(0, 1) in cells at the points of one grid of distances for each pair of
    widths.

    Args:
        ends: Largest distance, in points, by code; not positive for other codes and too wide cells.
        first: Index of the distance 0, by code.
        offset: What is added to the log-likelihood, by code.
        log_mass: Log-likelihood at each point.
        value: E[center − x].
        slope: Its derivative by the number of the point.
        curve: Derivative of the slope.
    """

    ends: Tensor
    first: Tensor
    offset: Tensor
    log_mass: Tensor
    value: Tensor
    slope: Tensor
    curve: Tensor


@lru_cache(maxsize=8)  # a mixture takes up to four in turn
def _tabulate(
    codes: tuple[int, ...], deviation: float, rounded: bool, device: torch.device
) -> _Table:
    """Return the table for the widths of some codes; without the cells of W unless ``rounded``."""
    numbers = torch.tensor(codes, dtype=torch.int32)
    parts = (numbers >> _CODE_BITS, numbers & ((1 << _CODE_BITS) - 1))
    widths = torch.stack(
        [
            (part << _LOW_BITS).view(torch.float32).double() / deviation
            for part in parts[: 1 + rounded]
        ]
    )
    wide = widths.clamp(min=MIN_WIDTH)
    # The trapezoid is the convolution of both cells: it is the same for the cells of W and T
    # exchanged.
    pairs, index = torch.unique(wide.sort(0).values, dim=1, return_inverse=True)
    half = (POINTS * (pairs.sum(0) / 2 + MARGIN)).ceil()
    half = torch.where(half <= POINTS * MAX_DISTANCE, half, 0.0).long()
    kind = torch.arange(len(half)).repeat_interleave(
        half + 1
    )  # moments are symmetric: one half of each grid
    first = (half + 1).cumsum(0) - half - 1
    center = ((torch.arange(len(kind)) - first[kind]) / POINTS)[None].double()
    lower, upper = pairs[0, kind] / 2, pairs[-1:, kind] / 2
    found = _integrate_cells(
        Cells(center - lower, center + lower, *((upper, upper) if rounded else ())),
        0.0,
        1.0,
        *NODES[torch.float32],
    )
    # The derivative of E[center − x] by the distance is the variance.
    value, slope = (center - found.mean)[0], found.variance[0] / POINTS
    rise = value.roll(-1) - value
    square, cube = 3 * rise - 2 * slope - slope.roll(-1), slope + slope.roll(-1) - 2 * rise
    log_mass, distance, a, b, c, d = (
        part.float().to(device)[:, None]
        for part in (found.log_mass[0], center[0], value, slope, square, cube)
    )
    u = torch.arange(REFINED, device=device) / REFINED
    # The derivative of the logarithm of the likelihood is E[center − x] less the distance.
    passed = a - distance + u * (b / 2 - 0.5 / POINTS + u * (c / 3 + u * d / 4))
    refined = (
        log_mass + u / POINTS * passed,
        a + u * (b + u * (c + u * d)),
        (b + u * (2 * c + u * (3 * d))) / REFINED,
        (2 * c + u * (6 * d)) / REFINED**2,
    )
    offset = widths[0].log() - wide.log().sum(0)
    if rounded:
        offset += pairs[-1, index].log()
    by_code = [
        torch.zeros(1 << 2 * _CODE_BITS, dtype=dtype)
        for dtype in (torch.float32, torch.int32, torch.float32)
    ]
    for part, values in zip(
        by_code, (half[index] * REFINED - 0.5, first[index] * REFINED, offset), strict=True
    ):
        part[numbers.long()] = values.to(part)
    return _Table(*(part.reshape(-1).to(device) for part in (*by_code, *refined)))


def _interpolate(cells: Cells, mean: Tensor | float, deviation: float, likelihood: bool) -> Moments:
    """Return the moments by interpolation over the distance of μ from the center of the cell; exact
    outside.
    """
    assert cells.codes is not None
    table = _tabulate(cells.widths, deviation, cells.rounded, cells.device)
    codes, shape, step = cells.codes.reshape(-1), cells.shape, 1 / (POINTS * REFINED)
    center = torch.add(cells.lo, cells.hi).mul_(0.5)
    if cells.below is not None and cells.above is not None:
        center.add_(cells.below, alpha=0.5).sub_(cells.above, alpha=0.5)
    place = torch.sub(center, mean).mul_(1 / (step * deviation)).view(-1)
    rest = place.abs()
    outside = (~(rest < table.ends.index_select(0, codes))).nonzero()[:, 0]
    rest[outside] = 0.0
    point = rest.round()
    rest.sub_(point)
    index = point.int().add_(table.first.index_select(0, codes))
    value, slope = table.value.index_select(0, index), table.slope.index_select(0, index)
    distance, log_mass = torch.addcmul(value, rest, slope).copysign_(place), value.new_empty(0)
    if likelihood:
        passed = value.addcmul_(rest, slope, value=0.5).sub_(
            point.add_(rest, alpha=0.5), alpha=step
        )
        log_mass = table.log_mass.index_select(0, index).add_(table.offset.index_select(0, codes))
        log_mass = log_mass.addcmul_(passed, rest, value=step).view(shape)
        slope.addcmul_(rest, table.curve.index_select(0, index))
    mean_of = center.sub_(distance.view(shape), alpha=deviation)
    found = Moments(mean_of, slope.mul_(deviation**2 / step).view(shape), log_mass)
    if len(outside):
        some = mean if isinstance(mean, float) else mean.reshape(-1)[outside][None]
        exact = moments(replace(cells.at(outside), widths=()), some, deviation)
        for part, values in zip(found if likelihood else found[:2], exact, strict=False):
            part.view(-1)[outside] = values[0]
    return found


@dataclass(frozen=True, slots=True)
class Shrunk:
    """Singular values after shrinking, float64, those that are not zero.

    Args:
        eta: η, the singular values of the estimate of L.
        debiased: x, the estimated singular values of L itself.
        noise: τ, the standard deviation of the score's noise.
    """

    eta: Tensor
    debiased: Tensor
    noise: float


def noise_edge(shape: tuple[int, int], deviation: float) -> float:
    """Return deviation·(√m + √n), the edge of the singular values of pure noise."""
    return deviation * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def shrink(
    s: Tensor, shape: tuple[int, int], deviation: float, information: float, relaxation: float = 1.0
) -> Shrunk:
    """Return the shrunk singular values of a posterior mean, of those above the noise edge.

    Args:
        s: σ, descending.
        shape: ``(m, n)``.
        deviation: s, of the remainder outside L.
        information: q in (0, 1].
        relaxation: α; σ are those of the posterior mean less (1 − α)·L.

    Example:
        >>> found = shrink(torch.tensor([10.0, 2.0]), (1, 1), 1.0, 1.0)  # of noise with the edge 2
        >>> [round(x, 3) for x in (*found.eta.tolist(), *found.debiased.tolist())]
        [9.798, 9.899]
    """
    m, n = shape
    noise = deviation / math.sqrt(information)
    sigma = s.double().cpu().numpy()  # NumPy starts sixty steps on a few values faster
    sigma = sigma[sigma > noise_edge(shape, deviation * math.sqrt(information))]
    low, high = np.full_like(sigma, noise_edge(shape, noise)), sigma / information
    for _ in range(60):
        middle = (low + high) / 2
        above = (relaxation - information) * _eta(
            middle, m, n, noise
        ) + information * middle > sigma
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    y = (low + high) / 2
    eta = _eta(y, m, n, noise)
    debiased = np.sqrt((y**2 - (m + n) * noise**2 + eta * y) / 2)
    return Shrunk(torch.from_numpy(eta), torch.from_numpy(debiased), noise)


def _eta(y: NDArray[np.float64], m: int, n: int, noise: float) -> NDArray[np.float64]:
    """Return η(y) for noise of deviation τ = ``noise``; 0 at the noise edge."""
    square = (y**2 - (m + n) * noise**2) ** 2 - 4 * m * n * noise**4
    return np.sqrt(np.maximum(square, 0.0)) / y


def add_noise(x: Tensor, shape: tuple[int, int], deviation: float) -> Tensor:
    """Return the singular values of L plus dense noise: √((x + mτ²/x)(x + nτ²/x)), or the edge
    below the transition.

    Args:
        x: Singular values of L, not negative.
        shape: ``(m, n)``.
        deviation: τ, the standard deviation of the noise's entries.
    """
    (m, n), square = shape, deviation**2
    x = x.clamp(min=max(1e-300, deviation * (m * n) ** 0.25))
    return ((x + m * square / x) * (x + n * square / x)).sqrt()


# A fit is rejected if both are exceeded: χ² per degree of freedom, and the misplaced fraction of
# the changed (or unchanged) entries. Scaled updates of the sample model's layers have fractions up
# to 0.10 (both starts, χ² up to 14); training without master weights has 0.6 and more with rounding
# to nearest (start: stored), 0.087 to 0.26 with stochastic rounding, which resembles a rounded
# start. There a rejected fit has χ² above 40.
MAX_CHI, MAX_MISPLACED = 20.0, {"stored": 0.12, "rounded": 0.07}

# It is rejected, too, if the size varies so much with |W|, and by so many times its error. In 190
# scaled updates of the sample model's layers it varied by up to 0.07, and by 2 times its error; in
# training without master weights and with stochastic rounding by 0.10 to 0.51, and by 6 to 28 times
# (256², simulated).
MAX_UNEVENNESS, MAX_UNEVENNESS_ERRORS = 0.08, 3.0

# Binades with fewer expected changes or expected unchanged entries are excluded from χ².
MIN_EXPECTED = 10.0

# Exponents of float64 numbers.
_LOWEST, _BINADES = -1100, 2200

# Binades with fewer entries, or whose cells remove less of the variance, have no size.
MIN_COUNT, MIN_INFORMATION = 50, 0.01


@dataclass(slots=True)
class Binades:
    """Counts of entries and sums over them, by ⌊log2|W|⌋.

    Args:
        sums: For every binade, float64: the number of entries, the number of changed ones, Σ of the
            probabilities p of a change, Σ p(1 − p), Σ E[(x − L)²]/s², Σ of its squares, and Σ of
            the fractions of the variance that cells remove.
        most_uneven: ``unevenness`` above which a fit is rejected, if the variation is also more
            than ``MAX_UNEVENNESS_ERRORS`` times its error.
    """

    sums: Tensor = field(default_factory=lambda: torch.zeros(7, _BINADES, dtype=torch.float64))
    most_uneven: float = MAX_UNEVENNESS

    def add(
        self, base: Tensor, changed: Tensor, probability: Tensor, square: Tensor, known: Tensor
    ) -> None:
        """Add a block.

        Args:
            base: W.
            changed: Which entries changed.
            probability: Probability of a change under the model.
            square: E[(x − L)²]/s² given the cells.
            known: 1 − Var[x]/s² given the cells.
        """
        exponent = torch.frexp(base.double())[1]
        indices = (
            torch.where(base == 0, 0, exponent.clamp(_LOWEST + 1, 1099) - _LOWEST)
            .reshape(-1)
            .cpu()
            .long()
        )
        p = probability.double().clamp(0.0, 1.0).reshape(-1).cpu()
        second = square.double().reshape(-1).cpu()
        removed = known.double().reshape(-1).cpu()
        counted = (torch.ones_like(p), changed.reshape(-1).double().cpu())
        for sums, values in zip(
            self.sums, (*counted, p, p * (1 - p), second, second**2, removed), strict=True
        ):
            sums.index_add_(0, indices, values)

    @property
    def chi(self) -> float | None:
        """χ² per degree of freedom; None with fewer than two usable binades."""
        entries, changed, expected, variance = self.sums[:4]
        judged = torch.minimum(expected, entries - expected) >= MIN_EXPECTED
        if int(judged.sum()) < 2:
            return None
        terms = (changed - expected)[judged] ** 2 / variance[judged]
        return float(terms.sum()) / (int(judged.sum()) - 1)  # one size was fitted

    @property
    def misplaced(self) -> float:
        """Σ|changed − expected| over the binades, over the smaller number of changed or unchanged
        ones; 0 if none.
        """
        entries, changed, expected = self.sums[:3]
        fewer = min(float(changed.sum()), float((entries - changed).sum()))
        off = float((changed - expected).abs().sum())
        return off / fewer if fewer > 0 else 0.0

    @property
    def _variation(self) -> tuple[float, float]:
        """Standard deviation of log s_b over binades, weighted by Σq, and that of its errors.

        Both are 0 with fewer than two usable binades.
        """
        entries, known = self.sums[0], self.sums[6]
        used = (entries >= MIN_COUNT) & (known >= MIN_INFORMATION * entries)
        if int(used.sum()) < 2:
            return 0.0, 0.0
        count, _, _, _, square, scatter, removed = self.sums[:, used]
        mean, q = square / count, removed / count
        log_size = mean.log() / 2 / q
        error = ((scatter / count - mean**2).clamp(min=0.0) / count).sqrt() / 2 / q
        weight = count * q / (count * q).sum()
        variance = float((weight * (log_size - (weight * log_size).sum()) ** 2).sum())
        return math.sqrt(variance), math.sqrt(float((weight * error**2).sum()))

    @property
    def unevenness(self) -> float:
        """Standard deviation of the logarithm of the size over binades, beyond its error."""
        spread, error = self._variation
        return math.sqrt(max(0.0, spread**2 - error**2))

    def is_rejected(self, start: str) -> bool:
        """Return whether the model does not fit, given the assumed start of training."""
        spread, error = self._variation
        if self.unevenness > self.most_uneven and spread > MAX_UNEVENNESS_ERRORS * error:
            return True
        return (self.chi or 0.0) > MAX_CHI and self.misplaced > MAX_MISPLACED[start]
