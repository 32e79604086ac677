"""Truncation points of a spectrum: the knee of its energy curve, and the Gavish–Donoho hard threshold."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import brentq


def knee(curve: NDArray[np.float64]) -> int:
    """Return the rank at which C(r) rises highest above its chord: argmax C(r) − r/K · C(K), r = 0, …, K.

    Args:
        curve: C(1), …, C(K) of a complete spectrum, ``(K,)``.

    Returns:
        A rank from 0 to K − 1; 0 if the curve is its own chord (all values equal).

    Reference: Satopää et al. 2011, "Finding a 'Kneedle' in a Haystack", section III (without smoothing).

    Example:
        >>> knee(np.array([0.6, 0.9, 0.95, 1.0]))
        2
    """
    curve_from_zero = np.concatenate([[0.0], curve])
    # Rounding of an all-equal spectrum must not be taken for a knee.
    above = (curve_from_zero - np.linspace(0.0, curve_from_zero[-1], len(curve_from_zero))).round(12)
    return int(np.argmax(above))


def gavish_donoho(s: NDArray[np.float64], shape: tuple[int, int]) -> int:
    """Return the number of singular values above τ = ω(β)·median(s), the threshold for unknown noise.

    ω(β) = λ(β)/√μ_β, with λ(β)² = 2(β+1) + 8β/((β+1) + √(β²+14β+1)) and μ_β the median of the Marchenko–Pastur law. It
    assumes white noise and a low-rank signal; if most values are signal, the median is no noise level.

    Args:
        s: All min(out, in) singular values, descending.
        shape: ``(out, in)``; β is the smaller over the larger.

    Reference: Gavish and Donoho 2014, "The optimal hard threshold for singular values is 4/√3", equations 11 and 5.

    Example:
        >>> gavish_donoho(np.array([50.0, 1.1, 1.0, 0.9]), (4, 4))
        1
    """
    beta = min(shape) / max(shape)
    return int((s > hard_threshold(beta) * float(np.median(s))).sum())


@lru_cache(maxsize=256)
def hard_threshold(beta: float) -> float:
    """Return ω(β), β in (0, 1].

    Example:
        >>> round(hard_threshold(1.0), 3)
        2.858
    """
    root = math.sqrt(beta * beta + 14 * beta + 1)
    return math.sqrt((2 * (beta + 1) + 8 * beta / (beta + 1 + root)) / _median(beta))


def _median(beta: float) -> float:
    """Return the median of the Marchenko–Pastur law of ratio β, whose support is [(1 − √β)², (1 + √β)²].

    Substituting x = 1 + β − 2√β·cos θ makes the integrand smooth at both ends:
    dx √((x₊−x)(x−x₋)) / (2πβx) = 4β sin²θ dθ / (2πβx).
    """

    def below(angle: float) -> float:
        # 1 + β − 2√β·cos t, without cancellation; quad of SciPy 1.11 evaluates t = 0 if the interval is empty.
        smallest, grows = (1 - math.sqrt(beta)) ** 2, 4 * math.sqrt(beta)
        mass, _ = quad(lambda t: 2 * math.sin(t) ** 2 / (math.pi * (smallest + grows * math.sin(t / 2) ** 2)), 0, angle)
        return float(mass) - 0.5

    angle = float(brentq(below, 1e-3, math.pi))
    return 1 + beta - 2 * math.sqrt(beta) * math.cos(angle)
