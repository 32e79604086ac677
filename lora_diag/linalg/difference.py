"""ΔW = W_tuned − W_base and its norms, in one pass over row blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor

from lora_diag.linalg import rounding
from lora_diag.linalg.devices import move, zeros
from lora_diag.linalg.rounding import LAYOUT, SHORTER

# β of ``Energies.estimate_base_rounding`` decides whether BASE was rounded after the start of
# training (1) or not (0) if it is within 0.5 of one of them, and this many errors from the other.
# Otherwise f(|w|) does not fit and the start is unknown.
START_ERRORS = 5.0

# ‖ΔW‖/‖W‖ from which the rounding of the subtraction matters. T − W is exact if T is within [W/2,
# 2W] (Sterbenz 1974); below this ratio, entries with larger changes add less than 1/256 of the
# variance of the files' rounding.
COARSE_RATIO = 1 / 16

# Entries of a piece of a block: a bfloat16 pair of 8192×2048 took 204 ms of one core in pieces of
# 2^18 entries, 260 in whole blocks of 2^20, 225 in pieces of 2^17.
PIECE_ENTRIES = 2**18

# Entries of a piece on a GPU, which takes some 1 GB: the GPU computes one while the CPU starts the
# next.
GPU_PIECE_ENTRIES = 2**24

Start = Literal["exact", "rounded", "unknown"]


@dataclass(frozen=True, slots=True)
class Rounding:
    """Effect of the files' rounding on ΔW.

    Args:
        bound: Bound on ‖E‖_F, the norm of the rounding error of ΔW, from the spacing of the stored
            values; without the rounding of the subtraction.
        noise: Expected variance of the entries of E, by row and column: Σσ² and Σσ⁴.
        sides: Maximum number of independent roundings in an entry of E.
        start: ``exact`` if the stored BASE is the start of training, ``rounded`` if it was rounded
            after the start or TUNED is stored no more finely, ``unknown`` otherwise; its rounding
            counts unless the start is ``exact``.
        base_fro: √(Σu²/12) of BASE over the changed entries (all of a block where few are
            unchanged): the contribution of its rounding, if it is not the start.
        base_rounding: β of ``Energies.estimate_base_rounding`` and its standard error; None if it
            was not estimated.
        untouched: Estimated fraction of entries that training did not change.
    """

    bound: float
    noise: rounding.Profile
    sides: int
    start: Start
    base_fro: float
    base_rounding: tuple[float, float] | None
    untouched: float

    @property
    def fro(self) -> float:
        """Expected ‖E‖_F."""
        return float(self.noise.unit) * math.sqrt(float(self.noise.rows.sum()))


@dataclass
class Difference:
    """Result of one pass over a pair of matrices.

    Args:
        matrix: ΔW, ``(m, n)``, float32; float64 if either side is stored as float64. Its memory is
            that of ΔWᵀ by rows if m < n, on the CPU. None if not requested, or not finite.
        fro: ‖ΔW‖_F, accumulated in float64; exact to the rounding of the entries of ``matrix``. NaN
            if not finite.
        base_fro: ‖W_base‖_F, likewise.
        tuned_fro: ‖W_tuned‖_F, likewise.
        unchanged: Fraction of bit-identical entries; across dtypes, of equal entries. NaN if ΔW is
            not finite.
        roundings: The spacing of both sides; None if ΔW is not finite.
        mantissa: Mantissa bits that the stored values of base and tuned really use; zeros if ΔW is
            not finite.
        non_finite: Why ΔW or a norm is not finite, with the first such entry if it is known; None
            if both are.
    """

    matrix: Tensor | None
    fro: float
    base_fro: float
    tuned_fro: float
    unchanged: float
    roundings: _Roundings | None
    mantissa: tuple[int, int]
    non_finite: str | None = None

    @cached_property
    def rounding(self) -> Rounding | None:
        """Effect of rounding, computed on demand: for small matrices it takes longer than the
        norms. None as above.
        """
        return self.roundings.summarize() if self.roundings else None


def difference(
    blocks: Iterable[tuple[Tensor, Tensor]],
    shape: tuple[int, int],
    device: torch.device,
    keep: bool = True,
    steps: Iterable[tuple[Tensor | None, Tensor | None]] | None = None,
    on_base: Callable[[Tensor], None] = lambda base: None,
) -> Difference:
    """Subtract two matrices block by block, and return ΔW with its norms and the effect of
    rounding.

    torch's own float32 ``norm()`` on the CPU loses up to 3e-3 at 4096×11008, hence float64
    accumulation throughout.

    Args:
        blocks: ``(base, tuned)`` row blocks from the first row to the last, ``(rows, n)`` each,
            floating point.
        shape: ``(m, n)``.
        device: Device of the computation and of ΔW.
        keep: False to measure only the norms, without keeping ΔW.
        steps: The spacing of quantized storage formats, for base and tuned, block by block; None if
            there are none, and in place of a side that is not quantized.
        on_base: Called with the rows of base on the device, from the first to the last.

    Returns:
        ΔW and its norms; of a ΔW that is not finite, no matrix, and NaN as norms. On the CPU
            nothing is read after a
        non-finite entry. A GPU is awaited once, after the last block, and the position of that
            entry is not given.
    """
    matrix: Tensor | None = None
    fro = base_fro = tuned_fro = 0.0
    roundings = _Roundings(shape, device)
    same = row = 0
    unread: list[Tensor] = []
    spacings = repeat((None, None)) if steps is None else steps
    for base, tuned, block_steps in _move_blocks(roundings.inspect(blocks), spacings, device):
        on_base(base)
        dtype = torch.promote_types(
            rounding.working_dtype(base.dtype), rounding.working_dtype(tuned.dtype)
        )
        block = tuned - base if tuned.dtype == dtype else tuned.to(dtype).sub_(base)
        norm: float | Tensor
        base_norm: float | Tensor
        tuned_norm: float | Tensor
        unchanged: int | Tensor
        if device.type == "cpu":
            norm, base_norm, tuned_norm, unchanged = _measure_sizes(block, base, tuned)
            if not math.isfinite(norm + base_norm):
                return _make_not_finite(_explain_not_finite(base, tuned, block, row))
            fro, base_fro = math.hypot(fro, norm), math.hypot(base_fro, base_norm)
            tuned_fro = math.hypot(tuned_fro, tuned_norm)
            same += unchanged
        else:
            norm, base_norm, tuned_norm, unchanged = sizes = _measure_sizes_on_gpu(
                block, base, tuned
            )
            unread += sizes
        roundings.add(
            base,
            tuned,
            block,
            block_steps,
            row,
            rounding.Unchanged.of(block, norm, unchanged),
            subtracted=norm > COARSE_RATIO * base_norm,
        )
        if keep:
            if matrix is None:
                matrix = _allocate(shape, dtype, device)
            # turned in the cache first: 35 instead of 44 ms for all of 2048×8192
            turned = block if matrix.is_contiguous() else block.T.contiguous().T
            matrix[row : row + len(block)] = turned
        row += len(block)
    if fetched := roundings.fetch(unread):
        fro, base_fro, tuned_fro = (math.hypot(*fetched[first::4]) for first in range(3))
        same = int(sum(fetched[3::4]))
        if not math.isfinite(fro + base_fro):
            return _make_not_finite("an entry is not finite")
    return Difference(
        matrix=matrix,
        fro=fro,
        base_fro=base_fro,
        tuned_fro=tuned_fro,
        unchanged=same / max(1, math.prod(shape)),
        roundings=roundings,
        mantissa=(roundings.base.mantissa, roundings.tuned.mantissa),
    )


class _Roundings:
    """The spacing of both sides, and of ΔW itself if the subtraction rounds as coarsely as the
    files.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.shape = shape
        self.base, self.tuned, self.subtracted = (
            rounding.Spacing.of(shape, device) for _ in range(3)
        )
        self.sample, self.energies = rounding.Sample(shape), rounding.Energies.of(device)
        self.sampled: list[Tensor] = []
        self.base_is_dequantized: bool | None = None

    def inspect(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the blocks; the first shows, before it is moved to a GPU, whether BASE was
        dequantized.
        """
        for base, tuned in blocks:
            if self.base_is_dequantized is None:
                self.base_is_dequantized = rounding.is_dequantized(base)
            yield base, tuned

    def add(
        self,
        base: Tensor,
        tuned: Tensor,
        block: Tensor,
        steps: tuple[Tensor | None, Tensor | None],
        row: int,
        unchanged: rounding.Unchanged | None,
        subtracted: bool | Tensor,
    ) -> None:
        """Add a block of both sides and of their difference.

        ``subtracted`` says whether the rounding of the subtraction counts.
        """
        sample = self.sample.select(row)
        spacing = (
            self.base.add(base, steps[0], unchanged, row, sample=sample),
            self.tuned.add(tuned, steps[1], unchanged, row, sample=sample),
        )
        self.sample.add(block.reshape(-1)[sample], *spacing)
        mantissa = LAYOUT[block.dtype][2]
        if isinstance(subtracted, Tensor):
            if (
                LAYOUT[tuned.dtype][2] > LAYOUT[(*SHORTER[base.dtype], base.dtype)[0]][2]
            ):  # perhaps finer
                self.energies.add_on_gpu(block, base)
            if mantissa in (LAYOUT[base.dtype][2], LAYOUT[tuned.dtype][2]):
                coarse = subtracted & (
                    (self.base.mantissa == mantissa) | (self.tuned.mantissa == mantissa)
                )
                self.subtracted.add(block, None, unchanged, row, weight=coarse)
            return
        if rounding.is_finer(self.base, self.tuned):
            self.energies.add(block, base)
        if subtracted and mantissa in (self.base.mantissa, self.tuned.mantissa):
            self.subtracted.add(block, None, unchanged, row)

    def fetch(self, others: list[Tensor]) -> list[float]:
        """Read all sums and samples, and return other numbers that are read with them: from a GPU
        in one transfer.
        """
        sides = (self.base, self.tuned, self.subtracted)
        values = rounding.fetch_sums(sides, *self.sample.join(), self.energies.sums, *others)
        self.sampled, self.energies.sums = values[:3], values[3]
        return [float(value) for value in values[4:]]

    @property
    def is_finite(self) -> bool:
        """Whether the squares of the spacing are finite."""
        return math.isfinite(self.base.squares + self.tuned.squares)

    def summarize(self) -> Rounding:
        """Return the effect of rounding over all blocks, whose sums have been fetched."""
        changes, base_spacing, tuned_spacing = self.sampled
        start, beta = self.decide_start()
        exact = start == "exact"
        sides = [self.tuned] if exact else [self.base, self.tuned]
        spacing = tuned_spacing if exact else torch.maximum(base_spacing, tuned_spacing)
        moves = rounding.Moves.of(changes, spacing)
        untouched = moves.estimate_untouched()
        weight = moves.estimate_noise_per_change(untouched, len(sides))
        still = float((changes == 0).double().mean() if len(changes) else torch.zeros(()))
        absorbed = 1 - min(1.0, untouched / still) if still else 1.0
        parts = [(weight, side.profile) for side in sides] + [
            (absorbed / 12, side.still) for side in sides
        ]
        parts.append((1 / 12, self.subtracted.profile))
        return Rounding(
            bound=rounding.rounding_bound(sides),
            noise=rounding.mix_profiles(parts, self.shape),
            sides=len(sides) + (self.subtracted.profile.unit > 0),
            start=start,
            base_fro=self.base.profile.unit * math.sqrt(float(self.base.profile.rows.sum()) / 12),
            base_rounding=beta,
            untouched=untouched,
        )

    def decide_start(self) -> tuple[Start, tuple[float, float] | None]:
        """Return whether the stored BASE is the start of training, with β and its error if
        estimated.
        """
        if not rounding.is_finer(self.base, self.tuned):
            return "rounded", None
        # Rounding errors of such values are not spread evenly: their copies fit β = 0 as well.
        if self.base_is_dequantized:
            return "unknown", None
        estimate = self.energies.estimate_base_rounding(self.base.mantissa)
        if estimate is None:
            return "unknown", None
        beta, error = estimate
        if -0.5 < beta < min(0.5, 1 - START_ERRORS * error):
            return "exact", estimate
        return ("rounded" if max(0.5, START_ERRORS * error) < beta < 1.5 else "unknown"), estimate


def norm(blocks: Iterable[Tensor]) -> float:
    """Return the Frobenius norm of a matrix in blocks, accumulated in float64."""
    return math.hypot(*(_norm(block) for block in blocks))


def _measure_sizes(block: Tensor, base: Tensor, tuned: Tensor) -> tuple[float, float, float, int]:
    """Return ‖ΔW‖_F, ‖W_base‖_F and ‖W_tuned‖_F of a block on the CPU, and its number of unchanged
    entries.
    """
    norms = [
        torch.linalg.vector_norm(matrix, dtype=torch.float64) for matrix in (block, base, tuned)
    ]
    counted = torch.stack([*norms, _count_unchanged(base, tuned).to(torch.float64)])
    norm, base_norm, tuned_norm, unchanged = counted.tolist()
    if block.dtype == torch.float64:  # the squares may underflow or overflow
        norm, base_norm, tuned_norm = _norm(block), _norm(base), _norm(tuned)
    return norm, base_norm, tuned_norm, int(unchanged)


def _measure_sizes_on_gpu(block: Tensor, base: Tensor, tuned: Tensor) -> list[Tensor]:
    """Return the four results of ``_measure_sizes`` as scalars on the GPU, without waiting for
    them.
    """
    norms = []
    for matrix in (block, base, tuned):
        if matrix.dtype == torch.float64:  # the squares may underflow or overflow
            largest = matrix.abs().max().clamp(min=1e-300)
            norms.append(torch.linalg.vector_norm(matrix / largest) * largest)
        else:
            norms.append(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    return [*norms, _count_unchanged(base, tuned)]


def _norm(block: Tensor) -> float:
    """Return ‖block‖_F, without overflow or underflow of the squares of float64 numbers."""
    plain = float(torch.linalg.vector_norm(block, dtype=torch.float64))
    if block.dtype != torch.float64 or 1e-140 < plain < 1e140:
        return plain
    largest = float(block.abs().max())  # squares of float64 numbers may underflow or overflow
    if largest in {0.0, math.inf} or math.isnan(largest):
        return plain
    return largest * _norm(block / largest)


def _move_blocks(
    blocks: Iterable[tuple[Tensor, Tensor]],
    steps: Iterable[tuple[Tensor | None, Tensor | None]],
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]]:
    """Yield blocks and their spacings on a device: in pieces for the cache of a CPU, in few large
    ones on a GPU.
    """
    pairs = _add_steps(zip(blocks, steps, strict=False))
    if device.type != "cpu":
        pending: list[tuple[Tensor | None, ...]] = []
        entries = 0
        for (base, tuned), spacings in pairs:
            moved = [
                step if step is None else move(step.reshape(base.shape), device)
                for step in spacings
            ]
            if pending and [step is None for step in moved] != [
                step is None for step in pending[0][2:]
            ]:
                yield _join_blocks(pending)
                pending, entries = [], 0
            pending.append((move(base, device), move(tuned, device), *moved))
            entries += base.numel()
            if entries >= GPU_PIECE_ENTRIES:
                yield _join_blocks(pending)
                pending, entries = [], 0
        if pending:
            yield _join_blocks(pending)
        return
    for (base, tuned), (base_step, tuned_step) in pairs:
        rows = max(1, PIECE_ENTRIES // max(1, base.shape[1]))
        base_steps, tuned_steps = (
            repeat(None) if step is None else torch.split(step.reshape(base.shape), rows)
            for step in (base_step, tuned_step)
        )
        yield from zip(
            torch.split(base, rows),
            torch.split(tuned, rows),
            zip(base_steps, tuned_steps, strict=False),
            strict=False,
        )


def _add_steps(
    pairs: Iterable[tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]],
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]]:
    """Add the spacing of values that were dequantized into a float dtype, if those of the first
    changed block were.

    A dequantized base alone is not rounded: it may be the start of training, also where tuned keeps
    most of its values.
    """
    hidden: tuple[bool, bool] | None = None
    for (base, tuned), (base_step, tuned_step) in pairs:
        if hidden is None:
            coarse = tuned_step is None and rounding.is_dequantized(tuned)
            if coarse and not (base != tuned).any():
                yield (base, tuned), (base_step, tuned_step)
                continue
            coarse = coarse and rounding.is_dequantized(tuned, base)
            hidden = coarse and base_step is None and rounding.is_dequantized(base), coarse
        base_step = rounding.find_steps(base) if hidden[0] else base_step
        yield (base, tuned), (base_step, rounding.find_steps(tuned) if hidden[1] else tuned_step)


def _join_blocks(
    pending: list[tuple[Tensor | None, ...]],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Return blocks and their spacings as one block."""
    base, tuned, *steps = (
        None if parts[0] is None else torch.cat([part for part in parts if part is not None])
        for parts in zip(*pending, strict=True)
    )
    assert base is not None
    assert tuned is not None
    return base, tuned, (steps[0], steps[1])


def _allocate(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for ΔW: on the CPU, a wide ΔW is stored as the rows of ΔWᵀ; otherwise by its
    own rows.

    ``linalg.streamed.normal`` then reads it once for two products. At 2048×8192 writing takes 17 ms
    longer, and ten pairs of products 110 ms less.
    """
    if shape[0] < shape[1] and device.type == "cpu":
        return zeros(shape[::-1], dtype, device).T
    return zeros(shape, dtype, device)


def _count_unchanged(base: Tensor, tuned: Tensor) -> Tensor:
    """Count bit-identical entries; across dtypes, equal entries."""
    if base.dtype != tuned.dtype:
        return torch.count_nonzero(base == tuned)
    bits = LAYOUT[base.dtype][0]
    return base.numel() - torch.count_nonzero(
        base.view(bits) ^ tuned.view(bits)
    )  # ``==`` takes 2.5 times as long


def first_non_finite(beginning: str, values: Tensor, first_row: int = 0) -> str | None:
    """Return a sentence with the value and position of the first entry that is not finite; None if
    all are finite.

    Args:
        beginning: Beginning of the sentence.
        values: ``(rows, n)``.
        first_row: Row number of the first row.

    Example:
        >>> first_non_finite("B holds", torch.tensor([[0.0, 1.0], [2.0, math.inf]]))
        'B holds inf at [1, 1]'
    """
    if math.isfinite(float(torch.linalg.vector_norm(values, dtype=torch.float64))):
        return None  # a fifth of the time of checking every entry, a tenth of a whole adapter's
    bad = ~torch.isfinite(values)
    if not bad.any():
        return None
    row, column = divmod(int(bad.reshape(-1).to(torch.uint8).argmax()), values.shape[1])
    return f"{beginning} {float(values[row, column])} at [{first_row + row}, {column}]"


def _make_not_finite(why: str) -> Difference:
    """Return the result for a ΔW that is not finite."""
    return Difference(None, math.nan, math.nan, math.nan, math.nan, None, (0, 0), why)


def _explain_not_finite(base: Tensor, tuned: Tensor, block: Tensor, row: int) -> str:
    """Return a sentence on the first non-finite entry of a block, or on the overflow of
    its norm.
    """
    return (
        first_non_finite("BASE holds", base, row)
        or first_non_finite("TUNED holds", tuned, row)
        or first_non_finite("the difference overflows to", block, row)
        or f"the norm of rows {row}-{row + len(block) - 1} overflows float64"
    )
