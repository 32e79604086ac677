"""Gauss–Lobatto quadrature on [0, 1], whose nodes include both ends, with an embedded rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Quadrature:
    """A rule with an odd number K of nodes, exact for polynomials of degree 2K − 3.

    Args:
        nodes: t_1 = 0, …, t_K = 1.
        weights: Their weights, with sum 1.
        embedded: Weights of the rule on every second node, exact for degree (K − 1)/2; zero at the
            others. Its distance from the rule estimates an error that is usually far above the
            rule's own.

    Reference:
        Abramowitz and Stegun 1964, Handbook of Mathematical Functions, 25.4.32.

    Example:
        >>> rule = Quadrature.of(3)
        >>> [round(float(weight), 6) for weight in rule.weights]
        [0.166667, 0.666667, 0.166667]
        >>> rule.embedded.tolist()
        [0.5, 0.0, 0.5]
    """

    nodes: Array
    weights: Array
    embedded: Array

    @classmethod
    def of(cls, count: int) -> Quadrature:
        """Return the rule with so many nodes, an odd number from 3."""
        polynomial = legendre.Legendre.basis(count - 1)
        inner = np.sort(polynomial.deriv().roots().real)
        points = np.concatenate([[-1.0], (inner - inner[::-1]) / 2, [1.0]])
        weights = 1 / (count * (count - 1) * polynomial(points) ** 2)
        nodes = (points + 1) / 2
        embedded = np.zeros(count)
        embedded[::2] = _interpolatory(nodes[::2])
        return cls(nodes, weights, embedded)


def _interpolatory(nodes: Array) -> Array:
    """Return the weights on [0, 1] that integrate the polynomial through the nodes."""
    powers = np.arange(len(nodes))
    return np.asarray(np.linalg.solve(np.vander(nodes, increasing=True).T, 1 / (powers + 1)))
