"""The distribution of the entries of an update that rounding hid: flat, normal, or with heavy tails.

Entries of an update are not normal in general. Few steps of Adam at a low rate move every weight by about as much
(kurtosis 1.7 to 2.0 measured after 80 steps, where a uniform distribution has 1.8), long training gives 3 to 4. The
changes of the entries of each binade show which. The start of training, the fit over binades and E[X | cells] of layers
without directions take the likeliest shape; the size has a density of its own (``hidden_density``).

Shapes are mixtures of normal distributions: two or four evenly spaced ones (kurtosis 3 − 2ρ² and 3 − 1.36ρ² if ρ is the
variance of their means), and scales with log-normal weights. The scale of each is fitted, and the likelihood weights
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diag.linalg.cells import Cells, Source
from lora_diag.linalg.truncated import Moments, moments

# Entries on which shapes are compared, and how many steps their scales take at most.
SHAPE_SAMPLE, STEPS = 2**15, 20


@dataclass(frozen=True, slots=True)
class Shape:
    """A symmetric distribution of variance 1.

    Args:
        parts: Weight, mean and deviation of each normal distribution that it mixes.
    """

    parts: tuple[tuple[float, float, float], ...]

    @property
    def kurtosis(self) -> float:
        """E[u⁴], 3 of a normal distribution."""
        return sum(weight * (mean**4 + 6 * (mean * s) ** 2 + 3 * s**4) for weight, mean, s in self.parts)

    def moments(self, cells: Cells, deviation: float, fast: bool = False) -> Moments:
        """Return the moments of x = deviation·u, u of this shape, given its cell."""
        if len(self.parts) == 1:
            return moments(cells, 0.0, deviation, fast)
        parts = [moments(cells, mean * deviation, spread * deviation, fast) for _, mean, spread in self.parts]
        share, total = _posterior_shares([part[0] for part in self.parts], parts)
        center = sum(p * part_moments.mean for p, part_moments in zip(share, parts, strict=True))
        assert isinstance(center, Tensor)
        variance = sum(
            p * (part_moments.variance + (part_moments.mean - center) ** 2)
            for p, part_moments in zip(share, parts, strict=True)
        )
        assert isinstance(variance, Tensor)
        return Moments(center, variance, total)


def _posterior_shares(weights: list[float], parts: list[Moments]) -> tuple[Tensor, Tensor]:
    """Return the posterior probability of each part, and the logarithm of the likelihood."""
    logs = torch.stack(
        [part_moments.log_mass + math.log(weight) for weight, part_moments in zip(weights, parts, strict=True)]
    )
    total = torch.logsumexp(logs, 0)
    return (logs - total).exp(), total


def _make_flat(points: int, rho: float) -> Shape:
    """Return evenly spaced points of variance ρ, each spread by a variance of 1 − ρ."""
    offsets = [2 * k + 1 - points for k in range(points)]
    unit = math.sqrt(rho / (sum(offset**2 for offset in offsets) / points))
    return Shape(tuple((1 / points, offset * unit, math.sqrt(1 - rho)) for offset in offsets))


def _make_heavy(sigma: float) -> Shape:
    """Return normal distributions of three deviations, with the weights of a log-normal one of log-deviation σ."""
    scales = [math.exp(sigma * point) for point in (-math.sqrt(3), 0.0, math.sqrt(3))]
    weights = (1 / 6, 2 / 3, 1 / 6)
    unit = math.sqrt(sum(weight * scale**2 for weight, scale in zip(weights, scales, strict=True)))
    return Shape(tuple((weight, 0.0, scale / unit) for weight, scale in zip(weights, scales, strict=True)))


NORMAL = Shape(((1.0, 0.0, 1.0),))
FLATTER = (_make_flat(2, 0.4), _make_flat(4, 0.8), _make_flat(4, 0.92), _make_flat(2, 0.88))
HEAVIER = tuple(map(_make_heavy, (0.2, 0.35, 0.5)))


@dataclass(frozen=True, slots=True)
class Shaped:
    """The likeliest shape, and its scale.

    Args:
        shape: The shape.
        deviation: The standard deviation of the entries.
        log_likelihood: For all cells.
    """

    shape: Shape
    deviation: float
    log_likelihood: float


@dataclass(slots=True)
class _Sums:
    """Sums over entries of ∂ log-likelihood/∂ log s, of its square, and of log-likelihoods."""

    score: float = 0.0
    squares: float = 0.0
    log_likelihood: float = 0.0
    entries: int = 0


def _sum_scores(cells: Source, shape: Shape, deviation: float, fast: bool = True) -> _Sums:
    """Return the sums for a shape of this deviation."""
    sums = _Sums()
    for first, last in cells.spans():
        block = cells.rows(first, last)
        parts = [moments(block, mean * deviation, spread * deviation, fast) for _, mean, spread in shape.parts]
        share, total = _posterior_shares([part[0] for part in shape.parts], parts)
        score = torch.zeros_like(total)
        for p, part_moments, (_, mean, spread) in zip(share, parts, shape.parts, strict=True):
            square = part_moments.variance + part_moments.mean**2
            score += p * ((square / deviation - mean * part_moments.mean) / (deviation * spread**2) - 1)
        sums.score += float(score.sum(dtype=torch.float64))
        sums.squares += float(score.double().square().sum())
        sums.log_likelihood += float(total.sum(dtype=torch.float64))
        sums.entries += total.numel()
    return sums


def _fit(cells: Source, shape: Shape, deviation: float) -> tuple[float, _Sums]:
    """Return the scale of the largest likelihood, by steps of the score over its own variance, and the sums there."""
    sums = _sum_scores(cells, shape, deviation)
    for _ in range(STEPS):
        step = max(-0.3, min(0.3, sums.score / max(sums.squares, 1e-9)))
        if abs(step) < 2e-3:
            break
        deviation *= math.exp(step)
        sums = _sum_scores(cells, shape, deviation)
    return deviation, sums


def _fit_neighbours(cells: Source, guess: float) -> list[tuple[Shape, float, _Sums]]:
    """Fit the normal shape and, on both sides of it, flatter and heavier ones until the likelihood falls."""
    first = (NORMAL, *_fit(cells, NORMAL, guess))
    shapes = [first]
    # Stochastic rounding in training without master weights looks like heavy tails and a rounded start, and is refused
    # only where those are not offered together; real updates did not need both.
    for side in (FLATTER, HEAVIER[:1] if cells.rounded else HEAVIER):
        last = first
        for shape in side:
            fit = (shape, *_fit(cells, shape, last[1]))
            shapes.append(fit)
            if fit[2].log_likelihood < last[2].log_likelihood:
                break
            last = fit
    return shapes


def fit_shape(cells: Source, guess: float) -> Shaped:
    """Choose the shape of the entries by likelihood.

    Args:
        cells: Intervals of the entries.
        guess: A deviation to start from, such as that of the normal shape.
    """
    total = cells.count
    sample: Source = cells
    if total > 2 * SHAPE_SAMPLE:
        sample = cells.at(torch.arange(0, total, total // SHAPE_SAMPLE | 1, device=cells.device))
    shape, deviation, sums = max(_fit_neighbours(sample, guess), key=lambda fit: fit[2].log_likelihood)
    if sample is not cells:
        return refit_shape(cells, shape, deviation)
    return Shaped(shape, deviation, sums.log_likelihood)


def refit_shape(cells: Source, shape: Shape, guess: float) -> Shaped:
    """Return a shape with the deviation that is likeliest for all cells."""
    deviation, sums = _fit(cells, shape, guess)
    return Shaped(shape, deviation, sums.log_likelihood)
