"""The precision of stored numbers: the spacing of values around each entry, and what it shows about
ΔW.

A value w stored with p mantissa bits represents every number within half a spacing of it, ulp(w) =
2^(⌊log₂|w|⌋ − p). So a stored W differs from the one that was trained by an E with |E_ij| ≤
ulp(W_ij)/2, and, while the trained values lie anywhere between two stored ones, E_ij has the
variance ulp²/12 of a uniform error (Widrow and Kollár 2008, *Quantization Noise*, §4).

What depends on the values of a block is decided by the CPU where they are in its memory. For a GPU
it would have to wait each time. There a decision is a scalar tensor that selects or multiplies
sums, and nothing is read before ``fetch_sums``.

Which entries were trained, and whether BASE was rounded after the start, are read from the spacing
u, which jumps by 2 at powers of two, where |w| does not: what scales with u is rounding, what
scales with |w| is training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_diag.linalg.devices import fetch

# dtype -> (integer of the same width, mask of the exponent bits, stored mantissa bits)
LAYOUT = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000, 52),
    torch.float32: (torch.int32, 0x7F80_0000, 23),
    torch.float16: (torch.int16, 0x7C00, 10),
    torch.bfloat16: (torch.int16, 0x7F80, 7),
}


@dataclass(slots=True)
class Profile:
    """Σ u² and Σ u⁴ of every row and of every column of a matrix of spacings u, in units of
    ``unit``² and ``unit``⁴.

    Sums over rows and columns of a block have its dtype, relative to its largest spacing, and are
    added up in float64.
    """

    rows: Tensor
    columns: Tensor
    rows_fourth: Tensor
    columns_fourth: Tensor
    unit: Any = 0.0  # a scalar tensor on a GPU

    @classmethod
    def of(cls, shape: tuple[int, int], device: torch.device | None = None) -> Profile:
        """Return the profile of zeros, on the CPU or on the device of the blocks, which then need
        no transfer.
        """
        (rows, rows_fourth), (columns, columns_fourth) = (
            torch.zeros(2, size, dtype=torch.float64, device=device) for size in shape
        )
        return cls(
            rows,
            columns,
            rows_fourth,
            columns_fourth,
            0.0 if rows.device.type == "cpu" else rows.new_zeros(()),
        )

    def add(
        self,
        spacing: Tensor,
        scale: float | Tensor,
        row: int,
        column: int,
        top: float | Tensor | None = None,
    ) -> Tensor:
        """Add the block u = ``spacing``·``scale`` at (``row``, ``column``); return its Σ u², a
        scalar.

        ``spacing`` is overwritten: of 15 ms that a block of 2²⁰ entries took, 12 went into new
        pages for copies. ``top`` is its maximum if known.
        """
        if isinstance(self.unit, Tensor):
            top = spacing.max().clamp(min=torch.finfo(spacing.dtype).tiny).to(self.unit)
            self._set_unit(torch.maximum(self.unit, top * scale))
        else:
            if top is None:
                top = (
                    float(spacing.amax()) if spacing.numel() else 0.0
                )  # ``max`` took 55 us a piece, not 15
            if not 0.0 < top * scale < math.inf:
                return self.rows.new_full((), float(top * scale))
            if top * scale > self.unit:
                self._set_unit(top * scale)
        ratio = (top * scale / self.unit) ** 2
        down, across = slice(row, row + spacing.shape[0]), slice(column, column + spacing.shape[1])
        # 1/top is exact for powers of two, which most spacings are; a division took 45 us a piece,
        # not 17
        is_normal = isinstance(top, float) and top >= torch.finfo(spacing.dtype).tiny
        squares = (spacing.mul_(1 / top) if is_normal else spacing.div_(top)).square_()
        rows = squares.sum(1).to(self.rows)
        self.rows[down] += ratio * rows
        self.columns[across] += ratio * squares.sum(0).to(self.rows)
        fourth = squares.square_()
        self.rows_fourth[down] += ratio**2 * fourth.sum(1).to(self.rows)
        self.columns_fourth[across] += ratio**2 * fourth.sum(0).to(self.rows)
        return rows.sum() * (top * scale) * (top * scale)

    def _set_unit(self, unit: float | Tensor) -> None:
        """Change the unit, and express the sums in it."""
        ratio = (self.unit / unit) ** 2
        for sums, power in (
            (self.rows, 1),
            (self.columns, 1),
            (self.rows_fourth, 2),
            (self.columns_fourth, 2),
        ):
            sums *= ratio**power
        self.unit = unit


def mix_profiles(parts: Iterable[tuple[float, Profile]], shape: tuple[int, int]) -> Profile:
    """Return the profile of Σ wᵢ·uᵢ² as variances, given (wᵢ, profile of uᵢ): Σ of variances and of
    their squares.

    The sums of squares are upper bounds (Minkowski), exact where the parts have one shape.
    """
    present = [(weight, part) for weight, part in parts if weight > 0.0 and part.unit > 0.0]
    total = Profile.of(shape)
    total.unit = max((part.unit for _, part in present), default=0.0)
    for weight, part in present:
        ratio = weight * (part.unit / total.unit) ** 2
        total.rows += ratio * part.rows
        total.columns += ratio * part.columns
        total.rows_fourth += ratio * part.rows_fourth.sqrt()
        total.columns_fourth += ratio * part.columns_fourth.sqrt()
    total.rows_fourth **= 2
    total.columns_fourth **= 2
    return total


@dataclass(slots=True)
class Spacing:
    """The spacing u of the values of one side of ΔW, block by block.

    Args:
        profile: Sums of u² and u⁴ over changed entries; of a block where few are unchanged, over
            all.
        still: The same sums over the unchanged entries of the other blocks.
        total: Σ u² over all entries, to 1e-6; a scalar.
        mantissa: Mantissa bits that the stored values really use; 0 for a quantized format.
    """

    profile: Profile
    still: Profile
    total: Tensor
    mantissa: Any = 0  # a scalar tensor on a GPU
    _scratch: Tensor | None = None

    @classmethod
    def of(cls, shape: tuple[int, int], device: torch.device | None = None) -> Spacing:
        """Return the spacing of no entries."""
        profile = Profile.of(shape, device)
        return cls(profile, Profile.of(shape, device), profile.rows.new_zeros(()))

    @property
    def squares(self) -> float:
        """Σ u² over all entries."""
        return float(self.total)

    def add(
        self,
        block: Tensor,
        step: Tensor | None = None,
        unchanged: Unchanged | None = None,
        row: int = 0,
        column: int = 0,
        sample: slice = slice(0),
        weight: Tensor | None = None,
    ) -> Tensor:
        """Add a block.

        A bfloat16 model that was saved as float32 is still rounded to bfloat16, so values that a
        shorter dtype represents exactly are treated as rounded to it.

        Args:
            block: Stored values, or dequantized ones; ``(rows, columns)``.
            step: The spacing of a quantized format at every entry, in place of that of the dtype;
                None for that.
            unchanged: The entries equal on both sides; None if none is (never on a GPU).
            row: Row number of the first row.
            column: Column number of the first column.
            sample: Slice of the flattened block: the entries whose spacing is returned.
            weight: 1, or 0 if the block does not count, a decision on a GPU; None for 1.

        Returns:
            The spacing of those entries, float64.
        """
        scratch = self._scratch
        if scratch is None or scratch.shape[1] != block.shape[1] or len(scratch) < len(block):
            scratch = self._scratch = torch.empty_like(
                block, dtype=working_dtype((block if step is None else step).dtype)
            )
        spacing: Tensor = scratch[: len(block)]
        scale: float | Tensor = 1.0
        if step is not None:
            spacing.copy_(step.reshape(block.shape))
        elif isinstance(self.profile.unit, Tensor):
            used = write_spacings_on_gpu(block, spacing)
            scale = torch.exp2(-used.to(self.total))
            self.mantissa = torch.clamp(used, min=self.mantissa)
        else:
            mantissa = write_spacings(block, spacing)
            scale = 2.0**-mantissa
            self.mantissa = max(self.mantissa, mantissa)
        if weight is not None:
            spacing *= weight
        sampled = spacing.reshape(-1)[sample].to(torch.float64) * scale
        self.total = self.total + self._add(spacing, scale, unchanged, row, column)
        return sampled

    def _add(
        self,
        spacing: Tensor,
        scale: float | Tensor,
        unchanged: Unchanged | None,
        row: int,
        column: int,
    ) -> Tensor:
        """Add u = ``spacing``·``scale`` to the profile; that of unchanged entries to ``still``
        where they are many, and at most their limit. Return Σ u².
        """
        if unchanged is None:
            return self.profile.add(spacing, scale, row, column)
        if isinstance(unchanged.few, Tensor):
            total: Tensor = torch.linalg.vector_norm(spacing, dtype=torch.float64) * scale
            limited = (
                torch.minimum(spacing, (unchanged.limit / scale).to(spacing.dtype))
                * unchanged.entries
            )
            self.still.add(limited * ~unchanged.few, scale, row, column)
            self.profile.add(
                torch.where(unchanged.entries, limited * unchanged.few, spacing), scale, row, column
            )
            return total.square()
        if unchanged.few and (top := float(spacing.amax())) * scale <= unchanged.limit:
            return self.profile.add(spacing, scale, row, column, top)
        norm = torch.linalg.vector_norm(spacing, dtype=torch.float64).to(self.total) * scale
        limited = spacing.clamp(max=min(unchanged.limit / scale, torch.finfo(spacing.dtype).max))
        # a tensor of bool, and ``where`` and ``masked_fill_`` with it, take three to six times as
        # long
        still = torch.eq(unchanged.block, 0, out=torch.empty_like(spacing))
        if unchanged.few:
            self.profile.add(spacing.add_(limited.sub_(spacing).mul_(still)), scale, row, column)
        else:
            self.still.add(limited.mul_(still), scale, row, column)
            self.profile.add(spacing.addcmul_(spacing, still, value=-1.0), scale, row, column)
        squares: Tensor = norm * norm
        return squares


# Fraction of unchanged entries of a block below which training is assumed to have changed all of
# them.
FEW_UNCHANGED = 0.25


@dataclass(frozen=True)
class Unchanged:
    """The unchanged entries of a block.

    If training moved such an entry, the error is the move that rounding undid: no larger than u/2,
    and if u is far larger, as large as other moves. Its spacing then counts as ``limit`` =
    √12·rms(ΔW).

    Args:
        block: ΔW.
        few: Whether their fraction is below ``FEW_UNCHANGED``.
        limit: The largest spacing that counts.
    """

    block: Tensor
    few: bool | Tensor
    limit: Any

    @cached_property
    def entries(self) -> Tensor:
        """True where unchanged."""
        return self.block == 0

    @classmethod
    def of(cls, block: Tensor, fro: float | Tensor, number: int | Tensor) -> Unchanged | None:
        """Return the unchanged entries of a block of ΔW, given its norm and their number.

        None if there are none; on a GPU, where the number is not read, never None.
        """
        if not isinstance(number, Tensor) and not number:
            return None
        entries = block.numel()
        return cls(block, number < FEW_UNCHANGED * entries, math.sqrt(12 / entries) * fro)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# The shorter dtypes whose values may have been saved in a longer one, the shortest first.
SHORTER = {
    torch.float64: (torch.bfloat16, torch.float16, torch.float32),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float16: (torch.bfloat16,),
    torch.bfloat16: (),
}


# Values of a 4-bit format that share a scale, and the number of their levels. Of 32 Gaussian
# numbers, 31.6 differ in bfloat16, at least 18 in float8 and 23 in int8.
GROUP, LEVELS = 32, 16


def is_dequantized(values: Tensor, start: Tensor | None = None) -> bool:
    """Return whether the values of a float dtype lie on at most 16 levels in groups of 32 inputs of
    a row.

    So do those of int4, Q4_0, Q4_1, NF4 and MXFP4 after dequantization. Of up to 128 groups, nine
    of ten must, so that a few edited entries do not matter, and half must have more than one level.
    Pruned weights have few values, too: of the entries other than zero, more than half must share
    their value with another of the group. Of Gaussian and heavy-tailed weights in these formats 78
    to 92% do, of pruned ones in bfloat16, int8 and float8 at most 25%.

    Args:
        values: ``(rows, columns)``, any float dtype.
        start: The values before training; only groups and entries that differ from it count, as
            values that training did not change are those of ``start``. None to count all.
    """
    if values.shape[1] % GROUP or not values.numel():
        return False
    groups, counted = values.reshape(-1, GROUP), None
    if start is not None:
        changed = groups != start.reshape(-1, GROUP)
        used = changed.any(dim=1)
        groups, counted = groups[used], changed[used]
    step = len(groups) // 64 | 1
    groups = groups[::step].to(working_dtype(values.dtype))
    counted = groups != 0 if counted is None else counted[::step] & (groups != 0)
    number = (groups[:, :, None] == groups[:, None]).sum(
        dim=2
    )  # of the entries of the group with this value
    levels = (1 / number).sum(dim=1).round()
    few = (levels <= LEVELS).double().mean() >= 0.9 and (levels > 1).double().mean() >= 0.5
    return bool(few and 2 * (counted & (number > 1)).sum() > counted.sum())


# Largest over smallest spacing of a 4-bit format: 4 in MXFP4, 3.8 in NF4, 1 in the others.
UNEVENNESS = 4.0


def find_steps(values: Tensor) -> Tensor:
    """Return the spacing of dequantized values: the distance to the nearest other level in the
    group of 32.

    Levels between an outlier and the others may be missing, so it is at most four times the
    smallest of the group.

    Args:
        values: ``(rows, columns)``, columns a multiple of 32.

    Returns:
        The spacing of every entry, 1-D, float64 for float64, else float32; 0 in a group of equal
            values.

    Example:
        >>> find_steps(torch.arange(32.0).div(4).floor()[None])[:3]
        tensor([1., 1., 1.])
    """
    found = torch.empty(values.numel(), dtype=working_dtype(values.dtype))
    parts = (torch.split(matrix.reshape(-1, GROUP), 2**11) for matrix in (values, found))
    for groups, steps in zip(*parts, strict=True):
        groups = groups.to(found.dtype)
        distances = (groups[:, :, None] - groups[:, None]).abs_()
        torch.amin(distances.masked_fill_(distances == 0, math.inf), dim=2, out=steps)
        torch.minimum(steps, UNEVENNESS * steps.amin(dim=1, keepdim=True), out=steps)
    return found.masked_fill_(found.isinf(), 0.0)


def write_spacings(values: Tensor, out: Tensor) -> int:
    """Write the spacing of every entry in units of 2^-p, and return p, the mantissa bits used by
    most entries.

    A float32 number that was not rounded to bfloat16 fits it with probability 2⁻¹⁶, a float16
    number bfloat16 with 1/8; so if of the entries other than zero a majority fits, they were
    rounded, regardless of a few that do not (a manual edit).

    Args:
        values: float64, float32, float16 or bfloat16; any shape.
        out: Output of that shape, contiguous, float64 for float64, else float32.

    Example:
        >>> out = torch.empty(3)
        >>> (
        ...     write_spacings(torch.tensor([1.0, 0.5, 0.1]), out),
        ...     out,
        ... )  # the last one is no bfloat16 number
        (7, tensor([1.0000e+00, 5.0000e-01, 9.5367e-07]))
    """
    out.copy_(values)
    integer, mask, _ = LAYOUT[out.dtype]
    out.view(integer).bitwise_and_(mask)  # 2^⌊log₂|w|⌋
    out.clamp_(
        min=torch.finfo(values.dtype).tiny
    )  # zero and subnormal numbers: like the smallest normal one
    own_mantissa = LAYOUT[values.dtype][2]
    # Only candidates for a shorter dtype get the full comparison. The step is odd: with every
    # 4096th entry, a block of 4096 columns would be judged by its first column only.
    flat = values.reshape(-1)
    sample = flat[:: len(flat) // 256 | 1]
    for dtype in SHORTER[values.dtype]:
        if 2 * int(_fits_dtype(sample, dtype).sum()) <= len(sample):
            continue
        fits = _fits_dtype(values, dtype)
        number, mantissa, tiny = (
            int(torch.count_nonzero(fits)),
            LAYOUT[dtype][2],
            torch.finfo(dtype).tiny,
        )
        if number == len(flat):  # ``where`` takes as long as the comparison
            out.clamp_(min=tiny)
            return mantissa
        others = int(torch.count_nonzero(values)) if 2 * number > len(flat) else 0
        if (
            2 * (number - len(flat) + others) > others
        ):  # zeros, as of pruned weights, fit every dtype
            torch.where(fits, out.clamp(min=tiny), out * 2.0 ** (mantissa - own_mantissa), out=out)
            return mantissa
    return own_mantissa


def write_spacings_on_gpu(values: Tensor, out: Tensor) -> Tensor:
    """Write spacings as ``write_spacings``, without reading from the GPU: p is a scalar there.

    Example:
        >>> out = torch.empty(3)
        >>> write_spacings_on_gpu(torch.tensor([1.0, 0.5, 0.1]), out), out
        (tensor(7), tensor([1.0000e+00, 5.0000e-01, 9.5367e-07]))
    """
    out.copy_(values)
    integer, mask, own_mantissa = (
        LAYOUT[out.dtype][0],
        LAYOUT[out.dtype][1],
        LAYOUT[values.dtype][2],
    )
    out.view(integer).bitwise_and_(mask)
    out.clamp_(min=torch.finfo(values.dtype).tiny)
    mantissa = torch.full((), own_mantissa, device=values.device)
    exact = out.clone() if SHORTER[values.dtype] else out
    others = torch.count_nonzero(values)
    zeros = values.numel() - others
    for dtype in reversed(SHORTER[values.dtype]):
        fits = _fits_dtype(values, dtype)
        mostly_fit = (2 * (torch.count_nonzero(fits) - zeros) > others) | (others == 0)
        shorter = LAYOUT[dtype][2]
        mixed = torch.where(
            fits, exact.clamp(min=torch.finfo(dtype).tiny), exact * 2.0 ** (shorter - own_mantissa)
        )
        out.copy_(torch.where(mostly_fit, mixed, out))
        mantissa = torch.where(mostly_fit, shorter, mantissa)
    return mantissa


def _fits_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of the values that a shorter dtype represents exactly."""
    return values.to(dtype).to(values.dtype) == values


def fetch_sums(sides: Iterable[Spacing], *others: Tensor) -> list[Tensor]:
    """Copy the sums of all sides from a GPU, and other float64 tensors, which are returned: in one
    transfer.
    """
    sides = [side for side in sides if side.total.device.type != "cpu"]
    profiles = [profile for side in sides for profile in (side.profile, side.still)]
    scalars = [(side, name) for side in sides for name in ("total", "mantissa")]
    fields = ("rows", "columns", "rows_fourth", "columns_fourth", "unit")
    sums = [(profile, name) for profile in profiles for name in fields]
    numbers = [getattr(owner, name) for owner, name in (*scalars, *sums)]
    tensors = [
        number if isinstance(number, Tensor) else sides[0].total.new_full((), number)
        for number in numbers
    ]
    values = (
        fetch(*(tensor.to(torch.float64) for tensor in (*tensors, *others)))
        if sides
        else list(others)
    )
    for (owner, name), value in zip((*scalars, *sums), values, strict=False):
        setattr(owner, name, value)
    for side in sides:
        side.mantissa = int(side.mantissa)
    for profile in profiles:
        profile.unit = float(profile.unit) if profile.rows.any() else 0.0
    return values[len(tensors) :]


def rounding_bound(sides: Iterable[Spacing]) -> float:
    """Return B with ‖E‖_F ≤ B for the rounding error E of ΔW: √Σ(ulp/2)² of each rounded side,
    added (Minkowski).
    """
    return sum(math.sqrt(side.squares) / 2 for side in sides) * (1 + 1e-6)


def is_finer(base: Spacing, tuned: Spacing) -> bool:
    """Return whether TUNED is stored more finely than BASE, so that BASE may be the exact start of
    training.

    TUNED is the rounded result of training: its rounding always counts. BASE is where training
    started: its stored values are exact if they are the starting point. Where both are stored
    alike, both may have been rounded from a finer run; and a quantized BASE is an approximation of
    other weights.
    """
    return bool(tuned.mantissa > base.mantissa > 0)


# Entries of a layer in which unchanged ones are counted.
SAMPLE = 2**18

# Minimum number of entries for an estimated fraction.
MIN_COUNT = 64

# Numbers of 8 exponent and 7 mantissa bits, and entries per block.
_BINS, _PART = 2**15, 2**16

# Reweighting ends when no weight changes by more than this; 5 to 30 rounds were observed.
_CONVERGED, _ITERATIONS = 1e-3, 50

# β of ``Energies`` is None if the median squared error of the fitted means of bins, over their
# variance, is above this; 0.455, the median of χ² with one degree of freedom, is expected. It was
# 0.41 to 0.91 in planted layers whose start was decided, and 1.0 to 77 in 29 layers that were
# wrongly taken for the start: their BASE was a bfloat16 copy of weights dequantized from 4 bits,
# whose rounding errors are not spread evenly.
MAX_START_MISFIT = 1.1


@dataclass(slots=True)
class Sample:
    """Entries at a constant distance over all blocks, and so independent of the blocks.

    Args:
        shape: ``(m, n)`` of the matrix.
        stride: The distance, in entries of the flattened matrix; it has no factor in common with n.
        parts: The sampled entries of every block.
    """

    shape: tuple[int, int]
    stride: int = field(init=False)
    parts: list[tuple[Tensor, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        m, n = self.shape
        self.stride = max(1, -(-m * n // SAMPLE))
        while math.gcd(self.stride, n) > 1:  # otherwise some columns are never sampled
            self.stride += 1

    def select(self, row: int) -> slice:
        """Return the slice of the sampled entries of the flattened block that begins
        with this row.
        """
        return slice(-row * self.shape[1] % self.stride, None, self.stride)

    def add(self, *matrices: Tensor) -> None:
        """Add the absolute values of the sampled entries of a block: of ΔW, and of the spacing of
        both sides.
        """
        self.parts.append(tuple(values.to(torch.float64).abs() for values in matrices))

    def join(self) -> tuple[Tensor, ...]:
        """Return the samples of each matrix."""
        if not self.parts:
            return tuple(torch.zeros(0, dtype=torch.float64) for _ in range(3))
        return tuple(
            torch.cat(column) for column in zip(*self.parts, strict=True)
        )  # on the device of the blocks


@dataclass(frozen=True, slots=True)
class Moves:
    """Numbers of changed entries in a sample, by the binade of their spacing u, in ascending order.

    Args:
        spacing: 2^⌊log₂u⌋.
        entries: Number of entries.
        changed: Number of changed entries.
        far: Number of entries that changed by more than one u.
    """

    spacing: Tensor
    entries: Tensor
    changed: Tensor
    far: Tensor

    @classmethod
    def of(cls, changes: Tensor, spacing: Tensor) -> Moves:
        """Return the numbers of changed entries of a sample, given |ΔW| and u of each entry."""
        binade = spacing.view(torch.int64) >> 52
        lowest, highest = (int(end) for end in binade.aminmax()) if len(binade) else (0, -1)
        # three bins a binade: not changed, changed, by more than one u
        bins = 3 * (binade - lowest) + (changes > 0) + (changes > 1.5 * spacing)
        binades = highest - lowest + 1
        still, near, far = torch.bincount(bins, minlength=3 * binades).view(binades, 3).T
        changed, entries = near + far, still + near + far
        present = entries > 0
        values = torch.arange(len(entries), dtype=torch.float64) + (lowest - 1023)
        return cls(
            2.0 ** values[present],
            *(counts[present].double() for counts in (entries, changed, far)),
        )

    def estimate_untouched(self) -> float:
        """Estimate the fraction of entries that training did not change, excluding those that
        rounding left unchanged.

        An entry is unchanged by rounding while its move is less than u/2, so the fraction of
        unchanged entries falls to that of the untouched ones as u → 0, provided that the size of
        changes is independent of |w|. It is read from the entries of smallest u, from as many as
        give the smallest upper limit, less two standard errors: entries not known to be untouched
        count as trained. A spacing at which most changes are by one u is uninformative, and so are
        larger ones: there moves are no larger than u, and rounding may have left any of the others.
        Changes of more than one u must outnumber the others by two standard errors. The result is 0
        if no spacing is informative.
        """
        count, changed, far = (
            counts.cumsum(0) for counts in (self.entries, self.changed, self.far)
        )
        small = (2 * self.far >= self.changed).cumprod(0).bool() & (count >= MIN_COUNT)
        informative = small & ((2 * far - changed > 2 * changed.sqrt()) | (self.changed.sum() == 0))
        if not informative.any():
            return 0.0
        share = (1 - changed / count)[informative]
        error = 2 * (share * (1 - share) / count[informative]).sqrt()
        return max(0.0, float((share - error)[(share + error).argmin()]))

    def estimate_noise_per_change(self, untouched: float, sides: int) -> float:
        """Return w: the noise of ΔW is w·Σu² over the changed entries, summed over the rounded
        sides.

        Where an entry moves by many u its error has the variance u²/12 a side. Where less than half
        of the trained entries of one spacing changed, a share p of them, each by about one u, the
        noise is no more than what independent changes make, p(1 − p)u². The smaller of the two is
        taken for each spacing, for trained entries.

        Args:
            untouched: Fraction of untouched entries.
            sides: Number of rounded sides.
        """
        trained = torch.maximum(self.entries * (1 - untouched), self.changed)
        share = self.changed / trained.clamp(min=1e-300)
        variance_of_few = torch.minimum(share * (1 - share) / sides, torch.full_like(share, 1 / 12))
        variance = torch.where(share > 0.5, self.changed / 12, trained * variance_of_few)
        weight = (self.spacing / self.spacing.max()) ** 2 if len(share) else share
        changed = float((weight * self.changed).sum())
        return float((weight * variance).sum()) / changed if changed else 1 / 12


@dataclass(slots=True)
class Energies:
    """n, Σ ΔW², Σ ΔW⁴ of the changed entries by exponent and 7 mantissa bits of |w|, which
    determine BASE's spacing.
    """

    sums: Tensor

    @classmethod
    def of(cls, device: torch.device) -> Energies:
        """Return the sums of no entries, on the device of the blocks."""
        return cls(torch.zeros(3, _BINS, dtype=torch.float64, device=device))

    def add(self, block: Tensor, base: Tensor) -> None:
        """Add a block of ΔW and of W_base."""
        parts = zip(
            torch.split(_compute_bins(base), _PART),
            torch.split(block.reshape(-1), _PART),
            strict=True,
        )
        for (
            bins,
            changes,
        ) in (
            parts
        ):  # stays in the cache, and in memory that is not returned in between: 1.1, not 6 ms
            squares = changes.to(torch.float64).square()
            count = torch.bincount(bins, squares.sign())
            used = slice(len(count))
            self.sums[0, used] += count
            self.sums[1, used] += torch.bincount(bins, squares)
            self.sums[2, used] += torch.bincount(bins, squares.square_())

    def add_on_gpu(self, block: Tensor, base: Tensor) -> None:
        """Add a block as ``add``, in multiples of 2⁻³⁶ of a bin's largest term: integers add up
        alike in any order.
        """
        bins, squares = (
            _compute_bins(base).to(torch.int64),
            block.reshape(-1).to(torch.float64).square(),
        )
        largest = (
            torch.zeros_like(self.sums[0])
            .scatter_reduce_(0, bins, squares, "amax")
            .clamp_(min=1e-300)
        )
        shares = squares / largest[bins]
        units = (torch.ones_like(largest), largest, largest.square())
        for sums, values, unit in zip(
            self.sums, ((shares > 0).to(shares), shares, shares.square()), units, strict=True
        ):
            whole = (values * 2.0**36).round().to(torch.int64)
            counts = torch.zeros(_BINS, dtype=torch.int64, device=bins.device).scatter_add_(
                0, bins, whole
            )
            sums += counts.to(torch.float64) * 2.0**-36 * unit

    def estimate_base_rounding(self, mantissa: int) -> tuple[float, float] | None:
        """Estimate β of E[ΔW²] = β·u²/12 + f(|w|), f smooth, with its standard error, over the
        changed entries.

        u is the spacing of BASE: β is 1 where BASE was rounded from the weights at which training
        began, 0 where the stored BASE is the start. f describes changes proportional to the size of
        a weight: γw² and a polynomial in z = |w|/(|w| + median), which no jump at powers of two
        resembles. Least squares, reweighted by the inverse square of the fit; the error is robust
        to the distribution of the moves (White 1980).

        Args:
            mantissa: Bits of BASE.

        Returns:
            β and its standard error; None if too few entries changed, all have one spacing, Σ ΔW⁴
                is 0 or infinite, or
            the model does not fit (``MAX_START_MISFIT``).
        """
        tiny = max(
            torch.finfo(dtype).tiny for dtype, layout in LAYOUT.items() if layout[2] == mantissa
        )
        values = (torch.arange(_BINS, dtype=torch.int32) << 16).view(torch.float32).double()
        present = (self.sums[0] > 0) & (values > 0) & values.isfinite()
        (n, changes, fourth), values = self.sums[:, present], values[present]
        spacing = 2.0 ** (values.log2().floor() - mantissa).clamp(min=math.log2(tiny) - mantissa)
        if (
            n.sum() < MIN_COUNT
            or bool((spacing == spacing[0]).all())
            or not 0 < float(fourth.sum()) < math.inf
        ):
            return None
        unit = float(spacing[-1])
        squares = (spacing / unit) ** 2
        middle = float(values[torch.searchsorted(n.cumsum(0), float(n.sum()) / 2)])
        z = values / (values + middle)
        columns = torch.stack(
            [squares / 12, (values / values[-1]) ** 2, *(z**power for power in range(5))]
        )
        total, fit, level = n.sum(), squares, float((changes / n / squares).median())
        changes, fourth = (
            changes / level,
            fourth / level / level,
        )  # the squares of ``fit`` are far from overflow
        for _ in range(_ITERATIONS):
            weights = 1 / fit.square()
            products = (n * weights * columns) @ columns.T
            scale = products.diagonal().div(total).sqrt()
            inverse = torch.linalg.pinv(
                products / torch.outer(scale, scale), hermitian=True, rtol=1e-13
            )
            solution = inverse @ (columns @ (changes * weights) / scale)
            fitted = (solution / scale) @ columns
            previous, fit = fit, torch.maximum(fitted, 0.05 * fit)
            if bool(((fit - previous).abs() <= _CONVERGED * previous).all()):
                break
        many = n >= MIN_COUNT
        scatter = (fourth - changes.square() / n)[many]
        if float(((changes - n * fitted)[many].square() / scatter).median()) > MAX_START_MISFIT:
            return None
        residual = (fourth - 2 * fitted * changes + n * fitted**2) * weights.square()
        variance = (
            inverse @ ((residual * columns) @ columns.T / torch.outer(scale, scale)) @ inverse
        )
        factor = level / (float(scale[0]) * unit**2)
        return float(solution[0]) * factor, math.sqrt(max(0.0, float(variance[0, 0]))) * factor


def _compute_bins(base: Tensor) -> Tensor:
    """Return the exponent and the first 7 mantissa bits of |w| as one integer, for every entry."""
    return (base.to(torch.float32).view(torch.int32) >> 16).bitwise_and_(_BINS - 1).reshape(-1)
