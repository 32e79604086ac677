"""Scale of a merge in blocks of rows and of columns.

Two parts of a layer with the scales 1.01 and 0.99 (fused query, key and value, heads, a fused gate and up projection)
have the right scale together. In a correct merge, the terms (M − M*)ΔW of every part have random signs, as those of the
layer have: a part S has D = Σ_S (M − M*)ΔW with the variance V = Σ_S ((M − M*)ΔW)² + (roundings of factors). Parts are
single rows and aligned blocks of 2, 4, 8, … rows, and of columns likewise: 2(m + n) in all, so that any run of rows
contains a block of a fourth of its length. Two tests, both at the level of that of the layer divided by 2(m + n):

- |D| ≤ L·√V for every block, L² = 2(ln 2(m + n) + 18) (Hoeffding 1963);
- ΣD²/V ≤ k + 2√(kx) + 2x, x = L²/2, over the k blocks of one size, for parts that alternate. Given the sizes of its
  terms, D/√V is subgaussian, so that ΣD²/V has the tail of χ² with k degrees of freedom (Laurent and Massart 2000,
  lemma 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Number of standard errors by which the scale c of a layer may differ from c*. Errors have random signs; given their
# sizes, a sum exceeds L·√Σx² with probability at most 2·exp(−L²/2) = 3e-8, L = 6 (Hoeffding 1963), for any number of
# terms.
MAX_SCALE_ERRORS = 6.0


class Lines(NamedTuple):
    """Sums over each of k rows, or columns, or blocks of them: ``(k,)``, float64.

    Args:
        difference: Σ (M − M*)ΔW.
        energy: Σ ΔW².
        variance: Variance of ``difference`` in correct merges, from roundings that no other line shares.
        deviation: Its standard deviation from roundings that lines share; while adding up, ``shared_terms`` of ΔW.
        ties: Σ |ΔW|q over the entries with q/4 < |ΔW| < q, q the spacing of M: they change if ΔW rounds up to q/2.
        along: ⟨W, ΔW⟩; of the complete sums, times the relative error of dequantizing W in all entries alike.
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
        return Lines(*(torch.nn.functional.pad(sums, (0, len(sums) % 2)).view(-1, 2).sum(1) for sums in self))


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


def find_uneven(sides: tuple[Lines, Lines], common: Callable[[Lines, float], Tensor]) -> tuple[Stretch, ...]:
    """Return blocks whose scale no rounding explains: the clearest with too much and with too little of ΔW.

    Both are blocks along the same axis, rows or columns: that of the clearest of all.

    Args:
        sides: The sums over rows, and over columns.
        common: Takes sums and their numbers of entries; returns what roundings may add to all entries alike.
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
            squares = (independent.square() / lines.variance.clamp_min((1e-12 * lines.energy).square() + 1e-300)).sum()
            spread = len(excess) + 2 * math.sqrt(len(excess) * exponent) + 2 * exponent
            if bool((excess > limit).any()) or float(squares) > spread:
                for too_much in (True, False):
                    i = int(torch.where((lines.difference > 0) == too_much, excess, -1.0).argmax())
                    largest, previous = float(excess[i]), clearest.get((axis, too_much))
                    if largest > 0 and (previous is None or largest > previous[0]):
                        energy = float(lines.energy[i])
                        ends = i * width, min(counts[axis], (i + 1) * width)
                        stretch = Stretch(axis, *ends, float(lines.difference[i]) / energy, float(error[i]) / energy)
                        clearest[axis, too_much] = largest, stretch
            lines, width = lines.join_pairs(), 2 * width
    if not clearest:
        return ()
    axis = max(clearest, key=lambda key: clearest[key][0])[0]
    return tuple(clearest[axis, too_much][1] for too_much in (True, False) if (axis, too_much) in clearest)
