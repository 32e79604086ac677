"""The loss over the strength t: the best t, the range that is not worse, the smallest sufficient t, and a parabola.

Everything is linear in the losses of sequences, so that every statement has the paired error of
``metrics.statistics.paired_difference``: a parabola through mean losses has the mean of the parabolas through the
losses of each sequence. The interval of its minimum −b/2c is Fieller's: all t at which the slope b + 2ct does not
differ significantly from 0. It needs no expansion around the estimate and is unbounded where c might be 0.

References: Fieller 1954, "Some problems in interval estimation", JRSS B 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from lora_diag.metrics import statistics as stats

Array = NDArray[np.float64]

# Fraction of the gain from which a strength is sufficient.
SUFFICIENT_SHARE = 0.9
# Strengths of a parabola: two on both sides of the best, with two degrees of freedom for its check.
WINDOW = 5
# A parabola is poor if it misses a loss significantly, and by more than this fraction of the range of its losses.
MAX_MISFIT = 0.1
# Number of steps in which the smallest sufficient strength is searched.
STEPS = 400

Fitted = Literal["quadratic", "poor", "flat", "edge", "few"]


@dataclass(frozen=True)
class Curve:
    """Losses of sequences at several strengths.

    Args:
        scales: Strengths t, ascending.
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

    @cached_property
    def means(self) -> list[float]:
        """Mean losses."""
        return [float(row.sum()) / sum(self.counts) for row in self.nll]

    def difference(self, first: Any, second: Any = 0.0) -> tuple[float, float | None]:
        """Return the difference of two losses, or the mean of one, with its standard error."""
        return stats.paired_difference(first, second, self.counts)

    def half(self, error: float | None, comparisons: int = 1) -> float:
        """Return half the 95% interval of one of several comparisons (Bonferroni); infinite without an error."""
        if error is None:
            return math.inf
        freedom = stats.degrees_of_freedom(len(self.counts))
        return stats.Estimate(0.0, error, freedom).half(1 - 0.05 / 2 / comparisons)

    def is_lower(self, first: Array, second: Array) -> bool:
        """Return whether the first loss is significantly lower, as one of the comparisons of all strengths with one."""
        gap, error = self.difference(first, second)
        return gap < -self.half(error, max(1, len(self.scales) - 1))


@dataclass(frozen=True)
class Parabola:
    """A parabola a + bt + ct² through the losses of the strengths around the best.

    Args:
        outcome: As ``StrengthChoice.fit``, before the check by a run.
        coefficients: a, b and c of each sequence, ``(3, sequences)``; None without a fit.
        limit: Misfit in nats from which it is poor.
        optimum: Its minimum; None unless ``quadratic``.
        low: Lower end of the interval of ``optimum``.
        high: Upper end.
    """

    outcome: Fitted
    coefficients: Array | None = None
    limit: float = 0.0
    optimum: float | None = None
    low: float | None = None
    high: float | None = None

    def at(self, scale: float) -> Array:
        """Return the losses of sequences on the parabola."""
        assert self.coefficients is not None
        return np.array([1.0, scale, scale**2]) @ self.coefficients

    def misses(self, curve: Curve, scale: float) -> bool:
        """Return whether the parabola misses a measured loss, significantly and by more than ``limit``."""
        gap, error = curve.difference(curve.at(scale), self.at(scale))
        return abs(gap) > max(self.limit, curve.half(error, WINDOW))


def fit_parabola(curve: Curve) -> Parabola:
    """Return the parabola fitted by least squares to the ``WINDOW`` strengths around the best."""
    best = int(np.argmin(curve.means))
    if len(curve.scales) < WINDOW:
        return Parabola("few")
    if best in {0, len(curve.scales) - 1}:
        return Parabola("edge")
    first = min(max(0, best - WINDOW // 2), len(curve.scales) - WINDOW)
    chosen = slice(first, first + WINDOW)
    scales = curve.scales[chosen]
    coefficients = np.linalg.pinv(np.vander(scales, 3, increasing=True)) @ curve.nll[chosen]
    limit = MAX_MISFIT * (max(curve.means[chosen]) - min(curve.means[chosen]))
    parabola = Parabola("poor", coefficients, limit)
    if any(parabola.misses(curve, scale) for scale in scales):
        return parabola
    b, c = (float(row.sum()) for row in coefficients[1:])
    interval = _find_zero_interval(curve, coefficients[1], 2 * coefficients[2]) if c > 0 else None
    if interval is None:
        return Parabola("flat", coefficients, limit)
    return Parabola("quadratic", coefficients, limit, -b / (2 * c), *interval)


def _find_zero_interval(curve: Curve, slope: Array, curvature: Array) -> tuple[float, float] | None:
    """Return Fieller's interval of the t at which the mean of ``slope + t·curvature`` is 0; None if unbounded.

    It is where q(t) = mean² − half² ≤ 0, a parabola in t that three of its values determine.
    """
    middle = -float(slope.sum() / curvature.sum())

    def q(scale: float) -> float:
        mean, error = curve.difference(slope + scale * curvature)
        return mean**2 - curve.half(error) ** 2

    below, at, above = q(middle - 1), q(middle), q(middle + 1)
    leading, linear = (below + above) / 2 - at, (above - below) / 2
    if not (math.isfinite(leading) and leading > 0):
        return None
    root = math.sqrt(max(0.0, linear**2 - 4 * leading * at))
    return middle + (-linear - root) / (2 * leading), middle + (-linear + root) / (2 * leading)


def recommend(curve: Curve) -> float:
    """Return 1, unless a measured strength is significantly better; then the best of those."""
    tuned = curve.at(1.0)
    better = [scale for scale in curve.scales if scale != 1 and curve.is_lower(curve.at(scale), tuned)]
    return min(better, key=lambda scale: curve.means[curve.scales.index(scale)], default=1.0)


def interpolate(curve: Curve) -> Callable[[float], Array]:
    """Return a function for the losses of sequences at any strength: a cubic spline through the measured ones."""
    return CubicSpline(curve.scales, curve.nll) if len(curve.scales) >= WINDOW else curve.at


def find_range(curve: Curve) -> tuple[float, float]:
    """Return the ends of the strengths around the best that are not significantly worse than it.

    Between measured strengths losses are those of ``interpolate``.
    """
    losses, best = interpolate(curve), int(np.argmin(curve.means))
    found = []
    for end in (0, -1):
        steps = np.linspace(curve.scales[best], curve.scales[end], STEPS // 2 + 1).tolist()
        if len(curve.scales) < WINDOW:
            steps = [*curve.scales[best:]] if end else [*curve.scales[best::-1]]
        worse = next((i for i, t in enumerate(steps) if curve.is_lower(curve.nll[best], losses(t))), len(steps))
        found.append(steps[max(0, worse - 1)])
    return found[0], found[1]


def find_sufficient(curve: Curve, chosen: float) -> tuple[float, float, float | None] | None:
    """Return the smallest strength that keeps ``SUFFICIENT_SHARE`` of the gain at ``chosen``, and its interval.

    Between measured strengths losses are those of ``interpolate``.

    Returns:
        The strength; the smallest at which it is not excluded; the smallest at which it is significant, or None. None
        for too few strengths or if the gain is not significant.
    """
    base, target = curve.at(0.0), curve.at(chosen)
    if len(curve.scales) < WINDOW or chosen == 0 or not curve.is_lower(target, base):
        return None
    limit = (1 - SUFFICIENT_SHARE) * base + SUFFICIENT_SHARE * target
    losses = interpolate(curve)
    found: list[float | None] = [None, None, None]
    for scale in np.linspace(0.0, chosen, STEPS + 1):
        gap, error = curve.difference(limit, losses(scale))
        half = curve.half(error)
        for place, is_reached in enumerate((gap >= 0, gap + half >= 0, gap - half >= 0)):
            if found[place] is None and is_reached:
                found[place] = float(scale)
    value, low, high = found
    return (chosen if value is None else value), (chosen if low is None else low), high


def choose(curve: Curve, grid: Sequence[float]) -> dict[str, Any]:
    """Return the fields of ``StrengthChoice`` from the losses on a set.

    Args:
        curve: Losses at all measured strengths, with 0 and 1.
        grid: The strengths of the run, without those measured to check the parabola.
    """
    chosen, best = recommend(curve), curve.scales[int(np.argmin(curve.means))]
    best_gap, best_error = curve.difference(curve.at(best), curve.at(1.0))
    gain, gain_error = curve.difference(curve.at(0.0), curve.at(chosen))
    fields: dict[str, Any] = dict(zip(("low", "high"), find_range(curve), strict=True))
    fields |= {"recommended": chosen, "best": best, "best_gap": best_gap, "best_gap_error": best_error}
    fields |= {"gain": gain, "gain_error": gain_error}
    if (sufficient := find_sufficient(curve, chosen)) is not None:
        fields |= dict(zip(("sufficient", "sufficient_low", "sufficient_high"), sufficient, strict=True))
    parabola = fit_parabola(select(curve, grid))
    fields["fit"] = parabola.outcome
    if parabola.optimum is None or (checked := round(parabola.optimum, 2)) not in curve.scales:
        return fields
    fields |= dict(
        zip(("checked_gap", "checked_error"), curve.difference(curve.at(checked), parabola.at(checked)), strict=True)
    )
    fields["checked"] = checked
    if parabola.misses(curve, checked):
        return {**fields, "fit": "poor"}
    return fields | {"optimum": parabola.optimum, "optimum_low": parabola.low, "optimum_high": parabola.high}


def select(curve: Curve, scales: Sequence[float]) -> Curve:
    """Return the curve with some of its strengths."""
    chosen = [scale in scales for scale in curve.scales]
    return Curve(tuple(np.compress(chosen, curve.scales).tolist()), curve.nll[chosen], curve.counts)


def propose(curve: Curve) -> list[float]:
    """Return the strengths whose losses check what was computed between those measured.

    They are the optimum of the parabola and the smallest sufficient strength, to two decimals.
    """
    optimum, sufficient = fit_parabola(curve).optimum, find_sufficient(curve, recommend(curve))
    found = [] if optimum is None else [round(optimum, 2)]
    return found + ([] if sufficient is None else [math.ceil(sufficient[0] * 100 - 1e-9) / 100])
