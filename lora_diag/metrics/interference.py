"""Relation of two updates compared with random ones, and singular task interference."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# Cosines below this are small, significant or not: less than 1% of the energy of one update is along the other.
SMALL = 0.1

# Number of standard deviations above the mean of random directions from which an overlap or a cosine is significant.
SIGMAS = 3.0


def is_near_chance(share: float, columns: int, dimension: int, effective_rank: float) -> bool:
    """Return whether the fraction of an update's energy in a k-dimensional space is near that in a random space.

    For a random space it is on average k/m. An update of effective rank e is like e independent directions, each with a
    fraction of variance ≈ 2k/m², so the standard deviation is about √(2k/e)/m. Near is below three of them, or twice
    the mean if that is more, or halfway from the mean to 1 if that is less.

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

    Args:
        near: Whether neither overlaps the other's spaces more than a random update.
        cosine: Cosine of the updates.
        cosine_random: Its root mean square for random directions.

    Example:
        >>> [classify_relation(near, cosine, 0.01) for near, cosine in ((True, 0.0), (False, 0.02), (False, -0.4))]
        ['apart', 'share', 'cancel']
    """
    if abs(cosine) >= max(SMALL, SIGMAS * cosine_random):
        return "reinforce" if cosine > 0 else "cancel"
    return "apart" if near else "share"


def task_interference(
    columns: NDArray[np.float64], rows: NDArray[np.float64], s: NDArray[np.float64]
) -> tuple[float, float]:
    """Return singular task interference STI = ‖(UᵀU − I) Σ (VᵀV − I)‖_1, and its ratio to Σσ.

    U = [U_1 … U_K] and V are the singular vectors of all updates side by side, Σ their singular values. The paper does
    not define ‖·‖_1; here it is the sum of the magnitudes of the entries. Between two equal updates it is Σσ, between K
    equal ones (K − 1)²·Σσ.

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


def task_interference_at_random(s: NDArray[np.float64], owner: NDArray[np.int64], shape: tuple[int, int]) -> float:
    """Estimate STI/Σσ for updates with random directions.

    Entry (i, j) of (UᵀU − I)Σ(VᵀV − I) is Σ_l σ_l⟨u_i, u_l⟩⟨v_l, v_j⟩ over the l that belong to other updates than i
    and j do. For random directions it has variance Σσ_l²/(mn), and, assumed normal, a mean magnitude of √(2/π) times
    its root.

    Args:
        s: Singular values of all updates.
        owner: Index of the update of each.
        shape: ``(m, n)``.

    Example:
        >>> round(task_interference_at_random(np.ones(2), np.array([0, 1]), (100, 100)), 5)
        0.00798
    """
    energies = np.bincount(owner, weights=s**2)
    numbers = np.bincount(owner)
    k = len(energies)
    others = energies.sum() - energies[:, None] - energies[None, :] + np.diag(energies)
    sums = np.sqrt(np.maximum(others, 0.0)) * numbers[:, None] * numbers[None, :]
    assert sums.shape == (k, k)
    return float(math.sqrt(2 / math.pi / (shape[0] * shape[1])) * sums.sum() / s.sum())
