"""Evidence on rounding in ΔW: which entries were trained, and whether BASE was rounded after the start.

Both are read from the spacing u of the stored values, which jumps by 2 at powers of two, where |w| does not: what
scales with u is rounding, what scales with |w| is training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_diag.linalg.rounding import LAYOUT

# Entries of a layer in which unchanged ones are counted.
SAMPLE = 2**18

# Minimum number of entries for an estimated fraction.
MIN_COUNT = 64

# Numbers of 8 exponent and 7 mantissa bits, and entries per block.
_BINS, _PART = 2**15, 2**16

# Reweighting ends when no weight changes by more than this; 5 to 30 rounds were observed.
_CONVERGED, _ITERATIONS = 1e-3, 50


@dataclass(slots=True)
class Sample:
    """Entries at a constant distance over all blocks, and so independent of the blocks.

    Args:
        shape: ``(m, n)`` of the matrix.
    """

    shape: tuple[int, int]
    stride: int = field(init=False)
    parts: list[tuple[Tensor, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        m, n = self.shape
        self.stride = max(1, -(-m * n // SAMPLE))
        while math.gcd(self.stride, n) > 1:  # otherwise some columns are never sampled
            self.stride += 1

    def of(self, row: int) -> slice:
        """Return the slice of the sampled entries of the flattened block that begins with this row."""
        return slice(-row * self.shape[1] % self.stride, None, self.stride)

    def add(self, *matrices: Tensor) -> None:
        """Add the entries of a block: ΔW, and the spacing of both sides."""
        self.parts.append(tuple(values.to(torch.float64).abs() for values in matrices))

    def __call__(self) -> tuple[Tensor, ...]:
        """Return the samples of each matrix."""
        if not self.parts:
            return tuple(torch.zeros(0, dtype=torch.float64) for _ in range(3))
        return tuple(torch.cat(column) for column in zip(*self.parts, strict=True))  # on the device of the blocks


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
        """Count the changed entries of a sample, given |ΔW| and u of each entry."""
        binade = spacing.view(torch.int64) >> 52
        lowest = int(binade.min()) if len(binade) else 0
        binade = binade - lowest
        entries = torch.bincount(binade)
        changed = torch.bincount(binade[changes > 0], minlength=len(entries))
        far = torch.bincount(binade[changes > 1.5 * spacing], minlength=len(entries))
        present = entries > 0
        values = torch.arange(len(entries), dtype=torch.float64) + (lowest - 1023)
        return cls(2.0 ** values[present], *(counts[present].double() for counts in (entries, changed, far)))

    def untouched(self) -> float:
        """Estimate the fraction of entries that training did not change, excluding those that rounding left unchanged.

        An entry is unchanged by rounding while its move is less than u/2, so the fraction of unchanged entries falls to
        that of the untouched ones as u → 0, provided that the size of changes is independent of |w|. It is read from
        the entries of smallest u, from as many as give the smallest upper limit, less two standard errors: entries not
        known to be untouched count as trained. A spacing at which most changes are by one u is uninformative, and so
        are larger ones: there moves are no larger than u, and rounding may have left any of the others. Changes of more
        than one u must outnumber the others by two standard errors.
        """
        count, changed, far = (counts.cumsum(0) for counts in (self.entries, self.changed, self.far))
        small = (2 * self.far >= self.changed).cumprod(0).bool() & (count >= MIN_COUNT)
        informative = small & ((2 * far - changed > 2 * changed.sqrt()) | (self.changed.sum() == 0))
        if not informative.any():
            return 0.0
        share = (1 - changed / count)[informative]
        error = 2 * (share * (1 - share) / count[informative]).sqrt()
        return max(0.0, float((share - error)[(share + error).argmin()]))

    def noise_per_change(self, untouched: float, sides: int) -> float:
        """Return w: the noise of ΔW is w·Σu² over the changed entries, summed over the rounded sides.

        Where an entry moves by many u its error has the variance u²/12 a side. Where less than half of the trained
        entries of one spacing changed, a share p of them, each by about one u, the noise is no more than what
        independent changes make, p(1 − p)u². The smaller of the two is taken for each spacing, for trained entries.

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
    """n, Σ ΔW² and Σ ΔW⁴ of the changed entries by the first 7 bits of |w|, which determine BASE's spacing."""

    sums: Tensor

    @classmethod
    def of(cls, device: torch.device) -> Energies:
        """Return the sums of no entries, on the device of the blocks."""
        return cls(torch.zeros(3, _BINS, dtype=torch.float64, device=device))

    def add(self, block: Tensor, base: Tensor, unchanged: Tensor | None) -> None:
        """Add a block.

        Args:
            block: Block of ΔW.
            base: Block of W_base.
            unchanged: True where ΔW is 0; None if nowhere.
        """
        bins = _compute_bins(base)
        parts = zip(torch.split(bins, _PART), torch.split(block.reshape(-1), _PART), strict=True)
        for part, changes in parts:  # stays in the cache
            squares = changes.to(torch.float64).square()
            count = torch.bincount(part, minlength=_BINS)
            if unchanged is not None:
                count -= torch.bincount(part[squares == 0], minlength=_BINS)
            self.sums[0] += count
            self.sums[1] += torch.bincount(part, squares, minlength=_BINS)
            self.sums[2] += torch.bincount(part, squares.square_(), minlength=_BINS)

    def add_on_gpu(self, block: Tensor, base: Tensor) -> None:
        """As ``add``, in integers, whose sums are the same in any order: relative to 2⁻³⁶ of the largest of a bin."""
        bins, squares = _compute_bins(base).to(torch.int64), block.reshape(-1).to(torch.float64).square()
        largest = torch.zeros_like(self.sums[0]).scatter_reduce_(0, bins, squares, "amax").clamp_(min=1e-300)
        shares = squares / largest[bins]
        units = (torch.ones_like(largest), largest, largest.square())
        for sums, values, unit in zip(
            self.sums, ((shares > 0).to(shares), shares, shares.square()), units, strict=True
        ):
            whole = (values * 2.0**36).round().to(torch.int64)
            counts = torch.zeros(_BINS, dtype=torch.int64, device=bins.device).scatter_add_(0, bins, whole)
            sums += counts.to(torch.float64) * 2.0**-36 * unit

    def base_rounding(self, mantissa: int) -> tuple[float, float] | None:
        """Estimate β of E[ΔW²] = β·u²/12 + f(|w|), f smooth, with its standard error, over the changed entries.

        u is the spacing of BASE: β is 1 where BASE was rounded from the weights at which training began, 0 where the
        stored BASE is the start. f describes changes proportional to the size of a weight: γw² and a polynomial in
        z = |w|/(|w| + median), which no jump at powers of two resembles. Least squares, reweighted by the inverse
        square of the fit; the error is robust to the distribution of the moves (White 1980).

        Args:
            mantissa: Bits of BASE.

        Returns:
            β and its standard error; None if too few entries changed, or all have one spacing.
        """
        tiny = max(torch.finfo(dtype).tiny for dtype, layout in LAYOUT.items() if layout[2] == mantissa)
        values = (torch.arange(_BINS, dtype=torch.int32) << 16).view(torch.float32).double()
        present = (self.sums[0] > 0) & (values > 0) & values.isfinite()
        (n, changes, fourth), values = self.sums[:, present], values[present]
        spacing = 2.0 ** (values.log2().floor() - mantissa).clamp(min=math.log2(tiny) - mantissa)
        if n.sum() < MIN_COUNT or bool((spacing == spacing[0]).all()) or not 0 < float(fourth.sum()) < math.inf:
            return None
        unit = float(spacing[-1])
        squares = (spacing / unit) ** 2
        middle = float(values[torch.searchsorted(n.cumsum(0), float(n.sum()) / 2)])
        z = values / (values + middle)
        columns = torch.stack([squares / 12, (values / values[-1]) ** 2, *(z**power for power in range(5))], 1)
        total, fit = n.sum(), squares * float((changes / n / squares).median())
        for _ in range(_ITERATIONS):
            weighted = columns / fit[:, None]
            scale = (n[:, None] * weighted.square()).sum(0).div(total).sqrt()
            weighted /= scale
            inverse = torch.linalg.pinv(weighted.T @ (n[:, None] * weighted), hermitian=True, rtol=1e-13)
            solution = inverse @ (weighted.T @ (changes / fit))
            fitted = columns @ (solution / scale)
            previous, fit = fit, torch.maximum(fitted, 0.05 * fit)
            if bool(((fit - previous).abs() <= _CONVERGED * previous).all()):
                break
        residual = (fourth - 2 * fitted * changes + n * fitted**2) / previous**2
        variance = inverse @ (weighted.T @ (residual[:, None] * weighted)) @ inverse
        factor = 1 / (float(scale[0]) * unit**2)
        return float(solution[0]) * factor, math.sqrt(max(0.0, float(variance[0, 0]))) * factor


def _compute_bins(base: Tensor) -> Tensor:
    """Return the first 7 bits of |w| and its exponent, for every entry."""
    return (base.to(torch.float32).view(torch.int32) >> 16).bitwise_and_(_BINS - 1).reshape(-1)
