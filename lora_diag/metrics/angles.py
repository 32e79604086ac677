"""Principal angles between random subspaces, the baseline for the angles of two updates."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Nodes of the trapezoidal rule; the integrand is smooth and periodic, so the error is far below the resolution of a
# figure.
_NODES = 1025


def random_angles(cosines: ArrayLike, first: int, second: int, dimension: int) -> NDArray[np.float64]:
    """Return the fraction of the principal angles between two random subspaces with at most these cosines.

    The law for large spaces. With a = p/m ≤ b = q/m, the squared cosines λ have the density √((λ₊ − λ)(λ − λ₋)) /
    (2πa·λ(1 − λ)) between λ± = (√(a(1 − b)) ± √(b(1 − a)))², and if p + q > m a fraction (a + b − 1)/a of them is 1.
    For p = q = 8 and m = 128 it is within 0.05 of random subspaces.

    Args:
        cosines: Cosines in [0, 1].
        first: Dimension of the one subspace.
        second: Dimension of the other.
        dimension: m, the dimension of the whole space.

    Reference: Wachter 1980, "The limiting empirical measure of multiple discriminant ratios", Ann. Statist. 8, 937–957.

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
    # λ = λ₋ + (λ₊ − λ₋)sin²φ removes both roots from the integral, and the pole at 0 or 1 if an edge reaches it.
    phi = np.linspace(0.0, np.pi / 2, _NODES)
    inside = phi[1:-1]
    values = low + (high - low) * np.sin(inside) ** 2
    density = (high - low) ** 2 * (np.sin(inside) * np.cos(inside)) ** 2 / (np.pi * a * values * (1 - values))
    # At the ends the integrand is zero, except for an edge at 0 or 1, where its limit is the neighbouring value.
    whole = np.concatenate([density[:1] * (low < 1e-12), density, density[-1:] * (high > 1 - 1e-12)])
    steps = (whole[1:] + whole[:-1]) / 2 * (phi[1] - phi[0])
    shares = np.concatenate([[0.0], np.cumsum(steps)])
    # Correct the known total mass for rounding.
    shares *= (1 - max(0.0, (a + b - 1) / a)) / shares[-1]
    quantiles = np.arcsin(np.sqrt(np.clip((squares - low) / (high - low), 0.0, 1.0)))
    return np.where(squares >= 1, 1.0, np.interp(quantiles, phi, shares))
