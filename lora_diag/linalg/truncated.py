"""Moments of numbers that were rounded into cells, and optimal shrinkage of the singular values of their means.

The moments of a normal distribution truncated to a cell are stable in float32. With t = (x − μ)/s, the density on a
cell is proportional to exp(−t²/2)·w(t), w being 1 in the cell, or a trapezoid where the start of training was rounded,
too. Differences of Φ and φ lose all digits in narrow cells and in tails, so the integrals are computed by
Gauss-Legendre quadrature on the relevant part of the cell: with t₀ its point nearest to 0, exp(−(t² − t₀²)/2) is below
e^−K beyond |t − t₀| = 2K/(|t₀| + √(t₀² + 2K)). With 16 nodes and K = 16 means are within 3e-6 standard deviations and
variances within 4e-5 of quadrature with 200 nodes, over cells from e^−7 to e^4 standard deviations wide and up to 50
away; float32 adds the rounding of the ends of the cells.

Shrinkage. Observed through cells, a low-rank L in noise of variance s² has a posterior mean that is, on average over
entries, m = (1 − q)·L + q·Y, where q = 1 − mean(variance)/s² is the fraction of information and Y = L + noise of
variance τ² = s²/q the score. A singular value σ of m belongs to the y of Y with σ = (1 − q)·η(y) + q·y, where

    η(y) = √((y² − (m + n)τ²)² − 4mn·τ⁴) / y   for y > τ(√m + √n), else 0

is the shrinker of least Frobenius risk (Gavish and Donoho 2017, *Optimal shrinkage of singular values*, IEEE Trans.
Inf. Theory 63), and x with y² = (x + mτ²/x)(x + nτ²/x) the singular value of L without noise (Benaych-Georges and
Nadakuditi 2012, *The singular values and vectors of low rank perturbations*, J. Multivariate Anal. 111).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_diag.linalg.cells import Cells

# Nodes and K, by dtype; the fast ones are accurate to 1e-3 of the variance.
NODES = {torch.float32: (16, 16.0), torch.float64: (40, 40.0)}
FAST = (10, 10.0)


class Moments(NamedTuple):
    """E[x], Var[x] and the log-likelihood of the cell, for every entry."""

    mean: Tensor
    variance: Tensor
    log_mass: Tensor


@cache
def _gauss_legendre(nodes: int) -> tuple[tuple[float, float], ...]:
    """Return nodes on [−1, 1] and their weights."""
    abscissas, weights = np.polynomial.legendre.leggauss(nodes)
    return tuple(zip(abscissas.tolist(), weights.tolist(), strict=True))


def moments(cells: Cells, mean: Tensor | float, deviation: float, fast: bool = False) -> Moments:
    """Return the moments of x ~ N(mean, deviation²) given that it was rounded into its cell.

    Args:
        cells: The cells, float32 or float64; an infinite end is open.
        mean: μ, a number or a tensor of the cells' shape.
        deviation: s > 0.
        fast: Use fewer nodes.

    Example:
        >>> cell = Cells(torch.tensor([[0.0]], dtype=torch.float64), torch.tensor([[math.inf]], dtype=torch.float64))
        >>> found = moments(cell, 0.0, 1.0)
        >>> round(float(found.mean) ** 2, 9) == round(2 / math.pi, 9), round(float(found.log_mass.exp()), 9)
        (True, 0.5)
    """
    nodes, reach = FAST if fast else NODES[cells.lo.dtype]
    low, high = cells.lo, cells.hi
    if cells.below is not None and cells.above is not None:
        low, high = low - cells.above, high + cells.below
    first, last, width = (low - mean) / deviation, (high - mean) / deviation, (high - low) / deviation
    nearest = torch.clamp(torch.zeros_like(first), first, last)
    distance = nearest.abs()
    beyond = 2 * reach / (distance + (distance * distance + 2 * reach).sqrt())
    # From here on u = t − t₀, in which t² − t₀² = u(u + 2t₀) loses no digits. A cell that does not contain 0 gets its
    # width from its own ends: far out, the difference of two rounded t may be 0.
    left = torch.where(last < 0, -width, first.clamp(max=0.0))
    right = torch.where(first > 0, width, last.clamp(min=0.0))
    start, stop = torch.maximum(left, -beyond), torch.minimum(right, beyond)
    if cells.below is None or cells.above is None:
        mass, first_moment, second_moment = _integrate(start, stop, nearest, nodes, None)
        log_height: Tensor | float = 0.0
    else:
        width = (cells.below + cells.above) / deviation
        flat = torch.minimum((cells.hi - cells.lo) / deviation, width)
        ramp = _Ramp(left, right, flat)
        inside = (left + flat, right - flat)
        edges = [start, *(torch.minimum(torch.maximum(edge, start), stop) for edge in inside), stop]
        parts = [_integrate(a, b, nearest, nodes, ramp) for a, b in pairwise(edges)]
        mass, first_moment, second_moment = (sum(part[k] for part in parts[1:]) + parts[0][k] for k in range(3))
        log_height = -torch.log(width)
    center = first_moment / mass
    return Moments(
        mean=(center + nearest) * deviation + mean,
        variance=(second_moment / mass - center * center).clamp_(min=0.0) * (deviation * deviation),
        log_mass=torch.log(mass) - nearest * nearest / 2 - math.log(2 * math.pi) / 2 + log_height,
    )


class _Ramp(NamedTuple):
    """The trapezoid: distance to its nearer end, at most ``flat``."""

    first: Tensor
    last: Tensor
    flat: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        """Return its height, not normalized."""
        return torch.minimum(torch.minimum(u - self.first, self.last - u), self.flat).clamp_(min=0.0)


def _integrate(
    start: Tensor, stop: Tensor, nearest: Tensor, nodes: int, ramp: _Ramp | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ∫ e^{−u(u/2 + t₀)}·w du, and the same with u and with u² under the integral."""
    half = (stop - start) / 2
    middle = start + half
    mass, first_moment, second_moment = (torch.zeros_like(middle) for _ in range(3))
    for node, weight in _gauss_legendre(nodes):
        u = torch.add(middle, half, alpha=node)
        density = torch.add(nearest, u, alpha=0.5).mul_(u).neg_().exp_()
        if ramp is not None:
            density *= ramp(u)
        mass.add_(density, alpha=weight)
        density *= u
        first_moment.add_(density, alpha=weight)
        second_moment.addcmul_(density, u, value=weight)
    return mass * half, first_moment * half, second_moment * half


@dataclass(frozen=True, slots=True)
class Shrunk:
    """Singular values after shrinking, float64, those that are not zero.

    Args:
        eta: η, the singular values of the estimate of L.
        debiased: x, the estimated singular values of L itself.
        noise: τ, the standard deviation of the score's noise.
    """

    eta: Tensor
    debiased: Tensor
    noise: float


def noise_edge(shape: tuple[int, int], deviation: float) -> float:
    """Return deviation·(√m + √n), the edge of the singular values of pure noise."""
    return deviation * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def shrink(s: Tensor, shape: tuple[int, int], deviation: float, information: float) -> Shrunk:
    """Shrink the singular values of a posterior mean.

    Args:
        s: σ, descending.
        shape: ``(m, n)``.
        deviation: s, of the remainder outside L.
        information: q in (0, 1].

    Example:
        >>> found = shrink(torch.tensor([10.0, 2.0]), (1, 1), 1.0, 1.0)  # of noise with the edge 2
        >>> [round(x, 3) for x in (*found.eta.tolist(), *found.debiased.tolist())]
        [9.798, 9.899]
    """
    m, n = shape
    noise = deviation / math.sqrt(information)
    s = s.double().cpu()
    s = s[s > noise_edge(shape, deviation * math.sqrt(information))]
    low, high = torch.full_like(s, noise_edge(shape, noise)), s / information
    for _ in range(60):
        middle = (low + high) / 2
        above = (1 - information) * _eta(middle, m, n, noise) + information * middle > s
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    y = (low + high) / 2
    eta = _eta(y, m, n, noise)
    centered = y**2 - (m + n) * noise**2
    debiased = ((centered + eta * y) / 2).sqrt()
    return Shrunk(eta, debiased, noise)


def _eta(y: Tensor, m: int, n: int, noise: float) -> Tensor:
    square = (y**2 - (m + n) * noise**2) ** 2 - 4 * m * n * noise**4
    return square.clamp(min=0.0).sqrt() / y


def add_noise(x: Tensor, shape: tuple[int, int], deviation: float) -> Tensor:
    """Return the singular values of L plus dense noise: √((x + mτ²/x)(x + nτ²/x)), or the edge below the transition."""
    (m, n), square = shape, deviation**2
    x = x.clamp(min=max(1e-300, deviation * (m * n) ** 0.25))
    return ((x + m * square / x) * (x + n * square / x)).sqrt()
