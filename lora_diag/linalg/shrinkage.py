"""Optimal shrinkage of singular values of a posterior mean.

Observed through cells, a low-rank L in noise of variance s² has a posterior mean that is, on average over entries,
m = (1 − q)·L + q·Y, where q = 1 − mean(variance)/s² is the fraction of information and Y = L + noise of variance τ² =
s²/q the score. A singular value σ of m belongs to the y of Y with σ = (1 − q)·η(y) + q·y, where

    η(y) = √((y² − (m + n)τ²)² − 4mn·τ⁴) / y   for y > τ(√m + √n), else 0

is the shrinker of least Frobenius risk (Gavish and Donoho 2017, *Optimal shrinkage of singular values*, IEEE Trans.
Inf. Theory 63), and x with y² = (x + mτ²/x)(x + nτ²/x) the singular value of L without noise (Benaych-Georges and
Nadakuditi 2012, *The singular values and vectors of low rank perturbations*, J. Multivariate Anal. 111).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
