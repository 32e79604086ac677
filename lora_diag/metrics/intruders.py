"""Definition of new directions of a fine-tuned weight, and the random baseline."""

from __future__ import annotations

import math
from typing import Literal

from scipy.special import log_ndtr, ndtri


def classify_direction(
    similarity: float, projection: float, projection_random: float, epsilon: float
) -> Literal["kept", "rotated", "intruder"]:
    """Return the kind of a direction.

    Singular vectors with nearly equal values may rotate into each other under a tiny change, so that their span is
    preserved but not the vectors. A direction is ``rotated`` if it lies in that span significantly: (p² − c) / (1 − c)
    ≥ ε², where p is its projection and c = window/out the mean of p² for a random direction.

    Args:
        similarity: max_i |⟨u_i(W_base), u_j⟩|.
        projection: p.
        projection_random: √c.
        epsilon: ε.

    Reference: Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228, for
    the similarity; the projection is an addition.

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

    The products are approximated as independent normal variables of variance 1/m: P(max ≤ t) = (2Φ(t√m) − 1)^n.

    Args:
        dimension: m.
        vectors: n ≤ m orthonormal u_i.

    Example:
        >>> round(similarity_at_random(4096, 4096), 3)
        0.059
    """
    probability = 0.5 ** (1 / vectors)  # of each product
    return min(1.0, float(ndtri((1 + probability) / 2)) / math.sqrt(dimension))


def below_at_random(dimension: int, vectors: int, epsilon: float) -> float:
    """Estimate the probability that a random direction has a similarity below ε.

    Example:
        >>> round(below_at_random(4096, 4096, 0.5), 3), below_at_random(8, 8, 0.5) < 0.5
        (1.0, True)
    """
    tail = math.exp(float(log_ndtr(-epsilon * math.sqrt(dimension))))
    return math.exp(vectors * math.log1p(-2 * tail)) if tail < 0.5 else 0.0
