"""Check whether M is a rounding of W + ΔW, entry by entry.

A merge computes ΔW in some precision, adds it to W and rounds to the stored dtype d. For any order
of operations,

    |M − (W + ΔW)| ≤ ulp_d(M)/2 + δ,

where δ bounds the rounding inside ΔW. With u the unit roundoff of the arithmetic, r the rank and P
= |B||A|:

- ΔW rounded once as a product and once after scaling (both in d): 2u|ΔW|;
- factors cast to d before the product, where they are stored more finely: 4u·P (B, A and up to two
  diagonals);
- the product summed in float32: (r + 8)·2⁻²⁴·P (Higham 2002, eq. 3.5);
- W + ΔW in float32, where d is shorter: 2⁻²⁴(|W| + |ΔW|);
- terms of the product added to W one after the other: (r − 1)·2⁻²⁴|W| (2⁻⁵³ where d is float64).

The last one is for W + s·B·A in one call (GEMM with β = 1). It sums W and r products in an order of
its own: the products first, W first, or parts of them (split-K), with or without FMA. In a sum of r
+ 1 terms in any order a term takes part in r additions at most, so the error is below γ_r|W| +
γ_(r+2)P, γ_k = k·u/(1 − k·u), with two more roundings of every product without FMA: that of itself,
and that of its scaling (Higham 2002, eq. 3.4 and section 4.2). Of the r roundings of W one is in
ulp_d(M)/2 or W + ΔW, and (r + 8)P covers those of P. MKL adds the terms to W one by one where it
may use SSE2 only: errors beyond ulp(M)/2 + (r + 10)u·P were 14u|W| at r = 64, 18 at 128; with FMA
there were none.

An update that is not a product of two factors (DoRA, LoHa, rotations) has the bound (4u +
16·2⁻²⁴)(|W| + |ΔW| + rms ΔW).

Since δ is relative to ΔW and not to W, an update far below ulp(W) is still checked sharply: M must
equal the number that W + ΔW rounds to.

Within this bound, single entries cannot reveal a slightly wrong scale, but all entries together
can: with M* = W + ΔW rounded once, the scale c = ⟨M − W, ΔW⟩/‖ΔW‖² of a correct merge is c* = ⟨M* −
W, ΔW⟩/‖ΔW‖² up to a sum of independent rounding errors, whose standard error is also computed
(``Check.scale_error``).

Scales that cancel in this sum are found in blocks of rows and of columns. Two parts of a layer with
the scales 1.01 and 0.99 (fused query, key and value, heads, a fused gate and up projection) have
the right scale together. In a correct merge, the terms (M − M*)ΔW of every part have random signs,
as those of the layer have: a part S has D = Σ_S (M − M*)ΔW with the variance V = Σ_S ((M − M*)ΔW)²
+ (roundings of factors). Parts are single rows and aligned blocks of 2, 4, 8, … rows, and of
columns likewise: 2(m + n) in all, so that any run of rows contains a block of a fourth of its
length. Two tests, both at the level of that of the layer divided by 2(m + n):

- |D| ≤ L·√V for every block, L² = 2(ln 2(m + n) + 18) (Hoeffding 1963);
- ΣD²/V ≤ k + 2√(kx) + 2x, x = L²/2, over the k blocks of one size, for parts that alternate. Given
  the sizes of its terms, D/√V is subgaussian, so that ΣD²/V has the tail of χ² with k degrees of
  freedom (Laurent and Massart 2000, lemma 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_diag.linalg.difference import first_non_finite
from lora_diag.linalg.rounding import LAYOUT, SHORTER

# Number of standard errors by which the scale c of a layer may differ from c*. Errors have random
# signs; given their sizes, a sum exceeds L·√Σx² with probability at most 2·exp(−L²/2) = 3e-8, L = 6
# (Hoeffding 1963), for any number of terms.
MAX_SCALE_ERRORS = 6.0


class Lines(NamedTuple):
    """Sums over each of k rows, or columns, or blocks of them: ``(k,)``, float64.

    Args:
        difference: Σ (M − M*)ΔW.
        energy: Σ ΔW².
        variance: Variance of ``difference`` in correct merges, from roundings that no other line
            shares.
        deviation: Its standard deviation from roundings that lines share; while adding up,
            ``shared_terms`` of ΔW.
        ties: Σ |ΔW|q over the entries with q/4 < |ΔW| < q, q the spacing of M: they change if ΔW
            rounds up to q/2.
        along: ⟨W, ΔW⟩; of the complete sums, times the relative error of dequantizing W in all
            entries alike.
    """

    difference: Tensor
    energy: Tensor
    variance: Tensor
    deviation: Tensor
    ties: Tensor
    along: Tensor

    @classmethod
    def zeros(cls, count: int) -> Lines:
        """Return empty sums."""
        return cls(*torch.zeros(6, count, dtype=torch.float64))

    def join_pairs(self) -> Lines:
        """Return the sums of lines 0 and 1, of lines 2 and 3, and so on."""
        return Lines(
            *torch.nn.functional.pad(torch.stack(self), (0, len(self.energy) % 2))
            .view(6, -1, 2)
            .sum(2)
        )


@dataclass(frozen=True, slots=True)
class Stretch:
    """A block of rows or columns with another scale than the layer should have.

    Args:
        axis: 0 for rows, 1 for columns.
        first: Its first row or column.
        last: The one after its last.
        off: c − c* in it.
        error: Standard error of ``off``.
    """

    axis: int
    first: int
    last: int
    off: float
    error: float


def find_uneven(
    sides: tuple[Lines, Lines], common: Callable[[Lines, float], Tensor]
) -> tuple[Stretch, ...]:
    """Return blocks whose scale no rounding explains: the clearest with too much and with too
    little of ΔW.

    Both are blocks along the same axis, rows or columns: that of the clearest of all. Empty if
    rounding explains all.

    Args:
        sides: The sums over rows, and over columns.
        common: Takes sums and their numbers of entries; returns what roundings may add to all
            entries alike.
    """
    counts = [len(lines.energy) for lines in sides]
    exponent = MAX_SCALE_ERRORS**2 / 2 + math.log(2 * sum(counts))
    limit = math.sqrt(2 * exponent)
    clearest: dict[tuple[int, bool], tuple[float, Stretch]] = {}
    for axis, lines in enumerate(sides):
        width = 1
        while len(lines.energy) > 1:
            off = lines.difference.abs()
            allowed = common(lines, width * counts[1 - axis])
            error = (lines.variance + lines.deviation.square()).sqrt()
            # 0/0 where nothing was rounded: float64 sums differ by less than this
            excess = (off - allowed).clamp_min(0) / error.clamp_min(1e-12 * lines.energy + 1e-300)
            independent = (off - allowed - limit * lines.deviation).clamp_min(0)
            squares = (
                independent.square()
                / lines.variance.clamp_min((1e-12 * lines.energy).square() + 1e-300)
            ).sum()
            spread = len(excess) + 2 * math.sqrt(len(excess) * exponent) + 2 * exponent
            if bool((excess > limit).any()) or float(squares) > spread:
                for too_much in (True, False):
                    i = int(torch.where((lines.difference > 0) == too_much, excess, -1.0).argmax())
                    largest, previous = float(excess[i]), clearest.get((axis, too_much))
                    if largest > 0 and (previous is None or largest > previous[0]):
                        energy = float(lines.energy[i])
                        ends = i * width, min(counts[axis], (i + 1) * width)
                        stretch = Stretch(
                            axis,
                            *ends,
                            float(lines.difference[i]) / energy,
                            float(error[i]) / energy,
                        )
                        clearest[axis, too_much] = largest, stretch
            lines, width = lines.join_pairs(), 2 * width
    if not clearest:
        return ()
    axis = max(clearest, key=lambda key: clearest[key][0])[0]
    return tuple(
        clearest[axis, too_much][1] for too_much in (True, False) if (axis, too_much) in clearest
    )


# Unit roundoff of float32, in which products are summed.
_U32 = 2.0**-24

# Error of the arithmetic of an update computed from W (DoRA's norm, quotient, product and sum; a
# rotation's row of products), in units of u(|W| + |ΔW|).
_STEPS_WITH_W = 4.0

# Entries per block: a dozen float64 arrays of them fit in the cache. One core on a bf16 pair of
# 4096²: 0.63 s with 2^13, 0.49 with 2^14, 0.63 with 2^15, 1.4 with 2^16, 1.9 with 2^20.
_CHUNK = 2**14

# Variance of one rounding to nearest, in units of (u·x)²: (2u·2^e)²/12 with x log-uniform in [2^e,
# 2^(e+1)), for which the mean of 4^e/x² is 3/(8 ln 2).
_VARIANCE = 0.18

# Roundings of each factor (cast and scaled), and those common to rows and columns in an update
# computed from W.
_FACTOR_ROUNDINGS, _WHOLE_ROUNDINGS = 2.0, 4.0

# Rounding to nearest is biased if the density f of the values has a slope: by (2u·2^e)²/12·f'/f,
# which is 0.54u² of a Gaussian ΔW per rounding. Both factors, the product and the scaled product
# give less than four times that.
_BIAS = 4.0

# A ΔW rounded to M's dtype is q/2 itself, a tie that moves every other entry of a W on the grid, if
# it came from the cell (1 − u/2, 1 + u)q/2: one and a half of three parts move where two should,
# u/4 of what lies about q/2 for each rounding.
_TIED = 0.5

# Second-order terms of the bounds above, and the float64 arithmetic here.
_SECOND_ORDER = 1.01


@dataclass(frozen=True, slots=True)
class Product:
    """ΔW = B·A; b ``(m, r)`` and a ``(r, n)``, float64."""

    b: Tensor
    a: Tensor

    def rows(self, first: int, last: int) -> Tensor:
        """Return the rows of ΔW from ``first`` to before ``last``, float64."""
        return self.b[first:last] @ self.a

    def error(
        self, first: int, last: int, size: Tensor, w: Tensor, rounding: MergeRounding
    ) -> tuple[Tensor, Tensor]:
        """Return δ for rows of ΔW with absolute values ``size``, and P, the sum of
        absolute terms.
        """
        magnitude = self.b[first:last].abs() @ self.a.abs()
        u = rounding.roundoff
        casts = 4 * u if rounding.cast else 0.0
        small = smallest_subnormal(
            rounding.dtype
        )  # below the normal numbers, rounding has an absolute error
        rank = self.b.shape[1]
        bound = (
            2 * u * size + (casts + (rank + 8) * _U32) * magnitude + (2 + rounding.scale) * small
        )
        bound += max(0, rank - 1) * min(_U32, unit_roundoff(rounding.dtype)) * w.abs()
        if rounding.cast:
            bound += small * (
                self.b[first:last].abs().sum(1, keepdim=True) + rounding.scale * self.a.abs().sum(0)
            )
        return bound, magnitude

    def shared_terms(
        self, first: int, last: int, w: Tensor, delta: Tensor, rounding: MergeRounding
    ) -> Tensor | None:
        """Return Σ_k (B_ik·A_kj·ΔW_ij)² for rows, proportional to the variance that lines share;
        None without casts.
        """
        if not rounding.cast:
            return None
        return (self.b[first:last].square() @ self.a.square()).mul_(delta).mul_(delta)

    def add_noise(self, rows: Lines, columns: Lines, rounding: MergeRounding) -> float:
        """Add the variance of ⟨E, ΔW⟩ over the rounding errors E of B and A to the lines.

        An entry of B is shared by a row, and one of A by a column. In a block of rows, errors of A
        add up; the sum of the rows' standard deviations bounds theirs (Minkowski).

        Returns:
            The variance of the whole layer.
        """
        if not rounding.cast:
            return 0.0
        variance_of_one = _VARIANCE * rounding.roundoff**2
        absolute = _FACTOR_ROUNDINGS * smallest_subnormal(rounding.dtype) ** 2 / 12
        by_b, by_a = (
            self.b @ (self.a @ self.a.T),
            (self.b.T @ self.b) @ self.a,
        )  # ⟨E, ΔW⟩ for E = 1 in one entry
        sides = (
            (rows, self.b, by_b, rounding.scale**2, 1.0),
            (columns, self.a.T, by_a.T, 1.0, rounding.scale**2),
        )
        variance = 0.0
        for lines, factor, by_entry, own_scale, other_scale in sides:
            relative = (factor * by_entry).square().sum(1)
            own = (
                variance_of_one * _FACTOR_ROUNDINGS * relative
                + absolute * own_scale * by_entry.square().sum(1)
            )
            shared = variance_of_one * _FACTOR_ROUNDINGS * lines.deviation
            shared += absolute * other_scale * factor.square().sum(1) * lines.energy
            if rounding.diagonal:
                shared += variance_of_one * (relative + lines.energy.square())
            lines.variance.add_(own)
            lines.deviation.copy_(shared.sqrt())
            variance += float(own.sum())
        if rounding.diagonal:
            variance += variance_of_one * float(
                sum((self.b * by_b).sum(axis).square().sum() for axis in (0, 1))
            )
        return variance

    def bias(self) -> float:
        """Return the relative error of ΔW that truncating sums can have in all entries alike."""
        return (self.b.shape[1] + 8) * _U32

    def times(self, factor: float) -> Product:
        """Return c·ΔW."""
        return Product(self.b * factor, self.a)

    def scale_lines(self, factors: Tensor, axis: int) -> Product:
        """Return ΔW with every row (axis 0) or column multiplied by its factor."""
        return (
            Product(self.b * factors[:, None], self.a)
            if axis == 0
            else Product(self.b, self.a * factors)
        )

    def truncate_factors(self, scale: float) -> Product:
        """Return s·B·A with the factors truncated to the 10 mantissa bits of TF32, as read by a
        tensor core.

        Args:
            scale: s, included in B.
        """
        b, a = (
            (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32).double()
            for x in (self.b / scale, self.a)
        )
        return Product(b * scale, a)

    def take(self, rows: Tensor) -> Product:
        """Return the rows of ΔW with these indices."""
        return Product(self.b[rows], self.a)

    def transpose(self) -> Product:
        """Return ΔWᵀ."""
        return Product(self.a.T, self.b.T)

    def swap_halves(self) -> Product:
        """Return ΔW with its upper and lower half swapped."""
        return Product(self.b.roll(len(self.b) // 2, 0), self.a)


@dataclass(frozen=True, slots=True)
class Whole:
    """ΔW given entry by entry.

    Args:
        shape: ``(m, n)``.
        read: Takes first and last row and returns these rows of ΔW.
        exact: Whether it needs no arithmetic: a new value stored in full in the adapter.
        factor: The multiplier c of ΔW.
    """

    shape: tuple[int, int]
    read: Callable[[int, int], Tensor]
    exact: bool = False
    factor: float = 1.0

    def rows(self, first: int, last: int) -> Tensor:
        """Return the rows of ΔW from ``first`` to before ``last``, float64."""
        return self.read(first, last).double() * self.factor

    def error(
        self, first: int, last: int, size: Tensor, w: Tensor, rounding: MergeRounding
    ) -> tuple[Tensor, Tensor]:
        """Return δ for rows of ΔW with absolute values ``size``, and the size of the
        terms of sums.
        """
        if self.exact:
            return torch.zeros_like(size), size.clone()
        summed = (
            size + w.abs() + float((size**2).mean().sqrt())
        )  # terms that cancelled in a sum are of this size
        return (_STEPS_WITH_W * rounding.roundoff + 16 * _U32) * summed, summed

    def shared_terms(
        self, first: int, last: int, w: Tensor, delta: Tensor, rounding: MergeRounding
    ) -> Tensor | None:
        """Return (|W·ΔW| + ΔW²)² for rows, proportional to the variance that lines share; None
        without arithmetic.
        """
        return None if self.exact else (w * delta).abs_().addcmul_(delta, delta).square_()

    def add_noise(self, rows: Lines, columns: Lines, rounding: MergeRounding) -> float:
        """Add the variance of roundings of whole rows and columns to the lines; return that of the
        layer.
        """
        if self.exact:
            return 0.0
        relative, variance = _WHOLE_ROUNDINGS * _VARIANCE * rounding.roundoff**2, 0.0
        for lines in (rows, columns):
            own = relative * (lines.along.abs() + lines.energy).square()
            lines.variance.add_(own)
            lines.deviation.mul_(relative).sqrt_()
            variance += float(own.sum())
        return variance

    def bias(self) -> float:
        """Return the relative error of ΔW that truncating sums can have in all entries alike; 0
        without arithmetic.
        """
        return 0.0 if self.exact else 16 * _U32

    def times(self, factor: float) -> Whole:
        """Return c·ΔW."""
        return replace(self, factor=self.factor * factor, exact=False)

    def scale_lines(self, factors: Tensor, axis: int) -> Whole:
        """Return ΔW with every row (axis 0) or column multiplied by its factor."""

        def read(first: int, last: int) -> Tensor:
            return self.rows(first, last) * (factors[first:last, None] if axis == 0 else factors)

        return Whole(self.shape, read)

    def take(self, rows: Tensor) -> Whole:
        """Return the rows of ΔW with these indices."""

        def read(first: int, last: int) -> Tensor:
            return torch.cat([self.rows(row, row + 1) for row in rows[first:last].tolist()])

        return Whole((len(rows), self.shape[1]), read, self.exact)

    def transpose(self) -> Whole:
        """Return ΔWᵀ."""
        matrix = self.rows(0, self.shape[0]).T
        return Whole((self.shape[1], self.shape[0]), lambda first, last: matrix[first:last])

    def swap_halves(self) -> Whole:
        """Return ΔW with its upper and lower half swapped."""
        matrix = self.rows(0, self.shape[0]).roll(self.shape[0] // 2, 0)
        return Whole(self.shape, lambda first, last: matrix[first:last])


Addend = Product | Whole


@dataclass(frozen=True, slots=True)
class MergeRounding:
    """A possible rounding of a merge.

    Args:
        dtype: d, the dtype of MERGED's values.
        roundoff: u of the arithmetic of ΔW.
        cast: Whether the factors may have been cast to a shorter dtype first.
        scale: s, applied to B after such a cast.
        diagonal: Whether vectors that scale columns and rows of B were cast as well.
        bases: Dtypes to which W may have been rounded first, besides none.
        dequantized: Whether W is dequantized, which may have been done in d.
        first: The dtype to which W was rounded first, in M* (``Check.ideal``); None for not at all.
        between: The dtype to which the sum was rounded before d, in M*; None for not at all.
    """

    dtype: torch.dtype
    roundoff: float
    cast: bool = False
    scale: float = 1.0
    diagonal: bool = False
    bases: tuple[torch.dtype, ...] = ()
    dequantized: bool = False
    first: torch.dtype | None = None
    between: torch.dtype | None = None

    def round_sum(self, w: Tensor, delta: Tensor) -> Tensor:
        """Return M*, W + ΔW with this rounding, float64."""
        start = w if self.first is None else w.to(self.first).double()
        total = start + delta
        return (total if self.between is None else total.to(self.between)).to(self.dtype).double()


@dataclass(slots=True)
class Check:
    """Result of one pass over W, M and ΔW; O = M − W.

    Args:
        entries: Number of entries.
        beyond: Number of entries of M that no rounding of W + ΔW explains, by row and by column.
        beyond_base: The same for W + 0 with the same tolerance: visible changes.
        lines: Sums over the rows, and over the columns, with M* as ``MergeRounding.round_sum``
            returns it.
        worst: max |M − (W + ΔW)| in ulp of the largest of |W|, |M| and the terms of ΔW, or in steps
            of a quantized M where these are larger.
        unchanged: Number of entries with M = W, or W rounded.
        inner: ⟨O, ΔW⟩.
        expected: ‖ΔW‖².
        observed: ‖O‖².
        residual: ‖O − ΔW‖².
        base: ‖W‖².
        merged: ‖M‖².
        allowed: Σ of the squared tolerances.
        variance: Variance of ``inner`` − ``ideal`` in correct merges: Σ (M − M*)²ΔW², since the
            signs of M − M* are random, plus the roundings of factors, common to rows or columns.
        apart: Σ |(M − M*)ΔW|, which is |``inner`` − ``ideal``| if all errors have one sign.
        crossing: Σ |ΔW|³q, q the spacing of M's numbers: h times that is Σ (M* − M')²ΔW² for the M'
            of (1 + h)ΔW.
        bias: Relative error of ΔW that sums can have in all entries alike.
        roundoff: u; 0 if ΔW needs no arithmetic.
        least: The largest error of rounding a number below the normal ones.
        coarsest: Σ step²/12 of a quantized M.
        gridded: Whether both sides are quantized, so that M* is not known.
        uneven: Blocks of rows or columns with more or less of ΔW than rounding explains.
        base_non_finite: Sentence on the first entry of W that is not finite; None if all are.
        non_finite: The same for M.
    """

    beyond: tuple[Tensor, Tensor]
    beyond_base: tuple[Tensor, Tensor]
    lines: tuple[Lines, Lines]
    entries: int = 0
    worst: float = 0.0
    unchanged: int = 0
    inner: float = 0.0
    expected: float = 0.0
    observed: float = 0.0
    residual: float = 0.0
    base: float = 0.0
    merged: float = 0.0
    allowed: float = 0.0
    variance: float = 0.0
    apart: float = 0.0
    crossing: float = 0.0
    bias: float = 0.0
    roundoff: float = 0.0
    least: float = 0.0
    coarsest: float = 0.0
    gridded: bool = False
    uneven: tuple[Stretch, ...] = ()
    base_non_finite: str | None = None
    non_finite: str | None = None

    @property
    def count(self) -> int:
        """Number of entries that no rounding explains."""
        return int(self.beyond[0].sum())

    @property
    def moved(self) -> int:
        """Number of entries that differ from W, and from W rounded, by more than the tolerance."""
        return int(self.beyond_base[0].sum())

    @property
    def ideal(self) -> float:
        """⟨M* − W, ΔW⟩."""
        return self.inner - float(self.lines[0].difference.sum())

    @property
    def scale_error(self) -> float:
        """Standard error of c = inner/expected about c* = ideal/expected; infinite if M* is not
        known or ΔW = 0.
        """
        if self.gridded or not self.expected:
            return math.inf
        return math.sqrt(self.variance) / self.expected

    @property
    def scale_limit(self) -> float:
        """Largest difference of c from c* in a correct merge: random errors, and errors common to
        all entries.
        """
        return MAX_SCALE_ERRORS * self.scale_error + self.common_error

    @property
    def common_error(self) -> float:
        """Relative error of ΔW that roundings can have in all entries alike.

        This includes a quantizer's gain: near the optimum, quantizing removes the fraction of its
        noise from the signal.
        """
        if not self.expected:
            return 0.0
        whole = Lines(*(line.sum() for line in self.lines[0]))
        return float(self.common(whole, self.entries)) / self.expected

    def common(self, lines: Lines, entries: float) -> Tensor:
        """Return the largest |Σ (M − M*)ΔW| of roundings that all entries of a line share, in lines
        of ``entries``.
        """
        gain = 2 * self.coarsest / self.base if self.base else 0.0
        rounded = self.roundoff * lines.energy.sqrt() + self.least * math.sqrt(
            entries
        )  # subnormal numbers included
        biased = _BIAS * rounded.square() + _TIED * self.roundoff * lines.ties
        return (self.bias + gain) * lines.energy + biased + lines.along.abs()

    def resolves(self, change: float) -> bool:
        """Return whether a scale with the relative error ``change`` would be detected, with a
        margin of two.
        """
        if not self.expected or self.gridded:
            return False
        noise = math.sqrt(self.variance + change * self.crossing) / self.expected
        return 2 * (MAX_SCALE_ERRORS * noise + self.common_error) < change

    @property
    def drifted(self) -> bool:
        """Whether more or less of ΔW arrived, in all or in a part, than roundings can add or
        remove.
        """
        off = abs(self.inner - self.ideal)
        return self.expected > 0 and (
            not off <= self.scale_limit * self.expected or bool(self.uneven)
        )


# W, M and the steps of M's format (None where they follow from value and dtype), ``(rows, n)``
# each.
Block = tuple[Tensor, Tensor, Tensor | None]


def check_merge(
    blocks: Iterable[Block],
    shape: tuple[int, int],
    addend: Addend,
    rounding: MergeRounding,
    whole: bool = True,
) -> Check:
    """Compare every entry of M with W + ΔW.

    Args:
        blocks: ``(W, M, steps of M)`` row blocks from the first row to the last.
        shape: ``(m, n)``.
        addend: ΔW.
        rounding: Possible rounding of the merge.
        whole: False to stop at entries that no rounding explains, if only the failure matters.

    Returns:
        Counts and norms; after a non-finite entry of BASE or MERGED nothing more is read.

    Example:
        >>> w, d = (
        ...     torch.tensor([[1.0, 2.0]]).bfloat16(),
        ...     torch.tensor([[0.25, 0.001]], dtype=torch.float64),
        ... )
        >>> m = (w.double() + d).bfloat16()
        >>> addend = Product(torch.ones(1, 1, dtype=torch.float64), d)
        >>> found = check_merge(
        ...     [(w, m, None)], (1, 2), addend, MergeRounding(torch.bfloat16, 2**-8)
        ... )
        >>> found.count, found.unchanged
        (0, 1)
    """
    rows, columns = shape
    check = Check(
        _make_counts(rows, columns),
        _make_counts(rows, columns),
        (Lines.zeros(rows), Lines.zeros(columns)),
    )
    check.bias = addend.bias()
    if isinstance(addend, Product) or not addend.exact:
        check.roundoff, check.least = rounding.roundoff, smallest_subnormal(rounding.dtype) / 2
    first = 0
    for stored_w, stored_m, step in blocks:
        last = first + len(stored_w)
        check.base_non_finite = first_non_finite("BASE holds", stored_w, first)
        check.non_finite = first_non_finite("MERGED holds", stored_m, first)
        if check.base_non_finite or check.non_finite:
            return check
        rows_at_once = max(1, _CHUNK // columns)
        for row in range(0, len(stored_w), rows_at_once):
            part = slice(row, row + rows_at_once)
            w, m = stored_w[part].double(), stored_m[part].double()
            steps = step[part].double() if step is not None else None
            span = first + row, first + row + len(w)
            _add_rows(check, w, m, steps, addend, rounding, span)
            if not whole and bool(check.beyond[0][span[0] : span[1]].any()):
                return check
        first = last
    check.variance = float(check.lines[0].variance.sum()) + addend.add_noise(*check.lines, rounding)
    for lines in check.lines:
        lines.along.mul_(unit_roundoff(rounding.dtype) if rounding.dequantized else 0.0)
    if not check.gridded:
        check.uneven = find_uneven(check.lines, check.common)
    return check


def _make_counts(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return counts of zero for every row and for every column."""
    return torch.zeros(rows, dtype=torch.int64), torch.zeros(columns, dtype=torch.int64)


def _add_rows(
    check: Check,
    w: Tensor,
    m: Tensor,
    step: Tensor | None,
    addend: Addend,
    rounding: MergeRounding,
    span: tuple[int, int],
) -> None:
    """Add rows to the result of a check.

    Args:
        check: Result to update.
        w: Rows of W.
        m: Rows of M.
        step: The spacing of a quantized M at every entry; None if M is not quantized.
        addend: ΔW.
        rounding: Possible rounding of a correct merge.
        span: First row and the one after the last.
    """
    if isinstance(addend, Product) and not addend.b.numel() and torch.equal(w, m):
        check.entries, check.unchanged = check.entries + m.numel(), check.unchanged + m.numel()
        norm = _inner(w, w)
        check.base, check.merged = check.base + norm, check.merged + norm
        return
    delta = addend.rows(*span)
    size = delta.abs()
    error, summed = addend.error(*span, size, w, rounding)
    if LAYOUT[rounding.dtype][2] < LAYOUT[torch.float32][2]:
        error = error + _U32 * (w.abs() + size)
    if rounding.dequantized:
        error = error + unit_roundoff(rounding.dtype) * w.abs()
    half = ulp(m, rounding.dtype).mul_(0.5)
    if step is not None:
        half = torch.maximum(half, step * (_SECOND_ORDER / 2))
    tolerance = error.mul_(_SECOND_ORDER).add_(half, alpha=1 + 1e-9)
    observed = m - w
    residual = observed - delta
    off, off_base, unchanged = residual.abs(), observed.abs(), observed == 0
    _add_scale(check, w, m, delta, 2 * half, step is not None, addend, rounding, span)
    for dtype in rounding.bases:
        shift = w.to(dtype).double() - w
        off = torch.fmin(off, (residual - shift).abs())  # not minimum: W may overflow in float16
        off_base = torch.fmin(off_base, (observed - shift).abs())
        unchanged |= observed == shift
    for counts, bad in ((check.beyond, off > tolerance), (check.beyond_base, off_base > tolerance)):
        counts[0][span[0] : span[1]] += bad.sum(1)
        counts[1].add_(bad.sum(0))
    spacing = ulp(torch.maximum(torch.maximum(w.abs(), m.abs()), summed), rounding.dtype)
    check.worst = max(
        check.worst,
        float((off / (spacing if step is None else torch.maximum(spacing, step))).max()),
    )
    check.entries += m.numel()
    check.unchanged += int(unchanged.sum())
    check.inner += _inner(observed, delta)
    check.expected += _inner(delta, delta)
    check.observed += _inner(observed, observed)
    check.residual += _inner(residual, residual)
    check.base += _inner(w, w)
    check.merged += _inner(m, m)
    check.allowed += _inner(tolerance, tolerance)


def _add_scale(
    check: Check,
    w: Tensor,
    m: Tensor,
    delta: Tensor,
    spacing: Tensor,
    quantized: bool,
    addend: Addend,
    rounding: MergeRounding,
    span: tuple[int, int],
) -> None:
    """Add the contributions to c* and the standard error of c, by row and by column.

    Args:
        check: Result to update.
        w: Rows of W.
        m: Rows of M.
        delta: Rows of ΔW.
        spacing: Spacing of M's numbers at every entry.
        quantized: Whether that is the step of a quantized format, which M* leaves out.
        addend: ΔW.
        rounding: Possible rounding of a correct merge.
        span: First row and the one after the last.
    """
    squares, size = delta.square(), delta.abs()
    difference = (m - rounding.round_sum(w, delta)).mul_(delta)
    check.apart += float(difference.abs().sum())
    weighted = size.mul_(spacing)
    check.crossing += _inner(squares, weighted)
    if quantized:
        check.coarsest += float(spacing.square().sum()) / 12
        check.gridded |= rounding.dequantized
    ties = weighted.mul_((4 * squares > weighted) & (squares < weighted))
    along = w * delta if rounding.dequantized or isinstance(addend, Whole) else None
    shared = addend.shared_terms(*span, w, delta, rounding)
    for lines, axis, part in zip(check.lines, (1, 0), (slice(*span), slice(None)), strict=True):
        contributions = difference, squares, difference.square(), shared, ties, along
        for total, values in zip(lines, contributions, strict=True):
            if values is not None:
                total[part] += values.sum(axis)


def _inner(left: Tensor, right: Tensor) -> float:
    """Return the sum of the products of the entries of two matrices."""
    return float(torch.dot(left.reshape(-1), right.reshape(-1)))


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of a dtype at every value: 2^(⌊log₂|w|⌋ − p), and the spacing of its
    subnormal numbers below.

    Args:
        values: float64, any shape.
        dtype: float64, float32, float16 or bfloat16.

    Example:
        >>> ulp(torch.tensor([1.0, -3.0, 0.0], dtype=torch.float64), torch.bfloat16)[:2].tolist()
        [0.0078125, 0.015625]
    """
    integer, mask, _ = LAYOUT[torch.float64]
    powers = (values.contiguous().view(integer) & mask).view(torch.float64)
    return (powers * 2.0 ** -LAYOUT[dtype][2]).clamp_min(smallest_subnormal(dtype))


def smallest_subnormal(dtype: torch.dtype) -> float:
    """Return the smallest positive number of a dtype."""
    return float(torch.finfo(dtype).tiny * 2.0 ** -LAYOUT[dtype][2])


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return u = 2^−(p+1), the largest relative error of rounding to a dtype.

    >>> unit_roundoff(torch.bfloat16) == 2**-8
    True
    """
    return float(2.0 ** -(LAYOUT[dtype][2] + 1))


def shortest_dtype(values: Tensor) -> torch.dtype:
    """Return the shortest dtype that represents more than half of the normal values exactly; else
    the stored one.

    A model that was merged in bfloat16 and saved in float32 has bfloat16 precision only.
    """
    stored = values.dtype
    # smaller values have few bits, so that they fit any dtype
    values = values[values.abs() >= torch.finfo(stored).tiny]
    for dtype in SHORTER[stored]:
        if values.numel() and (values.to(dtype).to(values.dtype) == values).double().mean() > 0.5:
            return dtype
    return stored
