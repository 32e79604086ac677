"""When a direction of a fine-tuned weight is new, and what a random direction would look like."""

from __future__ import annotations

import math
from typing import Literal

from scipy.special import log_ndtr, ndtri


def kind(
    similarity: float, projection: float, projection_random: float, epsilon: float
) -> Literal["kept", "rotated", "intruder"]:
    """Say what a direction is.

    Singular vectors whose values nearly agree may turn into each other under a tiny change, so that none of them is
    found again though their span is. A direction is called ``rotated`` where it lies in that span by more than chance:
    (p² − c) / (1 − c) ≥ ε², p its projection and c = window/out what a random direction has of p² on average.

    Args:
        similarity: max_i |⟨u_i(W_base), u_j⟩|.
        projection: p.
        projection_random: √c.
        epsilon: ε.

    Reference: Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228, for
    the similarity; the projection is an addition.

    Example:
        >>> kind(0.9, 0.9, 0.1, 0.5), kind(0.3, 0.95, 0.2, 0.5), kind(0.3, 0.4, 0.4, 0.5)
        ('kept', 'rotated', 'intruder')
    """
    if similarity >= epsilon:
        return "kept"
    chance = projection_random**2
    beyond = (projection**2 - chance) / (1 - chance) if chance < 1 else 0.0
    return "rotated" if beyond >= epsilon**2 else "intruder"


def similarity_at_random(dimension: int, vectors: int) -> float:
    """Return about the median of max_i |⟨u_i, x⟩| over random unit vectors x.

    The products are taken as independent normal numbers of variance 1/m: P(max ≤ t) = (2Φ(t√m) − 1)^n.

    Args:
        dimension: m.
        vectors: n ≤ m orthonormal u_i.

    Example:
        >>> round(similarity_at_random(4096, 4096), 3)
        0.059
    """
    one = 0.5 ** (1 / vectors)
    return min(1.0, float(ndtri((1 + one) / 2)) / math.sqrt(dimension))


def below_at_random(dimension: int, vectors: int, epsilon: float) -> float:
    """Return about the probability that a random direction has a similarity below ε, by the same estimate.

    Example:
        >>> round(below_at_random(4096, 4096, 0.5), 3), below_at_random(8, 8, 0.5) < 0.5
        (1.0, True)
    """
    tail = math.exp(float(log_ndtr(-epsilon * math.sqrt(dimension))))
    return math.exp(vectors * math.log1p(-2 * tail)) if tail < 0.5 else 0.0
