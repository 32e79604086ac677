"""Estimate of one layer's update before rounding: rounding cells of both files, size, directions, and validity checks.

Reference: docs/recover.md; ``lora_diag.linalg.hidden`` for the estimator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lora_diag.deltas import Side, StoredDelta, row_spans
from lora_diag.linalg.binades import MOST_UNEVEN, Binades
from lora_diag.linalg.cells import GRIDS, Cells, halves, nearest
from lora_diag.linalg.devices import move
from lora_diag.linalg.hidden import SAMPLE, LowRank, Recovered, Size, fit_size, recover
from lora_diag.linalg.hidden_scales import Scales, fit_scales
from lora_diag.linalg.hidden_shapes import NORMAL, Shape, Shaped, fit_shape
from lora_diag.linalg.rounding import SHORTER
from lora_diag.linalg.shrinkage import with_noise
from lora_diag.linalg.truncated import Moments, moments
from lora_diag.metrics.energy import THRESHOLDS, rank_at
from lora_diag.records.vocabulary import Hidden

if TYPE_CHECKING:
    from numpy.typing import NDArray

Start = Literal["stored", "rounded"]

# The files resolve the update if the variance of TUNED's rounding errors is below this fraction of ‖D‖² and hardly an
# entry is unchanged, or if their largest possible sum of squares is below it: a sparse update leaves most entries
# unchanged. Both assume that the stored BASE is the start.
RESOLVED, STILL = 0.01, 0.05

# Ranks at which C(r) is given where nobody names others.
CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# With fewer changed entries the size cannot be estimated.
FEWEST = 30

# Normal deviates of a 95% interval.
Z95 = 1.96

# Memory of the blocks while they are read and measured.
BLOCKS = 96 * 2**20


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate of one layer.

    Args:
        hidden: The record's part.
        cells: Cells of the entries, in units of ``unit`` and divided by the scales; None without an estimate.
        low_rank: L in these units; None without a detected direction.
        deviation: s in these units.
        scales: Of rows and columns; None if all are 1.
        unit: A power of two.
        curve: C(r) of the detected directions.
        shape: Of the entries' distribution, where no direction was found.
    """

    hidden: Hidden
    cells: Cells | None = None
    low_rank: LowRank | None = None
    deviation: float = 0.0
    scales: Scales | None = None
    unit: float = 1.0
    curve: tuple[float, ...] = ()
    shape: Shape = NORMAL

    def mean(self) -> Iterator[Tensor]:
        """Yield E[X | cells] in row blocks, from the first row to the last."""
        assert self.cells is not None
        row = 0
        for found in _moments(self.cells, self.deviation, self.shape, self.low_rank):
            block = found.mean
            if self.scales is not None:
                block = block * self.scales.rows[row : row + len(block), None] * self.scales.columns
            row += len(block)
            yield block * self.unit

    def norm(self) -> float:
        """Return √E[‖X‖² | cells], of L as it was found."""
        assert self.cells is not None
        return _norm(self.cells, self.deviation, self.shape, self.scales, self.low_rank) * self.unit

    def matrix(self) -> Tensor:
        """Return E[X | cells] whole."""
        return torch.cat(list(self.mean()))


def recovery_bytes(shape: tuple[int, int]) -> int:
    """Estimate the memory of recovering a layer in bytes.

    Cells with both halves of BASE's, the posterior mean, and their copies while they are divided by scales; float32.
    """
    return BLOCKS + 4 * 7 * math.prod(shape)


@dataclass(slots=True)
class _Stored:
    """One stored side: values of a format, multiplied by a scale per entry if the format has codes.

    Args:
        side: Location of the side.
        format: Key of ``GRIDS`` that most entries fit.
        own: Key of the dtype, for entries that do not fit.
    """

    side: Side
    format: str
    own: str

    @classmethod
    def of(cls, side: Side, sample: Tensor) -> _Stored | None:
        """Return the side; None if its format has no known cells."""
        stored = side.info.stored
        if stored is not None:
            return cls(side, stored, stored) if stored in GRIDS else None
        for short in SHORTER[sample.dtype]:
            if (sample.to(short).to(sample.dtype) == sample).double().mean() > 0.5:
                return cls(side, str(short).removeprefix("torch."), side.dtype)
        return cls(side, side.dtype, side.dtype)

    @property
    def mantissa(self) -> int:
        return GRIDS[self.format].mantissa

    def scales(self, first: int, last: int, shape: tuple[int, int], like: Tensor) -> Tensor | None:
        """Return the scales of some rows."""
        found = self.side.read_scales(first * shape[1], last * shape[1])
        return None if found is None else found.view(-1, shape[1]).to(like)

    def halves(self, values: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the extent of the cells of values below and above them."""
        if scale is not None:
            codes = nearest(values / scale, self.format)
            below, above = halves(codes, GRIDS[self.format])
            # A negative scale mirrors the cell; scales are positive in every known format.
            return below * scale.abs(), above * scale.abs()
        below, above = halves(values, GRIDS[self.format])
        if self.own != self.format:
            fits = values.to(getattr(torch, self.format)).to(values.dtype) == values
            finer = halves(values, GRIDS[self.own])
            below, above = torch.where(fits, below, finer[0]), torch.where(fits, above, finer[1])
        return below, above

    def round(self, values: Tensor, scale: Tensor | None) -> Tensor:
        """Return the stored value of a number."""
        return nearest(values, self.format) if scale is None else nearest(values / scale, self.format) * scale


@dataclass(slots=True)
class _Read:
    """Both sides of a layer, read once."""

    base: _Stored
    tuned: _Stored
    cells: Cells
    unit: float
    unchanged: int
    square: float  # Σ D² in units
    width: float  # Σ of the variances of rounding TUNED, in units
    reach: float  # Σ of the squares of its largest rounding errors, in units; infinite if an entry saturated
    entries: int


def recover_layer(delta: StoredDelta, fro: float, ranks: Sequence[int], seed: int, device: torch.device) -> Estimate:
    """Estimate one layer's update before rounding.

    Args:
        delta: The layer; finite.
        fro: ‖D‖_F.
        ranks: Ranks of C(r).
        seed: Seed of hidden cells and starting vectors.
        device: Where to compute.

    Raises:
        InputError: A file could not be read.
    """
    sample = [next(iter(side.checkpoint.read_each(side.name, [_head(side, delta.shape)]))) for side in _sides(delta)]
    stored = [_Stored.of(side, part) for side, part in zip(_sides(delta), sample, strict=True)]
    if stored[0] is None or stored[1] is None:
        side = delta.base if stored[0] is None else delta.tuned
        return _refused(math.nan, f"{side.info.stored} is a format whose rounding cells are not known")
    if fro == 0.0:
        return _refused(1.0, "no entry changed: nothing bounds the update from below")
    read = _read(delta, stored[0], stored[1], 2.0 ** round(math.log2(fro / math.sqrt(math.prod(delta.shape)))), device)
    unchanged = read.unchanged / read.entries
    changed = read.entries - read.unchanged
    if (read.width < RESOLVED * read.square and unchanged < STILL) or read.reach < RESOLVED * read.square:
        reason = f"rounding makes up {read.width / read.square:.2g} of ‖ΔW‖², and {unchanged:.2g} stayed the same"
        return Estimate(Hidden(status="not_hidden", reason=reason, unchanged=unchanged, fro_estimate=fro))
    if changed < FEWEST:
        return _refused(unchanged, f"only {changed} entries changed, too few to estimate a size")
    cells, start, start_gain = _start(read)
    size = fit_size(cells, math.sqrt(read.square / read.entries))
    model = _model(delta, read, cells, size, start, seed, device)
    shaped = model.shaped
    fit, size, scales = model.fit, model.size, model.scales
    common: dict[str, Any] = {
        "unchanged": unchanged,
        "start": start,
        "start_gain": start_gain,
        "information": size.information,
        "fit_chi": fit.chi,
        "fit_misplaced": fit.misplaced,
        "fit_uneven": fit.uneven,
        "scales": scales is not None,
        "kurtosis": None if shaped is None else shaped.shape.kurtosis,
    }
    if fit.is_bad(start):
        reason = (
            f"which entries changed does not fit one size of update: χ²/df = {fit.chi:.3g} over binades of |W|, "
            f"{fit.misplaced:.2g} of the entries misplaced, and its size varies by {fit.uneven:.0%} with |W|; was it "
            "trained without float32 master weights, or in part?"
        )
        return Estimate(Hidden(status="refused", reason=reason, **common))
    found = model.found if model.found is not None else recover(model.cells, size, seed)
    whole, error = size.fro, size.error
    if shaped is not None:
        whole, error = shaped.fro, shaped.error
    elif scales is not None:
        whole = _norm(model.cells, size.deviation, NORMAL, scales, None)
    # A single variance does not fit, so there is no single size.
    if model.found is not None and found.low_rank is not None:
        whole = _norm(model.cells, found.deviation, NORMAL, scales, found.low_rank)
    error *= math.sqrt(max(1.0, fit.chi or 1.0))
    common |= {
        "fro_estimate": whole * read.unit,
        "fro_interval": (whole * read.unit * math.exp(-Z95 * error), whole * read.unit * math.exp(Z95 * error)),
    }
    if found.low_rank is None:
        reason = "no direction of the update stands out: hidden entries are not predicted better than by its size"
        hidden = Hidden(status="size_only", reason=reason, gain_z=found.z, directions=0, **common)
        if shaped is None:
            return Estimate(hidden, model.cells, None, size.deviation, scales, read.unit)
        return Estimate(hidden, model.cells, None, shaped.deviation, None, read.unit, shape=shaped.shape)
    curve, curves = _curves(found, size, scales, whole, error, ranks, read.unit)
    reason = f"{found.low_rank.rank} directions predict hidden entries better than size alone"
    hidden = Hidden(
        status="recovered",
        reason=reason,
        gain_z=found.z,
        rule=found.rule,
        directions=found.low_rank.rank,
        iterations=found.low_rank.iterations,
        converged=found.low_rank.converged,
        **common,
        **curves,
    )
    return Estimate(hidden, model.cells, found.low_rank, found.deviation, scales, read.unit, curve)


@dataclass(frozen=True, slots=True)
class _Model:
    """The model fitted to a layer.

    Args:
        cells: Divided by the scales.
        size: Size of their contents.
        scales: None if all are 1.
        fit: Fit of the changed entries.
        found: L, if the fit needs it; else not known yet.
        shaped: The size under the likeliest shape of the entries' distribution; None with scales or L.
    """

    cells: Cells
    size: Size
    scales: Scales | None
    fit: Binades
    found: Recovered | None = None
    shaped: Shaped | None = None


def _model(
    delta: StoredDelta, read: _Read, cells: Cells, size: Size, start: Start, seed: int, device: torch.device
) -> _Model:
    """Return the first that fits: one distribution, scales of rows and columns, L and one variance, L and scales.

    An update of rank 1 or 2 has entries of very different sizes, and L is what explains them.
    """
    shaped = fit_shape(cells, size.deviation)
    expected = _binades(delta, read, cells, shaped.deviation, shaped.shape, None, start, device)
    plain = _Model(cells, size, None, expected, shaped=shaped)
    tried = [plain]
    if plain.fit.is_bad(start) and (scaled := fit_scales(cells, size)) is not None:
        scales, divided, fitted = scaled
        fit = _binades(delta, read, divided, fitted.deviation, NORMAL, scales, start, device)
        tried.append(_Model(divided, fitted, scales, fit))
    for model in tried:
        if not model.fit.is_bad(start):
            return model
    for model in tried:
        found = recover(model.cells, model.size, seed)
        if found.low_rank is not None:
            fit = _binades(
                delta, read, model.cells, found.deviation, NORMAL, model.scales, start, device, found.low_rank
            )
            if not fit.is_bad(start):
                return replace(model, fit=fit, found=found, shaped=None)
    return plain


def _refused(unchanged: float, reason: str) -> Estimate:
    return Estimate(Hidden(status="refused", reason=reason, unchanged=unchanged if unchanged == unchanged else 0.0))


def _sides(delta: StoredDelta) -> tuple[Side, Side]:
    return delta.base, delta.tuned


def _head(side: Side, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the entries that determine the format of most values."""
    return side.offset, side.offset + min(math.prod(shape), 2**16)


def _read(delta: StoredDelta, base: _Stored, tuned: _Stored, unit: float, device: torch.device) -> _Read:
    """Read both sides and return the cells, in units of about the root mean square of D."""
    wide = (
        torch.float64
        if torch.float64 in (getattr(torch, base.own, None), getattr(torch, tuned.own, None))
        else torch.float32
    )
    shape = delta.shape
    rounded = base.mantissa <= tuned.mantissa
    lo, hi = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    below, above = (torch.empty(shape, dtype=torch.float32, device=device) if rounded else None for _ in range(2))
    unchanged, square, width, reach = 0, 0.0, 0.0, 0.0
    for (first, last), (w, t) in zip(row_spans(shape), delta.blocks(), strict=True):
        w, t = move(w, device).to(wide), move(t, device).to(wide)
        scale = tuned.scales(first, last, shape, t)
        low, high = tuned.halves(t, scale)
        d = t - w
        # Rounded outwards: a cell narrower than the float32 resolution keeps a width, and contains X.
        lo[first:last] = ((d - low) / unit).float().nextafter(torch.full_like(low, -math.inf).float())
        hi[first:last] = ((d + high) / unit).float().nextafter(torch.full_like(high, math.inf).float())
        unchanged += int((t == tuned.round(w, scale)).sum())
        square += float((d / unit).double().square().sum())
        finite = torch.minimum(low, high)  # an open end is treated like the other
        width += float(((2 * finite / unit).double() ** 2 / 12).sum())
        reach += float(((torch.maximum(low, high) / unit).double() ** 2).sum())
        if below is not None and above is not None:
            low, high = base.halves(w, base.scales(first, last, shape, w))
            # A value that saturated when BASE was stored may be far away: half a step replaces the open end.
            low, high = (torch.where(part.isinf(), torch.minimum(low, high), part) for part in (low, high))
            below[first:last], above[first:last] = low / unit, high / unit
    return _Read(base, tuned, Cells(lo, hi, below, above), unit, unchanged, square, width, reach, math.prod(shape))


def _start(read: _Read) -> tuple[Cells, Start, float | None]:
    """Choose between BASE as the start of training and a start anywhere in BASE's cells, by likelihood without L.

    The shape of the entries' distribution is fitted under both: a wrong one decides as much as the start does.
    """
    if read.cells.below is None:
        return read.cells, "stored", None
    rms = math.sqrt(read.square / read.entries)
    some = read.cells
    if read.entries > 2 * SAMPLE:
        some = some.at(torch.arange(0, read.entries, read.entries // SAMPLE | 1, device=some.lo.device))
    exact, rounded = (fit_shape(one, fit_size(one, rms).deviation) for one in (some.exact_start(), some))
    gain = rounded.log_likelihood - exact.log_likelihood
    return (read.cells, "rounded", gain) if gain > 0 else (read.cells.exact_start(), "stored", gain)


def _binades(
    delta: StoredDelta,
    read: _Read,
    stored: Cells,
    deviation: float,
    form: Shape,
    scales: Scales | None,
    start: Start,
    device: torch.device,
    low_rank: LowRank | None = None,
) -> Binades:
    """Compare which entries changed, and how far, with what N(L, s²), or another shape, expects, by binade of |W|.

    ``stored`` are the cells that the model was fitted to, divided by ``scales``.
    """
    # Scales are fitted roughly, and where L is most of X few binades show the size of the rest.
    limit = math.inf if low_rank is not None else MOST_UNEVEN * (1 if scales is None else 2)
    counts, shape = Binades(most_uneven=limit), delta.shape
    for (first, last), (w, t) in zip(row_spans(shape), delta.blocks(), strict=True):
        wide = torch.promote_types(torch.float32, torch.promote_types(w.dtype, t.dtype))
        w, t = move(w, device).to(wide), move(t, device).to(wide)
        scale = read.tuned.scales(first, last, shape, t)
        home = read.tuned.round(w, scale)
        low, high = read.tuned.halves(home, scale)
        off = home - w
        parts = [(off - low) / read.unit, (off + high) / read.unit]
        if start == "rounded":
            assert read.cells.below is not None
            assert read.cells.above is not None
            parts += [read.cells.below[first:last], read.cells.above[first:last]]
        cells = Cells(*(part.float() for part in parts))
        if scales is not None:
            cells = Scales(scales.rows[first:last], scales.columns).divide(cells)
        if low_rank is None:
            mean: Tensor | float = 0.0
            still, found = (form.moments(each, deviation, fast=True) for each in (cells, stored.rows(first, last)))
        else:
            mean = low_rank.rows(first, last)
            still, found = (moments(each, mean, deviation, fast=True) for each in (cells, stored.rows(first, last)))
        square = ((found.mean - mean) ** 2 + found.variance) / deviation**2
        counts.add(w, t != home, 1 - still.log_mass.exp(), square, 1 - found.variance / deviation**2)
    return counts


def _moments(cells: Cells, deviation: float, shape: Shape, low_rank: LowRank | None) -> Iterator[Moments]:
    """Yield the moments of all entries in row blocks."""
    for first, last in cells.spans():
        some = cells.rows(first, last)
        if low_rank is None:
            yield shape.moments(some, deviation)
        else:
            yield moments(some, low_rank.rows(first, last), deviation)


def _norm(cells: Cells, deviation: float, shape: Shape, scales: Scales | None, low_rank: LowRank | None) -> float:
    """Return √ΣE[x² | cells] before division by the scales."""
    total, row = 0.0, 0
    for found in _moments(cells, deviation, shape, low_rank):
        square = found.mean.square() + found.variance
        if scales is not None:
            square = square * (scales.rows[row : row + len(square), None] * scales.columns) ** 2
        row += len(square)
        total += float(square.sum(dtype=torch.float64))
    return math.sqrt(total)


def _curves(
    found: Recovered,
    size: Size,
    scales: Scales | None,
    whole: float,
    error: float,
    ranks: Sequence[int],
    unit: float,
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Return C(r) at all ranks, and the fields on C(r) and ranks of the detected directions.

    x_i has a standard error of about τ, the noise of the score in one direction. Lower ends take x_i − 1.96τ for the
    values and nothing else; upper ends x_i + 1.96τ with the remaining variance spread over all directions, and for the
    directions beyond them the largest value that could stay hidden.
    """
    low_rank = found.low_rank
    assert low_rank is not None
    shape = (low_rank.u.shape[0], low_rank.vh.shape[1])
    x, tau = low_rank.values.debiased, low_rank.values.noise
    left, right, spread = low_rank.u, low_rank.vh, 1.0
    if scales is not None:
        left, right = left * scales.rows[:, None], right * scales.columns
        weight = float((scales.rows.double() ** 2).mean() * (scales.columns.double() ** 2).mean())
        spread = math.sqrt(weight)
        r_left = torch.linalg.qr(left.double())[1]
        r_right = torch.linalg.qr(right.T.double())[1]
        x = torch.linalg.svdvals(r_left @ torch.diag(x.to(r_left)) @ r_right.T).cpu()
    count = min(shape)
    rest = math.sqrt(max(0.0, size.deviation**2 - float((low_rank.values.debiased**2).sum()) / math.prod(shape)))
    unseen = tau * spread * math.prod(shape) ** 0.25
    low = (x - Z95 * tau * spread).clamp(min=0.0)
    high = with_noise(x + Z95 * tau * spread, shape, rest * spread)
    beyond = max(unseen, float(with_noise(torch.zeros(1), shape, rest * spread)[0]))
    high = torch.cat([high, torch.full((count - len(high),), beyond, dtype=high.dtype)])
    curve = np.minimum(1.0, np.cumsum((x.numpy() / whole) ** 2))
    lower = np.minimum(1.0, np.cumsum((low.numpy() / (whole * math.exp(Z95 * error))) ** 2))
    upper = np.minimum(1.0, np.cumsum((high.numpy() / (whole * math.exp(-Z95 * error))) ** 2))

    def at(values: NDArray[np.float64], rank: int) -> float:
        return float(values[min(rank, len(values)) - 1])

    return tuple(curve.tolist()), {
        "values_estimate": tuple(float(f"{value * unit:.9g}") for value in x.tolist()),
        "energy_estimate": {str(r): at(curve, r) for r in ranks},
        "energy_interval": {str(r): (at(lower, r), at(upper, r)) for r in ranks},
        "rank_at_estimate": {str(share): rank_at(curve, share) for share in THRESHOLDS},
        "rank_at_interval": {str(share): (rank_at(upper, share), rank_at(lower, share)) for share in THRESHOLDS},
    }
