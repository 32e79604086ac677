"""Angles and overlaps of subspaces and distances of updates, with the random baselines that they
are compared with.

The baselines are those of the principal angles between two subspaces, of a gradient's or an
update's overlap with a subspace, of singular task interference, and of the similarity of singular
vectors. Distances of an update X from another, D, follow from their norms, their inner product and
D's spectrum (``compute_distances``, ``split_epsilon``).

New directions of a fine-tuned weight are defined by ``classify_direction``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Nodes of the trapezoidal rule; the integrand is smooth and periodic, so the error is far below the
# resolution of a figure.
_NODES = 1025


def random_angles(
    cosines: ArrayLike, first: int, second: int, dimension: int
) -> NDArray[np.float64]:
    """Return the fraction of the principal angles between two random subspaces with at most these
    cosines.

    The law for large spaces. With a = p/m ≤ b = q/m, the squared cosines λ have the density √((λ₊ −
    λ)(λ − λ₋)) / (2πa·λ(1 − λ)) between λ± = (√(a(1 − b)) ± √(b(1 − a)))², and if p + q > m a
    fraction (a + b − 1)/a of them is 1. For p = q = 8 and m = 128 it is within 0.05 of random
    subspaces.

    Args:
        cosines: Cosines in [0, 1].
        first: Dimension of the one subspace.
        second: Dimension of the other.
        dimension: m, the dimension of the whole space.

    Reference: Wachter 1980, "The limiting empirical measure of multiple discriminant ratios", Ann.
    Statist. 8, 937–957.

    Example:
        >>> random_angles([0.1, 0.3, 0.5], 8, 8, 128).round(2).tolist()
        [0.25, 0.71, 1.0]
    """
    squares = np.square(np.asarray(cosines, dtype=np.float64))
    a, b = min(first, second) / dimension, max(first, second) / dimension
    if b >= 1:
        return np.where(squares >= 1, 1.0, 0.0)
    middle, half = np.sqrt(a * (1 - b)), np.sqrt(b * (1 - a))
    low, high = (middle - half) ** 2, min(1.0, (middle + half) ** 2)
    # λ = λ₋ + (λ₊ − λ₋)sin²φ removes both roots from the integral, and the pole at 0 or 1 if an
    # edge reaches it.
    phi = np.linspace(0.0, np.pi / 2, _NODES)
    inside = phi[1:-1]
    values = low + (high - low) * np.sin(inside) ** 2
    density = (
        (high - low) ** 2
        * (np.sin(inside) * np.cos(inside)) ** 2
        / (np.pi * a * values * (1 - values))
    )
    # At the ends the integrand is zero, except for an edge at 0 or 1, where its limit is the
    # neighbouring value.
    whole = np.concatenate(
        [density[:1] * (low < 1e-12), density, density[-1:] * (high > 1 - 1e-12)]
    )
    steps = (whole[1:] + whole[:-1]) / 2 * (phi[1] - phi[0])
    shares = np.concatenate([[0.0], np.cumsum(steps)])
    # Correct the known total mass for rounding.
    shares *= (1 - max(0.0, (a + b - 1) / a)) / shares[-1]
    quantiles = np.arcsin(np.sqrt(np.clip((squares - low) / (high - low), 0.0, 1.0)))
    return np.where(squares >= 1, 1.0, np.interp(quantiles, phi, shares))


# An overlap below this multiple of its baseline is near it. Random subspaces of 512² exceed it for
# a gradient of rank one, the most variable case, in 2.6% of 20,000 draws at r = 4, 0.6% at 8, 0.05%
# at 16, never at 64. For full-rank gradients they did not in 2,000 draws at any of these ranks.
NEAR_RANDOM = 2.0

# Ratio of κ over a run from which its change is called a trend.
TREND_RATIO = 0.8


class Chance(NamedTuple):
    """Root mean squares of the overlaps over random subspaces of one rank."""

    kappa: float
    tangent: float
    left: float
    right: float


def overlap_by_chance(shape: tuple[int, int], rank: int) -> Chance:
    """Return the overlaps of random subspaces of rank r with any G.

    E‖UᵀG‖² = (r/m)‖G‖², E‖GV‖² = (r/n)‖G‖² and, U and V being independent, E‖UᵀGV‖² = (r²/mn)‖G‖².

    Args:
        shape: ``(m, n)``.
        rank: r ≤ min(m, n).

    Returns:
        κ r/√(mn), tangent √(r/m + r/n − r²/(mn)), left √(r/m) and right √(r/n).

    Example:
        >>> [round(value, 3) for value in overlap_by_chance((512, 512), 16)]
        [0.031, 0.248, 0.177, 0.177]
    """
    left, right = rank / shape[0], rank / shape[1]
    return Chance(
        math.sqrt(left * right),
        math.sqrt(left + right - left * right),
        math.sqrt(left),
        math.sqrt(right),
    )


def is_near(overlap: float, random: float) -> bool:
    """Return whether an overlap is near its baseline: below twice the baseline, or below halfway to
    1 if that is less.

    >>> is_near(0.05, 0.031), is_near(0.07, 0.031), is_near(0.7, 0.5), is_near(0.8, 0.5)
    (True, False, True, False)
    """
    return overlap < min(NEAR_RANDOM * random, (1 + random) / 2)


# Cosines below this are small, significant or not: less than 1% of the energy of one update is
# along the other.
SMALL = 0.1

# Number of standard deviations above the mean of random directions from which an overlap or a
# cosine is significant.
SIGMAS = 3.0


def is_near_chance(share: float, columns: int, dimension: int, effective_rank: float) -> bool:
    """Return whether the fraction of an update's energy in a k-dimensional space is near that in a
    random space.

    For a random space it is on average k/m. An update of effective rank e is like e independent
    directions, each with a fraction of variance ≈ 2k/m², so the standard deviation is about
    √(2k/e)/m. Near is less than three of them above the mean, or below twice the mean if that is
    more, or below halfway from the mean to 1 if that is less.

    Args:
        share: ‖UᵀΔW‖² / ‖ΔW‖².
        columns: k, columns of U.
        dimension: m, its rows.
        effective_rank: e of ΔW.

    Example:
        >>> is_near_chance(0.05, 8, 256, 4.0), is_near_chance(0.2, 8, 256, 4.0)
        (True, False)
    """
    mean = columns / dimension
    spread = SIGMAS * math.sqrt(2 * columns / max(1.0, effective_rank)) / dimension
    return share < min(mean + max(mean, spread), (1 + mean) / 2)


def classify_relation(
    near: bool, cosine: float, cosine_random: float
) -> Literal["apart", "share", "reinforce", "cancel"]:
    """Return the relation of two updates.

    ``reinforce`` or ``cancel``, by the sign of the cosine, if |cosine| ≥ max(0.1,
    3·``cosine_random``), whatever the overlap; else ``apart`` if ``near``, else ``share``.

    Args:
        near: Whether neither overlaps the other's spaces more than a random update.
        cosine: Cosine of the updates.
        cosine_random: Its root mean square for random directions.

    Example:
        >>> [
        ...     classify_relation(near, cosine, 0.01)
        ...     for near, cosine in ((True, 0.0), (False, 0.02), (False, -0.4))
        ... ]
        ['apart', 'share', 'cancel']
    """
    if abs(cosine) >= max(SMALL, SIGMAS * cosine_random):
        return "reinforce" if cosine > 0 else "cancel"
    return "apart" if near else "share"


def task_interference(
    columns: NDArray[np.float64], rows: NDArray[np.float64], s: NDArray[np.float64]
) -> tuple[float, float]:
    """Return singular task interference STI = ‖(UᵀU − I) Σ (VᵀV − I)‖_1, and its ratio to Σσ.

    U = [U_1 … U_K] and V are the singular vectors of all updates side by side, Σ their singular
    values. The paper does not define ‖·‖_1; here it is the sum of the magnitudes of the entries.
    Between two equal updates it is Σσ, between K equal ones (K − 1)²·Σσ.

    Args:
        columns: UᵀU, ``(R, R)``.
        rows: VᵀV.
        s: The R singular values.

    Reference: Gargiulo et al. 2025, "Task Singular Vectors", arXiv 2412.00081, equation 6.

    Example:
        >>> both = np.array([[1.0, 1.0], [1.0, 1.0]])  # one direction, twice
        >>> task_interference(both, both, np.array([2.0, 2.0]))
        (4.0, 1.0)
    """
    eye = np.eye(len(s))
    total = float(np.abs((columns - eye) * s @ (rows - eye)).sum())
    return total, total / float(s.sum())


def task_interference_at_random(
    s: NDArray[np.float64], owner: NDArray[np.int64], shape: tuple[int, int]
) -> float:
    """Estimate STI/Σσ for updates with random directions.

    Entry (i, j) of (UᵀU − I)Σ(VᵀV − I) is Σ_l σ_l⟨u_i, u_l⟩⟨v_l, v_j⟩ over the l that belong to
    other updates than i and j do. For random directions it has variance Σσ_l²/(mn), and, assumed
    normal, a mean magnitude of √(2/π) times its root.

    Args:
        s: Singular values of all updates.
        owner: Index of the update of each.
        shape: ``(m, n)``.

    Example:
        >>> round(task_interference_at_random(np.ones(2), np.array([0, 1]), (100, 100)), 5)
        0.00798
    """
    energies = np.bincount(owner, weights=s**2)
    counts = np.bincount(owner)
    k = len(energies)
    others = energies.sum() - energies[:, None] - energies[None, :] + np.diag(energies)
    sums = np.sqrt(np.maximum(others, 0.0)) * counts[:, None] * counts[None, :]
    assert sums.shape == (k, k)
    return float(math.sqrt(2 / math.pi / (shape[0] * shape[1])) * sums.sum() / s.sum())


# Distance below which the adapter equals D: a float16 copy of an update is at 3e-4.
EXACT = 1e-3


@dataclass(frozen=True, slots=True)
class Distances:
    """Distances of two updates. A field is None if it is undefined or not known.

    Args:
        epsilon: ε = ‖D − X‖ / ‖D‖.
        epsilon_min: The smallest ε of X's rank, or a lower bound on it.
        excess: ε² − ε_min².
        norm_ratio: ‖X‖ / ‖D‖.
        cosine: ⟨D, X⟩ / (‖D‖‖X‖).
        best_scale: ⟨D, X⟩ / ‖X‖².
        epsilon_best_scale: ‖D − best_scale·X‖ / ‖D‖.
    """

    epsilon: float | None = None
    epsilon_min: float | None = None
    excess: float | None = None
    norm_ratio: float | None = None
    cosine: float | None = None
    best_scale: float | None = None
    epsilon_best_scale: float | None = None


def compute_distances(
    fro: float, other: float, gap: float, inner: float, epsilon_min: float | None
) -> Distances:
    """Return the distances of X from D.

    ε is computed from ‖D − X‖ directly: ‖D‖² − 2⟨D, X⟩ + ‖X‖² would lose an ε below 1e-8 to
    cancellation. Likewise ‖D − cX‖² = ‖D − X‖² − (1 − c)²‖X‖² at the minimiser c = ⟨D, X⟩/‖X‖²,
    where 1 − c is small if ε is.

    Args:
        fro: ‖D‖.
        other: ‖X‖.
        gap: ‖D − X‖.
        inner: ⟨D, X⟩.
        epsilon_min: √(1 − C(r)) for X's rank, or a lower bound on it; None if X has no rank, or it
            is not known.

    Returns:
        The distances; all None for D = 0; ``cosine``, ``best_scale`` and ``epsilon_best_scale``
            None for X = 0.

    Example:
        >>> found = compute_distances(
        ...     fro=2.0, other=1.0, gap=1.0, inner=2.0, epsilon_min=0.0
        ... )  # X = D/2
        >>> found.epsilon, found.cosine, found.best_scale, found.epsilon_best_scale
        (0.5, 1.0, 2.0, 0.0)
    """
    if fro == 0.0:
        return Distances()
    epsilon = gap / fro
    excess = None if epsilon_min is None else epsilon**2 - epsilon_min**2
    if other == 0.0:
        return Distances(epsilon, epsilon_min, excess, 0.0)
    ratio = other / fro
    cosine = max(-1.0, min(1.0, inner / fro / other))
    scale = inner / other / other
    at_best = math.sqrt(max(0.0, epsilon**2 - ((1 - scale) * ratio) ** 2))
    return Distances(epsilon, epsilon_min, excess, ratio, cosine, scale, at_best)


def pool_distances(layers: Sequence[Any]) -> Distances:
    """Return the distances of several layers, as one block-diagonal matrix.

    ε = √(Σ‖D_ℓ − X_ℓ‖² / Σ‖D_ℓ‖²) over all given tensors, including 1-D ones and those with D_ℓ =
    0, to which only X_ℓ contributes. The best scale is common to all. ``epsilon_min`` is a lower
    bound: the layers' errors are subtracted.

    Args:
        layers: Any number of layers, as the record ``Residual``: ``fro``, ‖D‖; ``adapter_fro``,
            ‖X‖; ``gap``, ‖D − X‖; ``inner``, ⟨D, X⟩; and ``floor``, a lower bound on ‖D − X‖ of X's
            rank.
    """
    fro = math.hypot(*(layer.fro for layer in layers))
    floor = math.hypot(*(layer.floor for layer in layers))
    other = math.hypot(*(layer.adapter_fro for layer in layers))
    gap = math.hypot(*(layer.gap for layer in layers))
    inner = math.fsum(layer.inner for layer in layers)
    return compute_distances(fro, other, gap, inner, floor / fro if fro else None)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of ε², as fractions of ‖D‖²; they are nonnegative and sum to ε².

    Args:
        rank: ε_min²: no update of X's rank has less.
        direction: The remainder: what X's angle to D costs at its best scale, and what X's
            component orthogonal to D adds to an ε² above 1, the distance of no update.
        scale: What the best scale of X gains over the better of X and no update; and what X
            overshoots along D.
    """

    rank: float
    direction: float
    scale: float


def split_epsilon(distances: Distances) -> Parts | None:
    """Split ε² into rank, direction and scale; None where D or X is zero.

    With ρ = ‖X‖/‖D‖ and cos₊ = max(0, cosine), min over c ≥ 0 of ‖D − cX‖²/‖D‖² is 1 − cos₊². X's
    component along D is aD, a = ρ·cosine, so that ε² = (1 − a)² + ρ²(1 − cosine²). A part of ε²
    above max(1, a − 1)² is due to the second term, X's component orthogonal to D. A smaller scale
    removes it only by undoing X; it is no loss of scale:

        rank      = ε_min²
        direction = (1 − cos₊² − ε_min²) + (ε² − top),   top = min(ε², max(1, a − 1)²)
        scale     = top − (1 − cos₊²)

    Example:
        >>> split_epsilon(
        ...     compute_distances(fro=1.0, other=3.0, gap=2.0, inner=3.0, epsilon_min=0.0)
        ... )  # X = 3D
        Parts(rank=0.0, direction=0.0, scale=4.0)
    """
    epsilon, cosine, at_best = distances.epsilon, distances.cosine, distances.epsilon_best_scale
    if epsilon is None or cosine is None or at_best is None:
        return None
    top = min(epsilon**2, max(1.0, (distances.norm_ratio or 0.0) * cosine - 1) ** 2)
    best = min(top, at_best**2) if cosine > 0 else min(top, 1.0)
    rank = min(best, (distances.epsilon_min or 0.0) ** 2)
    return Parts(rank, best - rank + epsilon**2 - top, top - best)


def find_limit(
    distances: Distances,
) -> Literal["exact", "rank", "direction", "scale", "not adapted"] | None:
    """Return the factor that limits ε.

    * ``not adapted``: X is zero.
    * ``exact``: ε ≤ 1e-3.
    * else the largest of ``rank``, ``direction`` and ``scale`` (``split_epsilon``).

    Args:
        distances: The distances of one layer.

    Returns:
        The factor; None if D is zero.

    Example:
        >>> find_limit(compute_distances(fro=2.0, other=1.0, gap=1.0, inner=2.0, epsilon_min=0.0))
        'scale'
    """
    if distances.epsilon is None:
        return None
    split = split_epsilon(distances)
    if split is None:
        return "not adapted"
    if distances.epsilon <= EXACT:
        return "exact"
    if split.rank >= max(split.direction, split.scale):
        return "rank"
    return "direction" if split.direction >= split.scale else "scale"


def classify_direction(
    similarity: float, projection: float, projection_random: float, epsilon: float
) -> Literal["kept", "rotated", "intruder"]:
    """Return the kind of a direction.

    Singular vectors with nearly equal values may rotate into each other under a tiny change, so
    that their span is preserved but not the vectors. A direction is ``rotated`` if it lies in that
    span significantly: (p² − c) / (1 − c) ≥ ε², where p is its projection and c = window/out the
    mean of p² for a random direction.

    Args:
        similarity: max_i |⟨u_i(W_base), u_j⟩|.
        projection: p, the norm of its projection on that span.
        projection_random: √c.
        epsilon: ε, the similarity from which a direction is ``kept``.

    Reference: Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence",
    arXiv 2410.21228, for the similarity; the projection is an addition.

    Example:
        >>> cases = (0.9, 0.9, 0.1), (0.3, 0.95, 0.2), (0.3, 0.4, 0.4)
        >>> [classify_direction(*case, epsilon=0.5) for case in cases]
        ['kept', 'rotated', 'intruder']
    """
    if similarity >= epsilon:
        return "kept"
    chance = projection_random**2
    excess = (projection**2 - chance) / (1 - chance) if chance < 1 else 0.0
    return "rotated" if excess >= epsilon**2 else "intruder"


def similarity_at_random(dimension: int, vectors: int) -> float:
    """Estimate the median of max_i |⟨u_i, x⟩| over random unit vectors x.

    The products are approximated as independent normal variables of variance 1/m: P(max ≤ t) =
    (2Φ(t√m) − 1)^n.

    Args:
        dimension: m.
        vectors: n ≤ m orthonormal u_i.

    Example:
        >>> round(similarity_at_random(4096, 4096), 3)
        0.059
    """
    from scipy.special import ndtri

    probability = 0.5 ** (1 / vectors)  # of each product
    return min(1.0, float(ndtri((1 + probability) / 2)) / math.sqrt(dimension))


def below_at_random(dimension: int, vectors: int, epsilon: float) -> float:
    """Estimate the probability that a random direction has a similarity below ε.

    Args:
        dimension: As in ``similarity_at_random``.
        vectors: Likewise.
        epsilon: ε.

    Example:
        >>> round(below_at_random(4096, 4096, 0.5), 3), below_at_random(8, 8, 0.5) < 0.5
        (1.0, True)
    """
    from scipy.special import log_ndtr

    tail = math.exp(float(log_ndtr(-epsilon * math.sqrt(dimension))))
    return math.exp(vectors * math.log1p(-2 * tail)) if tail < 0.5 else 0.0
