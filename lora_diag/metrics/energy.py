"""Energy curves C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖_F², and numbers read from singular values.

These are the ranks at which a curve reaches a threshold, the stable and the effective rank, the
Eckart–Young errors of the best rank-r approximation, a bound on single values, the ranks at which a
figure draws a curve, and two truncation points: the knee of the curve, and the Gavish–Donoho hard
threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Default ranks of C(r), and the fractions of energy whose rank is given.
RANKS = (4, 8, 16, 32, 64)
THRESHOLDS = (0.9, 0.95, 0.99)


def energy_curve(
    s: NDArray[np.float64], fro: float | NDArray[np.float64], complete: bool
) -> NDArray[np.float64]:
    """Return C(1), …, C(K) for the K largest singular values.

    Args:
        s: Singular values, descending, ``(K,)``; or of several matrices, ``(…, K)``.
        fro: ‖ΔW‖_F > 0, computed independently of ``s``, so that fractions of an incomplete
            spectrum are exact; of several matrices ``(…, 1)``.
        complete: True if ``s`` holds every singular value; C then ends at exactly 1.

    Returns:
        As ``s``, non-decreasing, in [0, 1].

    Example:
        >>> energy_curve(np.array([2.0, 1.0, 1.0]), np.sqrt(6.0), complete=True).round(3).tolist()
        [0.667, 0.833, 1.0]
    """
    curve: NDArray[np.float64] = np.minimum(np.cumsum(np.square(s / fro), axis=-1), 1.0)
    if complete:
        curve[..., -1] = 1.0
    return curve


def rank_at(curve: NDArray[np.float64], threshold: float) -> int | None:
    """Return the smallest r with C(r) ≥ threshold; None if the curve ends below it.

    Example:
        >>> rank_at(np.array([0.6, 0.9, 1.0]), 0.9), rank_at(np.array([0.6, 0.8]), 0.9)
        (2, None)
    """
    reached = int(np.searchsorted(curve, threshold, side="left"))
    return reached + 1 if reached < len(curve) else None


def ranks_at(curves: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """Return the smallest r with C(r) ≥ threshold of several curves that end at 1, ``(…, K)``.

    Example:
        >>> ranks_at(np.array([[0.6, 0.9, 1.0], [0.2, 0.3, 1.0]]), 0.9).tolist()
        [2, 3]
    """
    return np.asarray((curves < threshold).sum(axis=-1) + 1, np.int64)


def stable_rank(s: NDArray[np.float64], fro: float) -> float:
    """Return ‖A‖_F² / σ_1², between 1 and rank(A).

    Args:
        s: Singular values, descending; only the first is used, and it is positive.
        fro: ‖A‖_F.

    Reference: Rudelson and Vershynin 2007, "Sampling from large matrices", section 1.

    Example:
        >>> stable_rank(np.array([1.0, 1.0]), np.sqrt(2.0)).__round__(6)
        2.0
    """
    return max(1.0, float((fro / s[0]) ** 2))


def effective_rank(s: NDArray[np.float64]) -> float:
    """Return exp(−Σ p_i ln p_i) with p_i = σ_i² / Σσ²: the number of equal directions with the same
    entropy of energy.

    Roy and Vetterli 2007 ("The effective rank") define it on p_i = σ_i/Σσ; here p is the energy, as
    in the rest of the package.

    Args:
        s: All singular values; the largest is positive.

    Example:
        >>> effective_rank(np.array([1.0, 1.0, 0.0])).__round__(6)
        2.0
    """
    energy = np.square(s / s[0])
    p = energy[energy > 0] / energy.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def truncation_error(
    s: NDArray[np.float64], fro: float, rank: int, complete: bool
) -> tuple[float, float | None] | None:
    """Return ‖A − A_r‖_F = √Σ_{i>r}σ_i² and ‖A − A_r‖_2 = σ_{r+1} for the best approximation of
    rank r.

    Args:
        s: The K largest singular values, descending.
        fro: ‖A‖_F.
        rank: r ≥ 0.
        complete: True if ``s`` holds every singular value. The Frobenius error is then summed from
            its small end, free of cancellation; else it is √(‖A‖_F² − Σ_{i≤r}σ_i²).

    Returns:
        Both errors; the spectral one is None if σ_{r+1} was not computed; None for both if ``s`` is
            incomplete and r >
        K. Both are 0 if ``s`` is complete and r ≥ K.

    Reference: Eckart and Young 1936; Mirsky 1960, theorem 2 (any unitarily invariant norm).

    Example:
        >>> truncation_error(np.array([3.0, 2.0, 1.0]), math.sqrt(14), 2, complete=True)
        (1.0, 1.0)
    """
    if complete:
        tail = s[rank:]
        return math.hypot(*tail[::-1].tolist()), float(tail[0]) if len(tail) else 0.0
    if rank > len(s):
        return None
    kept = math.hypot(*s[:rank].tolist())
    tail_fro = math.sqrt(max(0.0, fro - kept)) * math.sqrt(fro + kept)
    return tail_fro, float(s[rank]) if rank < len(s) else None


def spectral_error(value: float, fro: float, energy_error: float) -> float:
    """Return a bound on |σ̂_i − σ_i| of one singular value.

    σ_i² is the difference of two partial sums of energy, each of which is off by at most
    energy_error·‖A‖_F², so
    |σ̂_i² − σ_i²| ≤ 2·energy_error·‖A‖_F².

    Args:
        value: σ̂_i.
        fro: ‖A‖_F.
        energy_error: Bound on the error of every energy fraction up to the i-th.

    Example:
        >>> (
        ...     spectral_error(1.0, 1.0, 0.0),
        ...     round(spectral_error(1.0, 1.0, 0.18), 12),
        ...     spectral_error(0.0, 1.0, 0.5),
        ... )
        (0.0, 0.2, 1.0)
    """
    if fro == 0.0:
        return 0.0
    share = value / fro  # the squares of values above 1e154 overflow
    below = share - math.sqrt(max(0.0, share**2 - 2 * energy_error))
    above = math.sqrt(share**2 + 2 * energy_error) - share
    return fro * max(below, above)


def thinned_ranks(values: int, points: int) -> list[int]:
    """Return the ranks to draw: all if they fit, else half of the points without gaps and the other
    half log-spaced.

    Args:
        values: K, the number of singular values.
        points: Maximum number of points, at least 2.

    Returns:
        Ascending ranks from 1 to K, no more than ``points``.

    Example:
        >>> thinned_ranks(4, 8), thinned_ranks(4096, 8)
        ([1, 2, 3, 4], [1, 2, 3, 4, 23, 128, 724, 4096])
    """
    if values <= points:
        return list(range(1, values + 1))
    first = points // 2
    spaced = np.geomspace(first, values, points - first + 1)[1:]
    return sorted({*range(1, first + 1), *(int(rank) for rank in np.rint(spaced))})


def curve_at(s: Sequence[float], fro: float, complete: bool, ranks: Sequence[int]) -> list[float]:
    """Return C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖_F² at given ranks.

    Args:
        s: Singular values, descending, ``(K,)``.
        fro: ‖ΔW‖_F > 0.
        complete: True if ``s`` holds every singular value.
        ranks: From 1 to K.

    Example:
        >>> [round(share, 3) for share in curve_at([2.0, 1.0, 1.0], 6**0.5, True, [1, 3])]
        [0.667, 1.0]
    """
    curve = energy_curve(np.asarray(s, dtype=np.float64), fro, complete)
    return [float(curve[rank - 1]) for rank in ranks]


def knee(curve: NDArray[np.float64]) -> int:
    """Return the rank at which C(r) rises highest above its chord: argmax C(r) − r/K · C(K), r = 0,
    …, K.

    Args:
        curve: C(1), …, C(K) of a complete spectrum, ``(K,)``.

    Returns:
        A rank from 0 to K − 1; 0 if the curve is its own chord (all values equal).

    Reference: Satopää et al. 2011, "Finding a 'Kneedle' in a Haystack", section III (without
    smoothing).

    Example:
        >>> knee(np.array([0.6, 0.9, 0.95, 1.0]))
        2
    """
    curve_from_zero = np.concatenate([[0.0], curve])
    # Rounding of an all-equal spectrum must not be taken for a knee.
    above = (curve_from_zero - np.linspace(0.0, curve_from_zero[-1], len(curve_from_zero))).round(
        12
    )
    return int(np.argmax(above))


def gavish_donoho(s: NDArray[np.float64], shape: tuple[int, int]) -> int:
    """Return the number of singular values above τ = ω(β)·median(s), the threshold for unknown
    noise.

    ω(β) = λ(β)/√μ_β, with λ(β)² = 2(β+1) + 8β/((β+1) + √(β²+14β+1)) and μ_β the median of the
    Marchenko–Pastur law. It assumes white noise and a low-rank signal; if most values are signal,
    the median is no noise level.

    Args:
        s: All min(out, in) singular values, descending.
        shape: ``(out, in)``; β is the smaller over the larger.

    Reference: Gavish and Donoho 2014, "The optimal hard threshold for singular values is 4/√3",
    equations 11 and 5.

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
    """Return the median of the Marchenko–Pastur law of ratio β, whose support is [(1 − √β)², (1 +
    √β)²].

    Substituting x = 1 + β − 2√β·cos θ makes the integrand smooth at both ends:
    dx √((x₊−x)(x−x₋)) / (2πβx) = 4β sin²θ dθ / (2πβx).
    """
    from scipy.integrate import quad  # 0.1 s, and rarely needed
    from scipy.optimize import brentq

    def below(angle: float) -> float:
        # 1 + β − 2√β·cos t, without cancellation; quad of SciPy 1.11 evaluates t = 0 if the
        # interval is empty.
        smallest, grows = (1 - math.sqrt(beta)) ** 2, 4 * math.sqrt(beta)
        mass, _ = quad(
            lambda t: 2 * math.sin(t) ** 2 / (math.pi * (smallest + grows * math.sin(t / 2) ** 2)),
            0,
            angle,
        )
        return float(mass) - 0.5

    angle = float(brentq(below, 1e-3, math.pi))
    return 1 + beta - 2 * math.sqrt(beta) * math.cos(angle)
