"""The loss over the strength t: the best t, the range that is not worse, the smallest sufficient t,
and a parabola.

Everything is linear in the losses of sequences, so that every statement has the paired error of
``metrics.statistics.paired_difference``: a parabola through mean losses has the mean of the
parabolas through the losses of each sequence. The interval of its minimum −b/2c is Fieller's: all t
at which the slope b + 2ct does not differ significantly from 0. It needs no expansion around the
estimate, and is unbounded where c might be 0.

Reference: Fieller 1954, "Some problems in interval estimation", JRSS B 16.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from lora_diag.metrics import statistics as stats

Array = NDArray[np.float64]

# Fraction of the gain from which a strength is sufficient.
SUFFICIENT_SHARE = 0.9
# Smallest number of strengths between which losses are interpolated.
LEAST = 5
# A parabola is poor if it misses the loss at its optimum significantly, and by more than this
# fraction of the range of its losses.
MAX_MISFIT = 0.1
# Number of steps in which strengths between measured ones are searched.
STEPS = 400
# Distance from the optimum within which the ends of its interval must lie.
REACH = 2.0


@dataclass(frozen=True)
class Curve:
    """Losses of sequences at several strengths.

    Args:
        scales: Strengths t, ascending, with 0 and 1.
        nll: Summed negative log-likelihoods ``(strengths, sequences)``.
        counts: Number of predictions of each sequence.
    """

    scales: tuple[float, ...]
    nll: Array
    counts: tuple[int, ...]

    def at(self, scale: float) -> Array:
        """Return the losses of sequences at a measured strength."""
        row: Array = self.nll[self.scales.index(scale)]
        return row

    def mean(self, scale: float) -> float:
        """Return the mean loss at a measured strength."""
        return float(self.at(scale).sum()) / sum(self.counts)

    def compare(self, losses: Any, others: Any = 0.0, comparisons: int = 1) -> tuple[float, float]:
        """Return the difference of two losses, or the mean of one, and half its 95% interval.

        The interval is that of one of several comparisons (Bonferroni), and infinite for one
        sequence.
        """
        gap, error = stats.paired_difference(losses, others, self.counts)
        half = stats.paired_half(error, len(self.counts), comparisons)
        return gap, math.inf if half is None else half

    def is_lower(self, losses: Array, others: Array) -> bool:
        """Return whether a loss is significantly lower, as one of the comparisons of all strengths
        with one.
        """
        gap, half = self.compare(losses, others, max(1, len(self.scales) - 1))
        return gap < -half


def fit_parabola(curve: Curve, grid: Sequence[float]) -> dict[str, Any]:
    """Return the fields of ``StrengthChoice`` on the parabola through the best strength of the grid
    and its neighbours.

    The loss measured at its optimum, if it was, checks it.
    """
    best = min(grid, key=curve.mean)
    if len(grid) < LEAST or best in {grid[0], grid[-1]}:
        return {"fit": "few" if len(grid) < LEAST else "edge"}
    window = grid[grid.index(best) - 1 : grid.index(best) + 2]
    losses = [curve.mean(scale) for scale in window]
    coefficients = np.linalg.inv(np.vander(window, increasing=True)) @ [
        curve.at(scale) for scale in window
    ]
    _, slope, quadratic = coefficients
    optimum = -float(slope.sum() / quadratic.sum()) / 2

    def has_slope(scale: float) -> bool:
        mean, half = curve.compare(slope + 2 * scale * quadratic)
        return abs(mean) > half

    low, high = (_search(optimum, optimum + side, has_slope) for side in (-REACH, REACH))
    fields: dict[str, Any] = {}
    if (checked := round(optimum, 2)) in curve.scales:
        parabola = np.array([1.0, checked, checked**2]) @ coefficients
        gap, half = curve.compare(curve.at(checked), parabola)
        fields = {"checked": checked, "checked_gap": gap}
        if abs(gap) > max(half, MAX_MISFIT * (max(losses) - min(losses))):
            return {"fit": "poor", **fields}
    if low is None or high is None:
        return {"fit": "flat"}
    return {
        **fields,
        "fit": "quadratic",
        "optimum": optimum,
        "optimum_low": low,
        "optimum_high": high,
    }


def _search(start: float, stop: float, holds: Callable[[float], bool]) -> float | None:
    """Return the first of ``STEPS`` steps from one strength to another at which a condition holds;
    None without one.
    """
    return next(
        (scale for scale in np.linspace(start, stop, STEPS + 1).tolist() if holds(scale)), None
    )


def choose(curve: Curve, grid: Sequence[float]) -> dict[str, Any]:
    """Return the fields of ``StrengthChoice`` from the losses on a set.

    Args:
        curve: Losses at all measured strengths.
        grid: The strengths of the run, ascending, without those measured to check what was computed
            from them.
    """
    best = min(curve.scales, key=curve.mean)
    better = [
        scale
        for scale in curve.scales
        if scale != 1 and curve.is_lower(curve.at(scale), curve.at(1.0))
    ]
    chosen = min(better, key=curve.mean, default=1.0)
    base, target = curve.at(0.0), curve.at(chosen)
    gap, gap_error = stats.paired_difference(
        curve.at(best).tolist(), curve.at(1.0).tolist(), curve.counts
    )
    gain, gain_error = stats.paired_difference(base.tolist(), target.tolist(), curve.counts)
    fields = {"best": best, "best_gap": gap, "best_gap_error": gap_error, "recommended": chosen}
    fields |= {"gain": gain, "gain_error": gain_error, **fit_parabola(curve, grid)}
    if len(curve.scales) < LEAST:
        return fields
    losses = CubicSpline(curve.scales, curve.nll)
    ends = curve.scales[0], curve.scales[-1]
    worse = [
        _search(best, end, lambda scale: curve.is_lower(curve.at(best), losses(scale)))
        for end in ends
    ]
    fields |= {
        name: w if w is not None else end
        for name, w, end in zip(("low", "high"), worse, ends, strict=True)
    }
    if chosen == 0 or not curve.is_lower(target, base):
        return fields

    def surplus(scale: float) -> tuple[float, float]:
        return curve.compare(
            (1 - SUFFICIENT_SHARE) * base + SUFFICIENT_SHARE * target, losses(scale)
        )

    fields["sufficient"] = _search(0.0, chosen, lambda scale: surplus(scale)[0] >= 0)
    fields["sufficient_low"] = _search(0.0, chosen, lambda scale: sum(surplus(scale)) >= 0)
    fields["sufficient_high"] = _search(0.0, chosen, lambda scale: operator.ge(*surplus(scale)))
    return fields
