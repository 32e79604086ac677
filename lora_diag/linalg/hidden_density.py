"""The size of an update that rounding hid, from a smooth density of its entries.

The density of |x|/s0 is proportional to exp(a₁z + a₂z² + a₃z⁴) on a grid, each point smeared by a normal kernel: flat,
normal, and with heavy tails as far as the grid reaches. Its coefficients maximize the likelihood of the cells (scoring
steps), and its second moment is the mean of x². Cells that are narrow and those that the entry left show the shape; a
shape assumed too flat or too normal is off by 2% to 4% where 90% and more of the entries did not change.

Reference: Efron 2016, Empirical Bayes deconvolution estimates, Biometrika 103.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diag.linalg.cells import Source
from lora_diag.linalg.hidden import fit_size
from lora_diag.linalg.hidden_shapes import Shape
from lora_diag.linalg.truncated import moments

# Spacing and end of the grid, and the deviation of the kernel, in units of s0.
SPACING, END, KERNEL = 0.25, 5.0, 0.15
POWERS = (1, 2, 4)

# Weight below which a point is no part of a shape.
MIN_WEIGHT = 1e-3

# Precision of a normal prior of the coefficients around the coefficients of a normal density; it only matters where
# cells are uninformative.
PRIOR_PRECISION = 0.01

# Number of entries that the density is fitted to, and most scoring steps.
SAMPLE, STEPS = 2**17, 40


@dataclass(frozen=True, slots=True)
class Density:
    """The fitted density.

    Args:
        deviation: Root mean square of x.
        error: Standard error of its logarithm, of sampling.
        kurtosis: E[x⁴]/E[x²]².
        shape: The density itself, of variance 1.
    """

    deviation: float
    error: float
    kurtosis: float
    shape: Shape


def fit_density(cells: Source, deviation: float) -> Density:
    """Estimate the root mean square of the entries.

    Args:
        cells: Cells of the entries.
        deviation: s0, their deviation if they are normal.
    """
    total, sample, unit = cells.count, cells, deviation
    if total > 2 * SAMPLE:
        sample = cells.at(torch.arange(0, total, total // SAMPLE | 1, device=cells.device))
        unit = fit_size(sample, deviation).deviation
    grid = torch.arange(0, END + SPACING / 2, SPACING, dtype=torch.float64)
    likelihood = _compute_likelihood(sample, grid * unit, KERNEL * unit)
    weights, scores, features = _fit(likelihood, grid)
    square = grid**2 + KERNEL**2
    mean = float(weights @ square)
    slope = (weights * (square - mean)) @ features
    variance = float(
        slope @ torch.linalg.solve(scores.T @ scores + PRIOR_PRECISION * torch.eye(len(POWERS)).double(), slope)
    )
    fourth = float(weights @ (grid**4 + 6 * grid**2 * KERNEL**2 + 3 * KERNEL**4))
    error = math.sqrt(variance * sample.count / total) / (2 * mean)
    return Density(deviation * math.sqrt(mean), error, fourth / mean**2, _make_shape(weights, grid))


def _make_shape(weights: Tensor, grid: Tensor) -> Shape:
    """Return the mixture of both signs of the grid, of variance 1."""
    kept = weights >= MIN_WEIGHT
    shares, points = weights[kept] / weights[kept].sum(), grid[kept]
    unit = math.sqrt(float(shares @ (points**2 + KERNEL**2)))
    return Shape(
        tuple(
            (weight / 2, sign * point / unit, KERNEL / unit)
            for weight, point in zip(shares.tolist(), points.tolist(), strict=True)
            for sign in (-1, 1)
        )
    )


def _compute_likelihood(cells: Source, points: Tensor, kernel: float) -> Tensor:
    """Return the likelihood of every cell at every |x|, up to a factor per cell."""
    columns = []
    for point in points.tolist():
        parts = []
        for first, last in cells.spans():
            block = cells.rows(first, last)
            right, left = (moments(block, mean, kernel, fast=True).log_mass for mean in (point, -point))
            parts.append(torch.logaddexp(right, left).flatten().cpu())
        columns.append(torch.cat(parts))
    logs = torch.stack(columns, 1).double()
    return logs.sub_(logs.max(1, keepdim=True).values).exp_()


def _fit(likelihood: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of the grid, the scores of every cell, and the features that coefficients multiply."""
    features = torch.stack([(grid / 2) ** power for power in POWERS], 1)
    features = features - features.mean(0)
    base = torch.ones_like(grid)
    base[0] = 0.5  # both signs of the other points are counted
    start = torch.tensor([-2.0 if power == 2 else 0.0 for power in POWERS], dtype=torch.float64)
    coefficients, prior = start.clone(), PRIOR_PRECISION * torch.eye(len(POWERS)).double()

    def weights_at(values: Tensor) -> Tensor:
        return torch.softmax(features @ values + base.log(), 0)

    def objective(values: Tensor) -> float:
        away = values - start
        return float((likelihood @ weights_at(values)).log().sum() - 0.5 * PRIOR_PRECISION * away @ away)

    weights, current = weights_at(coefficients), objective(coefficients)
    for _ in range(STEPS):
        scores = (likelihood * weights / (likelihood @ weights)[:, None]) @ features - weights @ features
        gradient = scores.sum(0) - PRIOR_PRECISION * (coefficients - start)
        step = torch.linalg.solve(scores.T @ scores + prior, gradient)
        previous = current
        for _ in range(12):
            current = objective(coefficients + step)
            if current >= previous:
                break
            step = step / 2
        else:
            current = previous
            break
        coefficients = coefficients + step
        weights = weights_at(coefficients)
        if current - previous < 1e-3:
            break
    return weights, scores, features
