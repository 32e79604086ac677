"""Distance of an update X from another, D: numbers from their norms, their inner product and D's spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

# Distance below which the adapter equals D: a float16 copy of an update is at 3e-4.
EXACT = 1e-3


@dataclass(frozen=True, slots=True)
class Distances:
    """Distances of two updates. A field is None if it is undefined.

    Args:
        epsilon: ε = ‖D − X‖ / ‖D‖.
        epsilon_min: The smallest ε of X's rank.
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


def distances(fro: float, other: float, gap: float, inner: float, epsilon_min: float | None) -> Distances:
    """Return the distances of X from D.

    ε is computed from ‖D − X‖ directly: ‖D‖² − 2⟨D, X⟩ + ‖X‖² would lose an ε below 1e-8 to cancellation. Likewise ‖D −
    cX‖² = ‖D − X‖² − (1 − c)²‖X‖² at the minimiser c = ⟨D, X⟩/‖X‖², where 1 − c is small if ε is.

    Args:
        fro: ‖D‖.
        other: ‖X‖.
        gap: ‖D − X‖.
        inner: ⟨D, X⟩.
        epsilon_min: √(1 − C(r)) for X's rank; None if X has no rank.

    Returns:
        The distances; all None for D = 0, and those of direction None for X = 0.

    Example:
        >>> found = distances(fro=2.0, other=1.0, gap=1.0, inner=2.0, epsilon_min=0.0)  # X = D/2
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


class Measured(Protocol):
    """One layer's D and X, by their norms."""

    @property
    def fro(self) -> float:
        """‖D‖."""
        ...

    @property
    def adapter_fro(self) -> float:
        """‖X‖."""
        ...

    @property
    def gap(self) -> float:
        """‖D − X‖."""
        ...

    @property
    def inner(self) -> float:
        """⟨D, X⟩."""
        ...

    @property
    def floor(self) -> float:
        """Lower bound on ‖D − X‖ of X's rank."""
        ...


def pooled(layers: Sequence[Measured]) -> Distances:
    """Return the distances of several layers, as one block-diagonal matrix.

    ε = √(Σ‖D_ℓ − X_ℓ‖² / Σ‖D_ℓ‖²) over all given tensors, including 1-D ones and those with D_ℓ = 0, to which only X_ℓ
    contributes. The best scale is common to all. ``epsilon_min`` is a lower bound: the layers' errors are subtracted.

    Args:
        layers: Any number of layers.
    """
    fro, floor = (math.hypot(*norms) for norms in ([x.fro for x in layers], [x.floor for x in layers]))
    other, gap = (math.hypot(*norms) for norms in ([x.adapter_fro for x in layers], [x.gap for x in layers]))
    return distances(fro, other, gap, math.fsum(x.inner for x in layers), floor / fro if fro else None)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of ε², as fractions of ‖D‖²; they are nonnegative and sum to ε².

    Args:
        rank: ε_min²: no update of X's rank has less.
        direction: The remainder: what X's angle to D costs at its best scale, and what X's component orthogonal to D
            adds to an ε² above 1, the distance of no update.
        scale: What the best scale of X gains over the better of X and no update; and what X overshoots along D.
    """

    rank: float
    direction: float
    scale: float


def parts(distances: Distances) -> Parts | None:
    """Split ε² into rank, direction and scale; None where D or X is zero.

    With ρ = ‖X‖/‖D‖ and cos₊ = max(0, cosine), min over c ≥ 0 of ‖D − cX‖²/‖D‖² is 1 − cos₊². X's component along D
    is aD, a = ρ·cosine, so that ε² = (1 − a)² + ρ²(1 − cosine²). A part of ε² above max(1, a − 1)² is due to the second
    term, X's component orthogonal to D. A smaller scale removes it only by undoing X; it is no loss of scale:

        rank      = ε_min²
        direction = (1 − cos₊² − ε_min²) + (ε² − top),   top = min(ε², max(1, a − 1)²)
        scale     = top − (1 − cos₊²)

    Example:
        >>> parts(distances(fro=1.0, other=3.0, gap=2.0, inner=3.0, epsilon_min=0.0))  # X = 3D
        Parts(rank=0.0, direction=0.0, scale=4.0)
    """
    epsilon, cosine, at_best = distances.epsilon, distances.cosine, distances.epsilon_best_scale
    if epsilon is None or cosine is None or at_best is None:
        return None
    top = min(epsilon**2, max(1.0, (distances.norm_ratio or 0.0) * cosine - 1) ** 2)
    best = min(top, at_best**2) if cosine > 0 else min(top, 1.0)
    rank = min(best, (distances.epsilon_min or 0.0) ** 2)
    return Parts(rank, best - rank + epsilon**2 - top, top - best)


def limit(distances: Distances) -> Literal["exact", "rank", "direction", "scale", "not adapted"] | None:
    """Return the factor that limits ε.

    * ``not adapted``: X is zero.
    * ``exact``: ε ≤ 1e-3.
    * else the largest of ``rank``, ``direction`` and ``scale`` (``parts``).

    Args:
        distances: The distances of one layer.

    Returns:
        The factor; None if D is zero.

    Example:
        >>> limit(distances(fro=2.0, other=1.0, gap=1.0, inner=2.0, epsilon_min=0.0))
        'scale'
    """
    if distances.epsilon is None:
        return None
    found = parts(distances)
    if found is None:
        return "not adapted"
    if distances.epsilon <= EXACT:
        return "exact"
    if found.rank >= max(found.direction, found.scale):
        return "rank"
    return "direction" if found.direction >= found.scale else "scale"
