"""Is M a rounding of W + ΔW, entry by entry?

A merge computes ΔW in some precision, adds it to W and rounds to the dtype d in which it is kept. Whatever the order,

    |M − (W + ΔW)| ≤ ulp_d(M)/2 + δ,

where δ bounds the rounding inside ΔW. With u the unit roundoff of the arithmetic, r the rank and P = |B||A|:

- ΔW rounded once as a product and once after scaling (both in d): 2u|ΔW|;
- factors cast to d before the product, where they are stored more finely: 4u·P (B, A and up to two diagonals);
- the product summed in float32: (r + 8)·2⁻²⁴·P (Higham 2002, eq. 3.5);
- W + ΔW in float32, where d is shorter: 2⁻²⁴(|W| + |ΔW|).

An update that is not a product of two factors (DoRA, LoHa, rotations) is given (4u + 16·2⁻²⁴)(|W| + |ΔW| + rms ΔW).

Since δ is relative to ΔW and not to W, an update far below ulp(W) is still checked sharply: M must be the one number
that W + ΔW rounds to.

P can be many times ΔW, and then the bound lets a wrong scale pass in every single entry. Roundings go up as often as
down, so together they cannot: with M* = W + ΔW rounded once, the share of ΔW that arrived, c = ⟨M − W, ΔW⟩/‖ΔW‖², is
that of M* but for the sum of independent errors. This room knows no names, no files and no LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_diag.linalg.difference import first_non_finite
from lora_diag.linalg.rounding import LAYOUT, SHORTER

# Unit roundoff of float32, in which products are summed.
_U32 = 2.0**-24

# What the arithmetic of an update that is computed from W (DoRA's norm, its quotient, its product, its sum; a
# rotation's row of products) may lose, in units of u(|W| + |ΔW|).
_STEPS_WITH_W = 4.0

# Entries at once: so few that a dozen float64 arrays of them stay in the cache. One core on a bf16 pair of 4096², in
# seconds of that core: 0.63 with 2^13, 0.49 with 2^14, 0.63 with 2^15, 1.4 with 2^16, 1.9 with 2^20.
_CHUNK = 2**14

# Standard deviations by which c may be off, taking every error for as large as its bound: far beyond chance.
_BY_CHANCE = 8.0

# What a scaling, rounded itself, and products of rounded factors add to all entries alike, in units of u.
_ALIKE = 4.0

# Second-order terms of the bounds above, and the float64 arithmetic here.
_SLIGHTLY = 1.01


@dataclass(frozen=True, slots=True)
class Product:
    """ΔW = B·A; b ``(m, r)`` and a ``(r, n)``, float64."""

    b: Tensor
    a: Tensor

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows of ΔW."""
        return self.b[first:last] @ self.a

    def error(self, first: int, last: int, size: Tensor, w: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
        """Return δ for rows of ΔW, of which ``size`` are the absolute values, and P, the size of what was summed."""
        magnitude = self.b[first:last].abs() @ self.a.abs()
        u = rounding.roundoff
        casts = 4 * u if rounding.cast else 0.0
        small = smallest(rounding.dtype)  # below the normal numbers, rounding errs by an absolute amount
        bound = 2 * u * size + (casts + (self.b.shape[1] + 8) * _U32) * magnitude + (2 + rounding.scale) * small
        if rounding.cast:
            bound += small * (self.b[first:last].abs().sum(1, keepdim=True) + rounding.scale * self.a.abs().sum(0))
        return bound, magnitude

    def scatter(self) -> float:
        """Return Σ⟨E, ΔW⟩² over the errors E that a cast of one entry of B or A makes, in units of its roundoff."""
        by_b, by_a = self.b * (self.b @ (self.a @ self.a.T)), self.a * ((self.b.T @ self.b) @ self.a)
        return float((by_b**2).sum() + (by_a**2).sum())

    def times(self, factor: float) -> Product:
        """Return c·ΔW."""
        return Product(self.b * factor, self.a)

    def transposed(self) -> Product:
        """Return ΔWᵀ."""
        return Product(self.a.T, self.b.T)

    def halves_swapped(self) -> Product:
        """Return ΔW with its upper and lower half in each other's place."""
        return Product(self.b.roll(len(self.b) // 2, 0), self.a)


@dataclass(frozen=True, slots=True)
class Whole:
    """ΔW that is known entry by entry.

    Args:
        shape: ``(m, n)``.
        read: Takes first and last row and returns these rows of ΔW.
        exact: Whether no arithmetic came between it and the merge: a new value that the adapter holds in full.
        factor: c, by which ΔW is multiplied.
    """

    shape: tuple[int, int]
    read: Callable[[int, int], Tensor]
    exact: bool = False
    factor: float = 1.0

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows of ΔW, float64."""
        return self.read(first, last).double() * self.factor

    def error(self, first: int, last: int, size: Tensor, w: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
        """Return δ for rows of ΔW, of which ``size`` are the absolute values, and the size of what was summed."""
        if self.exact:
            return torch.zeros_like(size), size.clone()
        summed = size + w.abs() + float((size**2).mean().sqrt())  # what cancelled in a sum is of that size
        return (_STEPS_WITH_W * rounding.roundoff + 16 * _U32) * summed, summed

    def times(self, factor: float) -> Whole:
        """Return c·ΔW."""
        return replace(self, factor=self.factor * factor, exact=False)

    def transposed(self) -> Whole:
        """Return ΔWᵀ."""
        matrix = self.rows(0, self.shape[0]).T
        return Whole((self.shape[1], self.shape[0]), lambda first, last: matrix[first:last])

    def halves_swapped(self) -> Whole:
        """Return ΔW with its upper and lower half in each other's place."""
        matrix = self.rows(0, self.shape[0]).roll(self.shape[0] // 2, 0)
        return Whole(self.shape, lambda first, last: matrix[first:last])


Addend = Product | Whole


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a merge may have rounded.

    Args:
        dtype: d, whose numbers MERGED holds.
        roundoff: u of the arithmetic that made ΔW.
        cast: Whether the factors may have been cast to a shorter dtype first.
        scale: s, by which B was multiplied after such a cast.
        bases: Dtypes to which W may have been rounded first, besides not at all.
        dequantized: Whether W is dequantized, which may have been done in d.
    """

    dtype: torch.dtype
    roundoff: float
    cast: bool = False
    scale: float = 1.0
    bases: tuple[torch.dtype, ...] = ()
    dequantized: bool = False


@dataclass(slots=True)
class Check:
    """What one pass over W, M and ΔW gives; O = M − W.

    Args:
        entries: How many entries there are.
        beyond: Entries of M that no rounding of W + ΔW explains, by row and by column.
        beyond_base: The same for W + 0 under the same tolerance: what moved visibly.
        worst: max |M − (W + ΔW)| in ulp of the largest of the numbers added, P included.
        unchanged: Entries with M = W, or W rounded.
        inner: ⟨O, ΔW⟩.
        expected: ‖ΔW‖².
        observed: ‖O‖².
        residual: ‖O − ΔW‖².
        base: ‖W‖².
        allowed: Σ of the squared tolerances.
        ideal: ⟨M* − W, ΔW⟩, with M* = W + ΔW rounded once.
        scatter: Σ of the squares of what single roundings can add to ``inner``.
        alike: The share of ΔW by which roundings can be off in all entries alike; infinite where that is not known.
        non_finite: Where an entry is not finite, ``BASE`` or ``MERGED`` first; None if all are.
    """

    beyond: tuple[Tensor, Tensor]
    beyond_base: tuple[Tensor, Tensor]
    entries: int = 0
    worst: float = 0.0
    unchanged: int = 0
    inner: float = 0.0
    expected: float = 0.0
    observed: float = 0.0
    residual: float = 0.0
    base: float = 0.0
    allowed: float = 0.0
    ideal: float = 0.0
    scatter: float = 0.0
    alike: float = math.inf
    non_finite: str | None = None

    @property
    def count(self) -> int:
        """How many entries no rounding explains."""
        return int(self.beyond[0].sum())

    @property
    def moved(self) -> int:
        """How many entries differ from W by more than the tolerance."""
        return int(self.beyond_base[0].sum())

    @property
    def drifted(self) -> bool:
        """Whether more or less of ΔW arrived than roundings can add or take, whatever the single entries say."""
        return abs(self.inner - self.ideal) > _BY_CHANCE * math.sqrt(self.scatter) + self.alike * self.expected


# W, M and the steps of the formats of both (None where they follow from value and dtype), ``(rows, n)`` each.
Block = tuple[Tensor, Tensor, Tensor | None]


def check_merge(blocks: Iterable[Block], shape: tuple[int, int], addend: Addend, rounding: Rounding) -> Check:
    """Hold every entry of M against W + ΔW.

    Args:
        blocks: ``(W, M, steps of M)`` row blocks from the first row to the last.
        shape: ``(m, n)``.
        addend: ΔW.
        rounding: How the merge may have rounded.

    Returns:
        Counts and norms; after a non-finite entry of BASE or MERGED nothing more is read.

    Example:
        >>> w, d = torch.tensor([[1.0, 2.0]]).bfloat16(), torch.tensor([[0.25, 0.001]], dtype=torch.float64)
        >>> m = (w.double() + d).bfloat16()
        >>> addend = Product(torch.ones(1, 1, dtype=torch.float64), d)
        >>> found = check_merge([(w, m, None)], (1, 2), addend, Rounding(torch.bfloat16, 2**-8))
        >>> found.count, found.unchanged
        (0, 1)
    """
    rows, columns = shape
    found = Check(_counts(rows, columns), _counts(rows, columns))
    if isinstance(addend, Product) and not rounding.dequantized:
        found.alike = _ALIKE * rounding.roundoff
        found.scatter = rounding.roundoff**2 * addend.scatter() if rounding.cast else 0.0
    first = 0
    for stored_w, stored_m, step in blocks:
        last = first + len(stored_w)
        bad = first_non_finite("BASE holds", stored_w, first) or first_non_finite("MERGED holds", stored_m, first)
        if bad:
            found.non_finite = bad
            return found
        rows_at_once = max(1, _CHUNK // columns)
        for at in range(0, len(stored_w), rows_at_once):
            part = slice(at, at + rows_at_once)
            w, m = stored_w[part].double(), stored_m[part].double()
            steps = step[part].double() if step is not None else None
            _add(found, w, m, steps, addend, rounding, (first + at, first + at + len(w)))
        first = last
    return found


def _counts(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, dtype=torch.int64), torch.zeros(columns, dtype=torch.int64)


def _add(
    found: Check, w: Tensor, m: Tensor, step: Tensor | None, addend: Addend, rounding: Rounding, span: tuple[int, int]
) -> None:
    delta = addend.rows(*span)
    size = delta.abs()
    error, summed = addend.error(*span, size, w, rounding)
    if LAYOUT[rounding.dtype][2] < LAYOUT[torch.float32][2]:
        error = error + _U32 * (w.abs() + size)
    if rounding.dequantized:
        error = error + unit_roundoff(rounding.dtype) * w.abs()
    half = ulp(m, rounding.dtype).mul_(0.5)
    if step is not None:
        half = torch.maximum(half, step * (_SLIGHTLY / 2))
    tolerance = error.mul_(_SLIGHTLY).add_(half, alpha=1 + 1e-9)
    observed = m - w
    apart = observed - delta
    off, off_base, same = apart.abs(), observed.abs(), observed == 0
    if math.isfinite(found.alike):
        found.ideal += _inner((w + delta).to(rounding.dtype).double() - w, delta)
        found.scatter += float(((tolerance if step is None else tolerance + step) * delta).square().sum())
    for dtype in rounding.bases:
        shift = w.to(dtype).double() - w
        found.scatter += float((shift * delta).square().sum())
        off = torch.fmin(off, (apart - shift).abs())  # not minimum: W may overflow in float16
        off_base = torch.fmin(off_base, (observed - shift).abs())
        same |= observed == shift
    for counts, bad in ((found.beyond, off > tolerance), (found.beyond_base, off_base > tolerance)):
        counts[0][span[0] : span[1]] += bad.sum(1)
        counts[1].add_(bad.sum(0))
    spacing = ulp(torch.maximum(torch.maximum(w.abs(), m.abs()), summed), rounding.dtype)
    found.worst = max(found.worst, float((off / (spacing if step is None else torch.maximum(spacing, step))).max()))
    found.entries += m.numel()
    found.unchanged += int(same.sum())
    found.inner += _inner(observed, delta)
    found.expected += _inner(delta, delta)
    found.observed += _inner(observed, observed)
    found.residual += _inner(apart, apart)
    found.base += _inner(w, w)
    found.allowed += _inner(tolerance, tolerance)


def _inner(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.reshape(-1), right.reshape(-1)))


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of a dtype's numbers at every value: 2^(⌊log₂|w|⌋ − p), and that of its subnormals below.

    Args:
        values: float64, any shape.
        dtype: float64, float32, float16 or bfloat16.

    Example:
        >>> ulp(torch.tensor([1.0, -3.0, 0.0], dtype=torch.float64), torch.bfloat16)[:2].tolist()
        [0.0078125, 0.015625]
    """
    integer, mask, _ = LAYOUT[torch.float64]
    powers = (values.contiguous().view(integer) & mask).view(torch.float64)
    return (powers * 2.0 ** -LAYOUT[dtype][2]).clamp_min(smallest(dtype))


def smallest(dtype: torch.dtype) -> float:
    """Return the smallest positive number of a dtype."""
    return float(torch.finfo(dtype).tiny * 2.0 ** -LAYOUT[dtype][2])


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return u = 2^−(p+1), the largest relative error of rounding to a dtype.

    >>> unit_roundoff(torch.bfloat16) == 2**-8
    True
    """
    return float(2.0 ** -(LAYOUT[dtype][2] + 1))


def held_dtype(values: Tensor) -> torch.dtype:
    """Return the shortest dtype whose numbers most of the values are, at most the one they are stored in.

    A model that was merged in bfloat16 and saved in float32 holds bfloat16 numbers: it can only be held to those.
    """
    stored = values.dtype
    values = values[values.abs() >= torch.finfo(stored).tiny]  # smaller ones have few bits, so that they fit anything
    for dtype in SHORTER[stored]:
        if values.numel() and (values.to(dtype).to(values.dtype) == values).double().mean() > 0.5:
            return dtype
    return stored
