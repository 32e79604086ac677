"""Estimate of one layer's update before rounding: rounding cells of both files, size, directions,
and validity checks.

Reference: docs/reference/recover.md; ``lora_diag.linalg.hidden`` for the estimator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_diag.deltas import Side, StoredDelta, row_spans
from lora_diag.errors import MemoryLimitError
from lora_diag.layers.change import Change
from lora_diag.linalg import hidden_models
from lora_diag.linalg.cells import (
    GRIDS,
    MAX_UNEVENNESS,
    Binades,
    CellMatrix,
    Cells,
    ComputedCells,
    Moments,
    add_noise,
    cell_halves,
    encode_widths,
    join_cells,
    moments,
    round_to_nearest,
)
from lora_diag.linalg.devices import move
from lora_diag.linalg.difference import norm
from lora_diag.linalg.hidden import (
    HELD_OUT_FRACTION,
    LARGE_SAMPLE,
    MAX_HELD_OUT,
    Z95,
    LowRank,
    Recovered,
    Size,
    bound_energies,
    fit_size,
    recover,
)
from lora_diag.linalg.hidden_models import NORMAL, Density, Scales, Shape, Shaped
from lora_diag.linalg.rounding import SHORTER, is_dequantized
from lora_diag.linalg.streamed import Streamed
from lora_diag.metrics.energy import THRESHOLDS, rank_at
from lora_diag.records.vocabulary import Hidden

if TYPE_CHECKING:
    from numpy.typing import NDArray

Start = Literal["stored", "rounded"]

# The files resolve the update if the variance of TUNED's rounding errors is below this fraction of
# ‖D‖² and hardly an entry is unchanged, or if their largest possible sum of squares is below it: a
# sparse update leaves most entries unchanged. Both assume that the stored BASE is the start.
RESOLVED, MAX_UNCHANGED = 0.01, 0.05

# Default ranks of C(r).
DEFAULT_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# With fewer changed entries the size cannot be estimated.
MIN_COUNT = 30

# Least kurtosis at which a fitted density replaces the listed shapes. Below it the grid of the
# density is too coarse: ‖X‖ of X = ±c (kurtosis 1) came out 3% too small at χ²/df = 377.
MIN_KURTOSIS = 1.25

# Standard errors of log ‖X‖_F because no model is the true one, besides that of sampling: of one
# density, of scales, of L where it was needed to fit, per misplaced fraction of the changed
# entries, and per unevenness over |W| (up to the largest of an accepted fit): a planted update that
# varies by 6% with |W| is 4% too small. χ²/df is no measure, as it grows with the number of
# entries. Set on 347 layers of 8,000 to 900,000 entries, planted ones and two real updates.
MISFIT, MISFIT_OF_SCALES, MISFIT_OF_DIRECTIONS = 0.01, 0.015, 0.03
MISFIT_PER_MISPLACED, MISFIT_PER_UNEVEN = 0.12, 0.5

# Largest Σx_i²/‖X‖² of directions that are reported. When values of layers with scales were
# debiased it was 1.56 to 21.5 where ranks were wrong, and below 1.34 elsewhere.
MAX_EXCESS = 1.3

# Number of entries, and of row ranges that they are from, by which hidden energy is ranked before
# any fit.
RANKING_ENTRIES, RANKING_SPANS = 2**15, 16

# Memory of the blocks while they are read and measured.
BLOCK_BYTES = 96 * 2**20


@dataclass(frozen=True, slots=True)
class Law:
    """The distribution of the entries of X: N(L, s²), or another shape where L = 0.

    Args:
        deviation: s.
        low_rank: L; None for 0.
        shape: The shape, where L = 0.
    """

    deviation: float
    low_rank: LowRank | None = None
    shape: Shape = NORMAL

    def mean(self, first: int, last: int) -> Tensor | float:
        """Return some rows of L; 0 without it."""
        return 0.0 if self.low_rank is None else self.low_rank.rows(first, last)

    def moments(self, block: Cells, first: int, fast: bool = False) -> Moments:
        """Return the moments given the cells of rows from ``first`` on; ``fast`` uses
        fewer nodes.
        """
        if self.low_rank is None:
            return self.shape.moments(block, self.deviation, fast)
        return moments(block, self.mean(first, first + len(block.lo)), self.deviation, fast)

    def norm(self, cells: CellMatrix, scales: Scales | None) -> float:
        """Return √ΣE[x² | cells] before division by the scales."""
        total = 0.0
        for first, last in cells.spans():
            posterior = self.moments(cells.rows(first, last), first)
            square = posterior.mean.square() + posterior.variance
            if scales is not None:
                square = square * scales.of_rows(first, last) ** 2
            total += float(square.sum(dtype=torch.float64))
        return math.sqrt(total)


@dataclass(frozen=True, slots=True)
class RecoveryEstimate:
    """The estimate of one layer.

    Args:
        hidden: The record's part.
        cells: Cells of the entries, in units of ``unit`` and divided by the scales; None without an
            estimate.
        law: The distribution of the entries, in these units.
        scales: Scales of rows and columns; None if all are 1.
        unit: A power of two.
        curve: C(r) of the detected directions.
    """

    hidden: Hidden
    cells: CellMatrix | None = None
    law: Law = Law(0.0)
    scales: Scales | None = None
    unit: float = 1.0
    curve: tuple[float, ...] = ()

    def mean(self, spans: Iterable[tuple[int, int]] | None = None) -> Iterator[Tensor]:
        """Yield E[X | cells] in row blocks, from the first row to the last.

        Args:
            spans: Row ranges of the blocks; None for small ones.
        """
        assert self.cells is not None
        if spans is None:
            spans = self.cells.spans()
        for first, last in spans:
            block = self.law.moments(self.cells.rows(first, last), first).mean
            if self.scales is not None:
                block = block * self.scales.of_rows(first, last)
            yield block * self.unit

    def norm(self) -> float:
        """Return √E[‖X‖² | cells] under the law."""
        assert self.cells is not None
        return self.law.norm(self.cells, self.scales) * self.unit

    def matrix(self) -> Tensor:
        """Return E[X | cells] whole."""
        return torch.cat(list(self.mean()))

    def change(self, memory: int | None, stretch: float = 1.0) -> Change:
        """Return E[X | cells] as an update, in row blocks if the cells exceed a memory limit.

        Args:
            memory: The limit in bytes; None without limit.
            stretch: Factor by which it is multiplied.
        """
        assert self.cells is not None
        shape = self.cells.shape
        if memory is None or recovery_bytes(shape) <= memory:
            matrix = self.matrix().mul_(stretch)
            return Change(norm([matrix]), None, matrix=matrix)

        def read() -> Iterator[Tensor]:
            return (block.mul_(stretch) for block in self.mean(row_spans(shape)))

        streamed = Streamed(read, shape, device=self.cells.device)
        return Change(norm(read()), None, streamed=streamed, limit=memory)


def recovery_bytes(shape: tuple[int, int], memory: int | None = None) -> int:
    """Estimate the memory of recovering a layer in bytes.

    Whole: cells with both halves of BASE's and codes, the posterior mean, and copies; 4 bytes each.
    If that exceeds a limit, cells are computed again from the files whenever they are read; the
    posterior mean is kept where it fits.
    """
    whole = BLOCK_BYTES + 4 * 8 * math.prod(shape)
    if memory is None or whole <= memory:
        return whole
    return min(memory, _min_bytes(shape) + 4 * math.prod(shape))


def _min_bytes(shape: tuple[int, int]) -> int:
    """Estimate the memory of recovery in row blocks, in bytes: held-out cells with their indices,
    and thin factors.
    """
    held_out = min(MAX_HELD_OUT, int(HELD_OUT_FRACTION * math.prod(shape)))
    return BLOCK_BYTES + 64 * held_out + 6 * 4 * 128 * sum(shape)


def check_cell_memory(shape: tuple[int, int], memory: int | None) -> None:
    """Refuse a memory limit that is too small to recover a layer in row blocks.

    Raises:
        MemoryLimitError: The limit is too small.
    """
    if memory is not None and _min_bytes(shape) > memory:
        size = "x".join(map(str, shape))
        raise MemoryLimitError(
            size, f"its cells need {_min_bytes(shape) >> 20} MiB", "give $memory more"
        )


@dataclass(slots=True)
class _Stored:
    """One stored side: values of a format, multiplied by a scale per entry if the format has codes.

    Args:
        side: Location of the side.
        format: Key of ``GRIDS`` that most entries fit.
        dtype: Key of the stored dtype, for entries that do not fit.
    """

    side: Side
    format: str
    dtype: str

    @classmethod
    def of(cls, side: Side, sample: Tensor) -> _Stored | None:
        """Return the side; None if its format has no known cells."""
        stored = side.info.stored
        if stored is not None:
            return cls(side, stored, stored) if stored in GRIDS else None
        sample = sample[sample != 0] if sample.any() else sample  # zeros fit every dtype
        for short in SHORTER[sample.dtype]:
            if (sample.to(short).to(sample.dtype) == sample).double().mean() > 0.5:
                return cls(side, str(short).removeprefix("torch."), side.dtype)
        return cls(side, side.dtype, side.dtype)

    @property
    def mantissa(self) -> int:
        """Stored mantissa bits of the format."""
        return GRIDS[self.format].mantissa

    def scales(self, first: int, last: int, shape: tuple[int, int], like: Tensor) -> Tensor | None:
        """Return the scales of the entries of some rows, ``(rows, in)``; None if the format has
        none.
        """
        scales_of_rows = self.side.read_scales(first * shape[1], last * shape[1])
        return None if scales_of_rows is None else scales_of_rows.view(-1, shape[1]).to(like)

    def halves(self, values: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the extent of the cells of values below and above them."""
        if scale is not None:
            codes = round_to_nearest(values / scale, self.format)
            below, above = cell_halves(codes, GRIDS[self.format])
            # A negative scale mirrors the cell; scales are positive in every known format.
            return below * scale.abs(), above * scale.abs()
        below, above = cell_halves(values, GRIDS[self.format])
        if self.dtype != self.format:
            fits = values.to(getattr(torch, self.format)).to(values.dtype) == values
            finer = cell_halves(values, GRIDS[self.dtype])
            below, above = torch.where(fits, below, finer[0]), torch.where(fits, above, finer[1])
        return below, above

    def round(self, values: Tensor, scale: Tensor | None) -> Tensor:
        """Return the stored values of numbers, of a quantized format with these scales."""
        if scale is None:
            return round_to_nearest(values, self.format)
        return round_to_nearest(values / scale, self.format) * scale


class _Stats(NamedTuple):
    """Sums over the entries of a layer.

    Args:
        unchanged: Number of unchanged entries.
        square: Σ D² in units.
        width: Σ of the variances of rounding TUNED, in units.
        reach: Σ of the squares of its largest rounding errors, in units; infinite if an entry
            saturated.
    """

    unchanged: int
    square: float
    width: float
    reach: float


@dataclass(frozen=True, slots=True)
class _StoredPair:
    """Both stored sides of a layer.

    Args:
        base: BASE.
        tuned: TUNED.
        delta: Their difference.
        unit: A power of two, in which cells are given.
        device: Device of the cells.
        widths: Codes of the widths of cells that occur.
    """

    base: _Stored
    tuned: _Stored
    delta: StoredDelta
    unit: float
    device: torch.device
    widths: tuple[int, ...] = ()

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.delta.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of differences."""
        dtypes = {getattr(torch, side.dtype, None) for side in (self.base, self.tuned)}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def cells(self, first: int, w: Tensor, t: Tensor, rounded: bool) -> tuple[Cells, _Stats]:
        """Return the cells of rows from ``first`` on, in units, and their sums."""
        shape, unit = self.delta.shape, self.unit
        w, t = move(w, self.device).to(self.dtype), move(t, self.device).to(self.dtype)
        scale = self.tuned.scales(first, first + len(t), shape, t)
        low, high = self.tuned.halves(t, scale)
        d = t - w
        # Rounded outwards: a cell narrower than the float32 resolution keeps a width, and contains
        # X.
        lo = ((d - low) / unit).float().nextafter(torch.full_like(low, -math.inf).float())
        hi = ((d + high) / unit).float().nextafter(torch.full_like(high, math.inf).float())
        finite = torch.minimum(low, high)  # an open end is treated like the other
        stats = _Stats(
            int((t == self.tuned.round(w, scale)).sum()),
            float((d / unit).double().square().sum()),
            float(((2 * finite / unit).double() ** 2 / 12).sum()),
            float(((torch.maximum(low, high) / unit).double() ** 2).sum()),
        )
        stored = ((low + high) / unit).float()
        if not rounded:
            return Cells(lo, hi, codes=encode_widths(stored, None), widths=self.widths), stats
        low, high = self.base.halves(w, self.base.scales(first, first + len(w), shape, w))
        # A value that saturated when BASE was stored may be far away: half a step replaces the open
        # end.
        low, high = (
            torch.where(part.isinf(), torch.minimum(low, high), part) for part in (low, high)
        )
        codes = encode_widths(stored, ((low + high) / unit).float())
        return Cells(
            lo, hi, (low / unit).float(), (high / unit).float(), None, codes, self.widths
        ), stats


def _stream_cells(pair: _StoredPair, rounded: bool) -> ComputedCells:
    """Return cells that are computed from the files when they are read; the last two blocks of rows
    are kept.
    """
    (rows, columns), sides = pair.delta.shape, (pair.delta.base, pair.delta.tuned)
    step = next(iter(row_spans(pair.delta.shape)))[1]

    @lru_cache(maxsize=2)  # the rows that are read at once lie in two blocks at most
    def read_block(block: int) -> Cells:
        first, last = block * step, min(rows, (block + 1) * step)
        w, t = (side.read(first * columns, last * columns).view(-1, columns) for side in sides)
        return pair.cells(first, w, t, rounded)[0]

    def read(first: int, last: int) -> Cells:
        blocks = range(first // step, (last - 1) // step + 1)
        return join_cells(
            [
                read_block(i).rows(max(0, first - i * step), min(last - i * step, step))
                for i in blocks
            ]
        )

    return ComputedCells(pair.delta.shape, pair.device, rounded, read)


def recover_layer(
    delta: StoredDelta,
    fro: float,
    ranks: Sequence[int],
    seed: int,
    device: torch.device,
    memory: int | None = None,
) -> RecoveryEstimate:
    """Estimate one layer's update before rounding.

    Args:
        delta: The layer; finite.
        fro: ‖D‖_F.
        ranks: Ranks of C(r).
        seed: Seed of held-out cells and starting vectors.
        device: Where to compute.
        memory: Memory limit in bytes; None without limit. The estimate does not depend on it.

    Returns:
        The estimate, whose ``hidden.status`` is ``not_hidden``, ``refused``, ``size_only`` or
            ``recovered``; the first
        two have no cells.
    """
    check_cell_memory(delta.shape, memory)
    pair = _pair_sides(delta, fro, device)
    if isinstance(pair, RecoveryEstimate):
        return pair
    whole_fits = memory is None or recovery_bytes(delta.shape) <= memory
    keep = memory is None or _min_bytes(delta.shape) + 4 * pair.entries <= memory
    pair, all_cells, stats = _read_cells(pair, whole_fits)
    if decided := _decide_without_fit(stats, pair.entries, fro):
        return decided
    unchanged = stats.unchanged / pair.entries
    rms = math.sqrt(stats.square / pair.entries)
    merged, start, start_gain = _choose_start(all_cells.merge(), rms)
    cells = all_cells if merged.rounded else all_cells.exact_start()
    size = fit_size(merged, rms)
    model = _fit_model(pair, cells, merged, size, start, seed, keep)
    fit = model.fit
    size = model.size
    common: dict[str, Any] = {
        "unchanged": unchanged,
        "start": start,
        "start_gain": start_gain,
        "information": size.information,
        "fit_chi": fit.chi,
        "fit_misplaced": fit.misplaced,
        "fit_uneven": fit.unevenness,
        "scales": model.scales is not None,
    }
    if model.scales is None and model.recovered is None:
        common["kurtosis"] = model.law.shape.kurtosis
    if fit.is_rejected(start):
        reason = (
            f"the changed entries do not fit an update of one size: χ²/df = {fit.chi:.3g} over "
            f"binades of |W|, {fit.misplaced:.2g} of the entries are misplaced, and the size "
            f"varies by {fit.unevenness:.0%} with |W|; possible causes: training without float32 "
            "master weights, or of some entries only"
        )
        return RecoveryEstimate(Hidden(status="refused", reason=reason, **common))
    recovered = model.recovered
    if recovered is None:
        recovered = recover(model.cells, size, seed, keep)
    return _estimate_update(model, recovered, common, ranks, pair.unit)


def _estimate_update(
    model: _Model, recovered: Recovered, common: dict[str, Any], ranks: Sequence[int], unit: float
) -> RecoveryEstimate:
    """Return the estimate of a layer whose changed entries fit the model.

    Args:
        model: The model.
        recovered: The directions.
        common: Fields of the record.
        ranks: Ranks of C(r).
        unit: Unit of the cells.
    """
    scales = model.scales
    fro_estimate, error, density = _measure_norm(model)
    fault = _find_fault(recovered, scales, fro_estimate)
    if fault is not None and model.recovered is not None:
        reason = f"one size does not fit without directions, and {fault}"
        return RecoveryEstimate(Hidden(status="refused", reason=reason, **common))
    stored_fro = fro_estimate * unit
    common |= {
        "kurtosis": None if density is None else density.kurtosis,
        "fro_estimate": stored_fro,
        "fro_interval": (stored_fro * math.exp(-Z95 * error), stored_fro * math.exp(Z95 * error)),
    }
    if recovered.low_rank is None or fault is not None:
        no_gain = (
            "no direction is significant: none predicts held-out entries better than the "
            "size of the update alone"
        )
        hidden = Hidden(
            status="size_only", reason=fault or no_gain, gain_z=recovered.z, directions=0, **common
        )
        return RecoveryEstimate(hidden, model.cells, model.law, scales, unit)
    bounded = _bound_flat_update(recovered, density)
    curve, curve_fields = _compute_energy_curves(
        bounded, model.size, scales, fro_estimate, error, ranks, unit
    )
    reason = (
        f"{recovered.low_rank.rank} directions predict held-out entries better than the size "
        "of the update alone"
    )
    hidden = Hidden(
        status="recovered",
        reason=reason,
        gain_z=recovered.z,
        rule=recovered.rule,
        directions=recovered.low_rank.rank,
        iterations=recovered.low_rank.iterations,
        converged=recovered.low_rank.converged,
        **common,
        **curve_fields,
    )
    law = Law(recovered.deviation, recovered.low_rank)
    return RecoveryEstimate(hidden, model.cells, law, scales, unit, curve)


def _pair_sides(
    delta: StoredDelta, fro: float, device: torch.device
) -> _StoredPair | RecoveryEstimate:
    """Return both stored sides; a refusal where their rounding cells are unknown, or D = 0."""
    base_sample, tuned_sample = (
        _read_sample(side, delta.shape) for side in (delta.base, delta.tuned)
    )
    columns = delta.shape[1]
    whole = len(tuned_sample) // columns * columns
    base_rows = base_sample[:whole].view(-1, columns)
    tuned_rows = tuned_sample[:whole].view(-1, columns)
    if (
        not delta.tuned.is_quantized
        and is_dequantized(tuned_rows)
        and is_dequantized(tuned_rows, base_rows)
    ):
        reason = "TUNED was dequantized from 4 bits, whose rounding cells are unknown"
        return _make_refusal(0.0, reason)
    base = _Stored.of(delta.base, base_sample)
    tuned = _Stored.of(delta.tuned, tuned_sample)
    if base is None or tuned is None:
        side = delta.base if base is None else delta.tuned
        return _make_refusal(0.0, f"the rounding cells of {side.info.stored} are unknown")
    if fro == 0.0:
        return _make_refusal(1.0, "no entry changed, so the size of the update has no lower bound")
    unit = 2.0 ** round(math.log2(fro / math.sqrt(math.prod(delta.shape))))
    return _StoredPair(base, tuned, delta, unit, device)


def _decide_without_fit(stats: _Stats, entries: int, fro: float) -> RecoveryEstimate | None:
    """Return the estimate of a layer that rounding hides hardly, or that has too few changed
    entries; else None.
    """
    unchanged = stats.unchanged / entries
    changed = entries - stats.unchanged
    limit = RESOLVED * stats.square
    if stats.reach < limit or (stats.width < limit and unchanged < MAX_UNCHANGED):
        rounding = stats.width / stats.square
        reason = (
            f"rounding contributes {rounding:.2g} of ‖ΔW‖², and {unchanged:.2g} of the "
            "entries are equal"
        )
        return RecoveryEstimate(
            Hidden(status="not_hidden", reason=reason, unchanged=unchanged, fro_estimate=fro)
        )
    if changed < MIN_COUNT:
        reason = (
            f"only {changed} entries changed, which is too few to estimate the size of the update"
        )
        return _make_refusal(unchanged, reason)
    return None


@dataclass(frozen=True, slots=True)
class _Model:
    """The model fitted to a layer.

    Args:
        cells: Divided by the scales.
        merged: Distinct cells; not divided.
        size: Size of their contents.
        scales: None if all are 1.
        fit: Fit of the changed entries.
        law: The likeliest distribution; normal with scales or L.
        recovered: L, if the fit needs it; else not known yet.
    """

    cells: CellMatrix
    merged: CellMatrix
    size: Size
    scales: Scales | None
    fit: Binades
    law: Law
    recovered: Recovered | None = None


def _fit_model(
    pair: _StoredPair,
    cells: CellMatrix,
    merged: CellMatrix,
    size: Size,
    start: Start,
    seed: int,
    keep: bool,
) -> _Model:
    """Return the first model that fits: a listed shape, a flat density, scales, L and one variance,
    L and scales.

    Scales are those of rows and columns. Steps of Adam in one direction move all entries by about
    as much, and flat updates differ more than the listed shapes do: the density of the entries is
    fitted where no listed shape fits. An update of rank 1 or 2 has entries of very different sizes,
    and L is what explains them; a fit with L counts only if it can be tested. If no model fits, the
    first is returned, rejected.
    """

    def test_shape(found: Shaped | Density) -> _Model:
        law = Law(found.deviation, shape=found.shape)
        fit = _compare_binades(pair, cells, law, None, start)
        return _Model(cells, merged, size, None, fit, law)

    plain = test_shape(hidden_models.fit_shape(merged, size.deviation))
    if plain.fit.is_rejected(start):
        density = hidden_models.fit_density(merged, size.deviation)
        if MIN_KURTOSIS <= density.kurtosis < NORMAL.kurtosis:
            # A fit of its deviation to all entries moved it by less than its tolerance.
            flat = test_shape(density)
            if not flat.fit.is_rejected(start):
                return flat
    tried = [plain]
    scaled = hidden_models.fit_scales(cells, size) if plain.fit.is_rejected(start) else None
    if scaled is not None:
        scales, divided, fitted = scaled
        law = Law(fitted.deviation)
        fit = _compare_binades(pair, divided, law, scales, start)
        tried.append(_Model(divided, merged, fitted, scales, fit, law))
    for model in tried:
        if not model.fit.is_rejected(start):
            return model
    for model in tried:
        recovered = recover(model.cells, model.size, seed, keep)
        if recovered.low_rank is not None:
            law = Law(recovered.deviation, recovered.low_rank)
            fit = _compare_binades(pair, model.cells, law, model.scales, start)
            if fit.chi is not None and not fit.is_rejected(start):
                return replace(model, fit=fit, law=law, recovered=recovered)
    return plain


def _measure_norm(model: _Model) -> tuple[float, float, Density | None]:
    """Return ‖X‖_F in units, the standard error of its logarithm, and the density that was fitted.

    The density is None with scales or L.
    """
    cells, size, recovered = model.cells, model.size, model.recovered
    error, misfit = size.error, MISFIT
    density: Density | None = None
    # With L a single variance does not fit, so there is no single size.
    if recovered is not None and recovered.low_rank is not None:
        fro = model.law.norm(cells, model.scales)
        misfit = MISFIT_OF_DIRECTIONS
    elif model.scales is not None:
        fro, of_scales = hidden_models.measure_norm(cells, size.deviation, model.scales)
        misfit = math.hypot(MISFIT_OF_SCALES, of_scales)
    else:
        density = hidden_models.fit_density(model.merged, size.deviation)
        fro, error = density.deviation * math.sqrt(cells.count), density.error
    misplaced = MISFIT_PER_MISPLACED * model.fit.misplaced
    uneven = MISFIT_PER_UNEVEN * min(model.fit.unevenness, MAX_UNEVENNESS)
    return fro, math.hypot(error, misfit, misplaced, uneven), density


def _make_refusal(unchanged: float, reason: str) -> RecoveryEstimate:
    """Return the estimate of a layer that is refused for a reason; it holds no size and no
    directions.
    """
    return RecoveryEstimate(Hidden(status="refused", reason=reason, unchanged=unchanged))


def estimate_hidden_energy(delta: StoredDelta) -> float:
    """Estimate E‖X − D‖² of a layer, the energy that rounding hides, from a sample of its rows and
    without directions.

    It is 0 where nothing can be estimated. Layers are ranked by it; its error is that of the
    sample.
    """
    rows, columns = delta.shape
    span_rows = max(1, RANKING_ENTRIES // (RANKING_SPANS * max(1, columns)))
    first_rows = range(0, max(1, rows - span_rows + 1), max(1, rows // RANKING_SPANS))
    spans = [(first, min(rows, first + span_rows)) for first in first_rows]
    base_blocks, tuned_blocks = (
        [side.read(first * columns, last * columns).view(-1, columns) for first, last in spans]
        for side in (delta.base, delta.tuned)
    )
    base = _Stored.of(delta.base, torch.cat(base_blocks).flatten())
    tuned = _Stored.of(delta.tuned, torch.cat(tuned_blocks).flatten())
    pairs = list(zip(base_blocks, tuned_blocks, strict=True))
    differences = [t.double() - w.double() for w, t in pairs]
    square = sum(float(block.square().sum()) for block in differences)
    if base is None or tuned is None or not 0.0 < square < math.inf:
        return 0.0
    count = sum(block.numel() for block in base_blocks)
    rms = math.sqrt(square / count)
    unit = 2.0 ** round(math.log2(rms))
    pair = _StoredPair(base, tuned, delta, unit, torch.device("cpu"))
    cells = join_cells(
        [pair.cells(first, w, t, False)[0] for (first, _), (w, t) in zip(spans, pairs, strict=True)]
    )
    deviation = fit_size(cells, rms / pair.unit).deviation
    posterior = moments(cells, 0.0, deviation, fast=True)
    d = torch.cat([block / pair.unit for block in differences])
    missing = float(((posterior.mean - d).square() + posterior.variance).sum(dtype=torch.float64))
    return missing * pair.unit**2 * math.prod(delta.shape) / count


def _read_sample(side: Side, shape: tuple[int, int]) -> Tensor:
    """Return the first entries of a side, at most 2¹⁶, from which the format of most values is
    inferred.
    """
    head = side.offset, side.offset + min(math.prod(shape), 2**16)
    return next(iter(side.checkpoint.read_each(side.name, [head])))


def _read_cells(pair: _StoredPair, whole: bool) -> tuple[_StoredPair, CellMatrix, _Stats]:
    """Read both sides; return them with the widths that occur, the cells, in memory if ``whole``,
    and their sums.
    """
    rounded = pair.base.mantissa <= pair.tuned.mantissa
    parts: list[Tensor | None] = []
    sums, codes = [], set[int]()
    for (first, last), (w, t) in zip(row_spans(pair.delta.shape), pair.delta.blocks(), strict=True):
        cells, stats = pair.cells(first, w, t, rounded)
        sums.append(stats)
        assert cells.codes is not None
        codes.update(cells.codes.view(-1).bincount().nonzero()[:, 0].tolist())
        if whole and not parts:
            parts = [
                None if part is None else part.new_empty(pair.delta.shape) for part in cells.parts
            ]
        for every, part in zip(parts, cells.parts, strict=False):
            if every is not None and part is not None:
                every[first:last] = part
    pair = replace(pair, widths=tuple(sorted(codes - {0})))
    matrix = Cells(*parts, widths=pair.widths) if whole else _stream_cells(pair, rounded)  # type: ignore[arg-type, misc]
    return pair, matrix, _Stats(*map(sum, zip(*sums, strict=True)))


def _choose_start(all_cells: CellMatrix, rms: float) -> tuple[CellMatrix, Start, float | None]:
    """Choose between BASE as the start of training and a start anywhere in BASE's cells, by
    likelihood without L.

    The shape of the entries' distribution is fitted under both: a wrong one decides as much as the
    start does. Both are offered the same shapes, with heavier tails than those of a model.
    """
    if not all_cells.rounded:
        return all_cells, "stored", None
    cells = all_cells.sample(LARGE_SAMPLE)
    exact, rounded = (
        hidden_models.fit_shape(each, fit_size(each, rms).deviation, hidden_models.HEAVIEST)
        for each in (cells.exact_start(), cells)
    )
    gain = rounded.log_likelihood - exact.log_likelihood
    return (all_cells, "rounded", gain) if gain > 0 else (all_cells.exact_start(), "stored", gain)


def _compare_binades(
    pair: _StoredPair, fitted_cells: CellMatrix, law: Law, scales: Scales | None, start: Start
) -> Binades:
    """Compare which entries changed, and how far, with what a distribution expects, by binade of
    |W|.

    ``fitted_cells`` are those that the model was fitted to, divided by ``scales``.
    """
    # Scales are fitted roughly, and where L is most of X few binades show the size of the
    # remainder.
    limit = math.inf if law.low_rank is not None else MAX_UNEVENNESS * (1 if scales is None else 2)
    counts, shape = Binades(most_uneven=limit), pair.delta.shape
    for (first, last), (w, t) in zip(row_spans(shape), pair.delta.blocks(), strict=True):
        w, t = move(w, pair.device).to(pair.dtype), move(t, pair.device).to(pair.dtype)
        unmoved = pair.tuned.round(w, pair.tuned.scales(first, last, shape, t))
        cells = pair.cells(first, w, unmoved, start == "rounded")[0]
        if scales is not None:
            cells = scales.divide_rows(cells, first)
        still = law.moments(cells, first, fast=True)
        # fast moments are off by 0.3% of the variance
        exact = law.moments(fitted_cells.rows(first, last), first)
        square = ((exact.mean - law.mean(first, last)) ** 2 + exact.variance) / law.deviation**2
        counts.add(
            w, t != unmoved, 1 - still.log_mass.exp(), square, 1 - exact.variance / law.deviation**2
        )
    return counts


def _measure_values(recovered: Recovered, scales: Scales | None, fro: float) -> Tensor:
    """Return the singular values of X in the directions that were found, at most stretched to ‖X‖.

    With scales they are those of L, not debiased: directions concentrate on rows and columns with
    large scales, whose entries are known better than the average entry, by which values are
    debiased.
    """
    assert recovered.low_rank is not None
    if scales is not None:
        return hidden_models.unscale(recovered.low_rank, scales)[1].cpu()
    x = recovered.low_rank.values.debiased
    return x * min(recovered.stretch, max(1.0, fro / float(torch.linalg.vector_norm(x))))


def _find_fault(recovered: Recovered, scales: Scales | None, fro: float) -> str | None:
    """Return why the directions that were found are not valid; None if they are, or if there are
    none.
    """
    if recovered.low_rank is None:
        return None
    if not recovered.low_rank.converged:
        return (
            f"the fit of the directions did not converge in {recovered.low_rank.iterations} "
            "iterations"
        )
    excess = float(_measure_values(recovered, scales, fro).square().sum()) / fro**2
    if excess > MAX_EXCESS:
        return (
            f"the directions that were found would hold {excess:.2g} times the energy of the update"
        )
    return None


def _bound_flat_update(recovered: Recovered, density: Density | None) -> Recovered:
    """Return the directions with an upper bound that needs no normal remainder, if the entries are
    flatter than one.
    """
    if density is None or density.kurtosis >= NORMAL.kurtosis:
        return recovered
    assert recovered.held_out is not None
    assert recovered.unseen is not None
    assert recovered.upper is not None
    lengths, error = hidden_models.estimate_linear_lengths(
        recovered.held_out, recovered.unseen, density
    )
    allowed = bound_energies(lengths, error, recovered.unseen.values.eta.double().cpu())
    return replace(recovered, upper=torch.maximum(recovered.upper, allowed))


def _compute_energy_curves(
    recovered: Recovered,
    size: Size,
    scales: Scales | None,
    fro: float,
    error: float,
    ranks: Sequence[int],
    unit: float,
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Return C(r) up to the number of detected directions, and the record's fields on values, C(r)
    and ranks.

    x_i has a standard error of about τ, the noise of the score in one direction. Lower ends use x_i
    − 1.96τ for the values only; with scales, the lengths that held-out cells show less 1.96
    standard errors. Upper ends use x_i + 1.96τ with the remaining variance spread over all
    directions, for the directions beyond them the largest value that could stay hidden. Where
    held-out cells allow more, counted with that variance, all upper ends are raised by it. Values
    themselves are those of the fit times its stretch, together at most ‖X‖ (``fro``). Lower ends
    divide by the upper end of the 95% interval of ‖X‖, upper ends by its lower end; ``error`` is
    the standard error of log ‖X‖.
    """
    low_rank = recovered.low_rank
    assert low_rank is not None
    shape = (low_rank.u.shape[0], low_rank.vh.shape[1])
    x = low_rank.values.debiased
    tau = low_rank.values.noise
    spread = 1.0
    detected = _measure_values(recovered, scales, fro)
    low = x - Z95 * tau
    if scales is not None:
        assert recovered.held_out is not None
        assert recovered.unseen is not None
        row_mean, column_mean = (
            (factor.double() ** 2).mean() for factor in (scales.rows, scales.columns)
        )
        spread = math.sqrt(float(row_mean * column_mean))
        x = hidden_models.unscale(low_rank.with_lengths(x), scales)[1].cpu()
        lengths, errors = hidden_models.measure_lengths(
            recovered.held_out, recovered.unseen, recovered.deviation, scales
        )
        low = lengths - Z95 * errors
    entries = math.prod(shape)
    count = min(shape)
    explained = float((low_rank.values.debiased**2).sum()) / entries
    remainder = math.sqrt(max(0.0, size.deviation**2 - explained)) * spread
    high = add_noise(x + Z95 * tau * spread, shape, remainder)
    unseen = tau * spread * entries**0.25
    beyond = max(unseen, float(add_noise(torch.zeros(1), shape, remainder)[0]))
    high = torch.cat([high, torch.full((count - len(high),), beyond, dtype=high.dtype)])
    # Directions hold no more than X: otherwise lower ends would be clipped at 1, and would exclude
    # the truth.
    values = (detected * min(1.0, fro / float(torch.linalg.vector_norm(detected)))).numpy()
    curve = np.minimum(1.0, np.cumsum((values / fro) ** 2))
    low = low.clamp(min=0.0)
    largest = max(fro * math.exp(Z95 * error), float(torch.linalg.vector_norm(low)))
    lower = np.cumsum(low.numpy() ** 2) / largest**2
    rest = max(0, len(curve) - len(lower))
    lower = np.minimum(np.append(lower, np.full(rest, lower[-1]))[: len(curve)], curve)
    lowest = fro * math.exp(-Z95 * error)
    upper = np.cumsum((high.numpy() / lowest) ** 2)
    if recovered.upper is not None:
        highest = recovered.upper.numpy()[: len(x)]
        noisy = add_noise(x, shape, remainder).numpy()
        allowed = np.cumsum((noisy / lowest) ** 2)[: len(highest)] * highest
        more = np.maximum(0.0, allowed - upper[: len(highest)])
        upper += np.append(more, np.full(count - len(more), more[-1]))
    upper[: len(curve)] = np.maximum(upper[: len(curve)], curve)
    upper = np.minimum(1.0, np.maximum.accumulate(upper))

    def at(values: NDArray[np.float64], rank: int) -> float:
        return float(values[min(rank, len(values)) - 1])

    return tuple(curve.tolist()), {
        "values_estimate": tuple(float(f"{value * unit:.9g}") for value in values.tolist()),
        "energy_estimate": {str(r): at(curve, r) for r in ranks},
        "energy_interval": {str(r): (at(lower, r), at(upper, r)) for r in ranks},
        "rank_at_estimate": {str(share): rank_at(curve, share) for share in THRESHOLDS},
        "rank_at_interval": {
            str(share): (rank_at(upper, share), rank_at(lower, share)) for share in THRESHOLDS
        },
    }
