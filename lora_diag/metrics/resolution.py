"""Resolution of an update by the files: rounding of the stored numbers, compared with ‖ΔW‖."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["resolved", "floor-limited", "unresolved"]

# Expected fraction of ‖ΔW‖_F² due to rounding. Measured on updates of planted rank 8, of a
# power-law spectrum and of full rank to bf16 weights (docs/benchmarks.md): at 0.3% the ranks at 90
# and 95% are exact and that at 99% is a tenth too high; at 2.6% that at 99% is wrong by factors; at
# 20% that at 90% may be. Beyond 50% most entries are unchanged, the others changed by whole
# spacings, and every rank is that of the rounding.
RESOLVED, UNRESOLVED = 0.01, 0.5


# Upper 0.1% point of the Tracy–Widom law of real matrices (Bornemann 2010); a tenth of
# ``FALSE_POSITIVES``, to allow for finite size and for variances that are not a product of row and
# column factors.
TRACY_WIDOM = 3.2724

# Fraction of layers without an update in which a singular value may exceed the edge. Measured:
# docs/benchmarks.md.
FALSE_POSITIVES = 0.01

Gain = tuple[float, float]
Sums = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Noise:
    """Sums of the variances σ² of independent errors over rows and columns, in units of ``unit``²,
    and of σ⁴.

    Args:
        rows, columns: Σσ².
        rows_fourth, columns_fourth: Σσ⁴.
        unit: Unit of σ.
        terms: Maximum number of uniform errors in an entry.
    """

    rows: Sums
    columns: Sums
    rows_fourth: Sums
    columns_fourth: Sums
    unit: float = 1.0
    terms: int = 1

    @property
    def fro(self) -> float:
        """Root mean square of the norm."""
        return self.unit * math.sqrt(self.rows.sum())

    @property
    def edge(self) -> float:
        """Upper limit of the largest singular value, exceeded in at most ``FALSE_POSITIVES`` of
        such matrices.
        """
        rows, columns = self.rows > 0, self.columns > 0
        if not rows.any():
            return 0.0
        total = math.sqrt(self.rows.sum())
        a, b = self.rows[rows] / total, self.columns[columns] / total
        lines = len(self.rows) + len(self.columns)
        poles = (
            float(
                (
                    a * _bound_excess(self.rows[rows], self.rows_fourth[rows], self.terms, lines)
                ).max()
            ),
            float(
                (
                    b
                    * _bound_excess(
                        self.columns[columns], self.columns_fourth[columns], self.terms, lines
                    )
                ).max()
            ),
        )
        bulk, scale = _bulk_edge(a, b)
        outlier, _ = _minimize_edge(a, b, *poles)
        square, fourth = self.rows.sum(keepdims=True), self.rows_fourth.sum(keepdims=True)
        # barely above a single large entry
        norm = float((square * _bound_excess(square, fourth, self.terms, lines))[0])
        return self.unit * math.sqrt(min(max(bulk + TRACY_WIDOM * scale, outlier), norm))


def _bound_excess(sums: Sums, fourth: Sums, terms: int, lines: int) -> Sums:
    """Return the factor by which Σe² of a row may exceed its expectation Σσ², over all ``lines``
    rows and columns.

    e² of a sum of k equal uniform errors has the variance (2 − 1.2/k)σ⁴ and is 3kσ² at most.
    """
    z = math.sqrt(2 * math.log(lines / FALSE_POSITIVES))
    return np.minimum(3 * terms, 1 + z * np.sqrt((2 - 1.2 / terms) * fourth) / sums)


def _minimize_edge(a: Sums, b: Sums, row_pole: float, column_pole: float) -> tuple[float, float]:
    """Return the smallest λ² = max(B(Q)/P, A(P)/Q) over P ≤ 1/row_pole, Q ≤ 1/column_pole, and its
    P.

    A(P) = Σaᵢ/(1 − aᵢP) and B likewise. This is Lehner's formula (1999) for the norm of the free
    counterpart of a matrix of independent entries of variance aᵢbⱼ; log λ² is convex in log P and
    log Q. With poles above the largest a and b, rows and columns of that energy may stand alone
    above the others.
    """
    most_p, most_q = (1 - 1e-9) / row_pole, (1 - 1e-9) / column_pole
    # Where P·A(P) = Q·B(Q) needs a larger Q, λ² increases with P.
    most_p = _solve(a, most_q * float((b / (1 - b * most_q)).sum()), most_p) or most_p

    def evaluate(p: float) -> tuple[tuple[float, float], float]:
        """Return λ² and P, and a number of the sign of d log λ²/d log P.

        With t = P·A(P), F = dt/d log P and G = dt/d log Q it is 1 − t/F − t/G: −1 at 0, increasing,
        and linear if all variances are equal.
        """
        left = 1 - a * p
        terms = a * p / left
        target = float(terms.sum())
        q = _solve(b, target, most_q) or most_q
        right = 1 - b * q
        slope = 1 - target / float((terms / left).sum()) - target / float((b * q / right**2).sum())
        return (target / p / q, p), slope

    low, high = 0.0, most_p
    at_low, (best, at_high), last = -1.0, evaluate(high), 0.0
    while at_high > 0 and high - low > 1e-9 * high:
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        found, slope = evaluate(middle)
        best = min(best, found)
        if abs(slope) < 1e-7:
            break
        # Illinois: an end that stays twice counts half, or it would never move.
        if slope < 0:
            low, at_low, at_high = middle, slope, at_high / 2 if last < 0 else at_high
        else:
            high, at_high, at_low = middle, slope, at_low / 2 if last > 0 else at_low
        last = slope
    return best


def _solve(b: Sums, target: float, upper: float) -> float | None:
    """Return Q with Q·B(Q) = target; None if it exceeds ``upper``.

    Q·B(Q) increases and is convex, so that Newton's method descends to the solution from any point
    above. One is where the largest term is the target, or the sum of all bᵢQ.
    """
    largest = float(b.max())
    q = min(target / (largest * (1 + target)), target / float(b.sum()), upper)
    while True:
        left = 1 - b * q
        step = (q * float((b / left).sum()) - target) / float((b / left**2).sum())
        if not step > 1e-14 * q:
            return None if q == upper else q
        q -= step


def _bulk_edge(a: Sums, b: Sums) -> tuple[float, float]:
    """Return λ² at the edge of the squared singular values, and the scale of its Tracy–Widom
    fluctuation.

    With M the trace of the resolvent and Q as in ``_minimize_edge``, λ² ≈ λ₀² + ½λ²''(Q)(Q − Q₀)²
    near the edge, so the density there is (1/π)·M'(Q)·√(2t/λ²''), and the scale (λ²''/2M'²)^⅓.
    """
    squared, p = _minimize_edge(a, b, float(a.max()), float(b.max()))
    largest = (1 - 1e-12) / float(b.max())
    q = _solve(b, p * float((a / (1 - a * p)).sum()), largest) or largest

    def squared_at(q: float) -> float:
        total = float((b / (1 - b * q)).sum())
        p = _solve(a, q * total, (1 - 1e-12) / float(a.max()))
        return total / p if p else math.inf

    step = min(1e-3 * q, 0.3 * (1 / float(b.max()) - q))
    curvature = (squared_at(q + step) - 2 * squared_at(q) + squared_at(q - step)) / step**2
    slope = float((b / (1 - b * q) ** 2).sum()) / squared
    scale = (curvature / (2 * slope**2)) ** (1 / 3) if 0 < curvature < math.inf else 0.0
    return squared, scale


def weighted_edge(left: Gain, right: Gain) -> float:
    """Return the limit of ``Noise.edge`` for S·E·T, given ‖·‖_F and ‖·‖_2 of S·diag(√a) and of
    diag(√b)·T.

    E = diag(√a)·Z·diag(√b) with Z of variance 1; expected to end below ‖S'‖_2‖T'‖_F + ‖S'‖_F‖T'‖_2
    (Chevet 1978), and above that by t with probability exp(−t²/(2‖S'‖_2²‖T'‖_2²)) at most, where Z
    is normal.

    Example:
        >>> round(weighted_edge((3.0, 1.0), (4.0, 1.0)), 3)  # ‖·‖ of 1: √9 + √16, and 3.035
        10.035
    """
    (s_fro, s_top), (t_fro, t_top) = left, right
    return s_top * t_fro + s_fro * t_top + math.sqrt(-2 * math.log(FALSE_POSITIVES)) * s_top * t_top


def signal_rank(s: NDArray[np.float64], edge: float, complete: bool) -> int | None:
    """Return the number of singular values above the noise edge; None if all kept values are and
    there are more.

    Example:
        >>> signal_rank(np.array([3.0, 2.0, 0.5]), 1.0, complete=True)
        2
    """
    count = int((s > edge).sum())
    return None if count == len(s) and not complete else count


def verdict(noise_fro: float, fro: float, signal: int | None) -> Verdict:
    """Return whether the files resolve the update.

    Args:
        noise_fro: Expected norm of the rounding error.
        fro: ‖ΔW‖_F as read from the files.
        signal: Singular values above the noise edge; None if more than were kept.

    Returns:
        The verdict; ``unresolved`` also for a zero update, which may have been lost to rounding.

    Example:
        >>> verdict(0.03, 1.0, 8), verdict(0.3, 1.0, 8), verdict(0.9, 1.0, 8)
        ('resolved', 'floor-limited', 'unresolved')
    """
    if fro == 0.0 or signal == 0 or (noise_fro / fro) ** 2 >= UNRESOLVED:
        return "unresolved"
    return "resolved" if (noise_fro / fro) ** 2 <= RESOLVED else "floor-limited"
