"""Distributions of the entries of an update that rounding hid: shapes, a density, and scales of
rows and columns.

Shapes. Entries of an update are not normal in general. Few steps of Adam at a low rate move every
weight by about as much (kurtosis 1.7 to 2.0 measured after 80 steps, where a uniform distribution
has 1.8), long training gives 3 to 4. The changes of the entries of each binade show which. The
start of training, the fit over binades and E[X | cells] of layers without directions take the
likeliest shape; the size has a density of its own (``fit_density``). Shapes are mixtures of normal
distributions: two or four evenly spaced ones (kurtosis 3 − 2ρ² and 3 − 1.36ρ² if ρ is the variance
of their means), and scales with log-normal weights. The scale of each is fitted, and the likelihood
weights them.

Density. That of |x|/s0 is proportional to exp(a₁z + a₂z² + a₃z⁴) on a grid, each point smeared by a
normal kernel: flat, normal, and with heavy tails as far as the grid reaches. Its coefficients
maximize the likelihood of the cells (scoring steps), and its second moment is the mean of x². Cells
that are narrow and those that the entry left show the shape; a shape assumed too flat or too normal
is off by 2% to 4% where 90% and more of the entries did not change. Reference: Efron 2016,
Empirical Bayes deconvolution estimates, Biometrika 103.

Scales of rows and columns: x_ij ~ N(0, a_i·b_j·s²) given its cell. A score test decides first
whether the variances differ at all between rows or columns. Then log a and log b are fitted in
turns, by Newton steps on their posterior with a normal prior whose variance is fitted (empirical
Bayes), so that rows with few changed entries stay near 1. Dividing rows and columns by √a and √b
gives cells of one variance. The posterior of log a_i has a variance v_i = 1/(information + 1/prior
variance), so that E[a_i] = exp(v_i/2)·a_i. Without that factor, for what the cells leave open, ‖X‖
was 7% to 10% too small where 97% of the entries did not change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_diag.linalg.cells import CellMatrix, Cells, Moments, moments
from lora_diag.linalg.hidden import LARGE_SAMPLE, HeldOutCells, LowRank, Size, fit_size

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
        return sum(
            weight * (mean**4 + 6 * (mean * s) ** 2 + 3 * s**4) for weight, mean, s in self.parts
        )

    def moments(self, cells: Cells, deviation: float, fast: bool = False) -> Moments:
        """Return the moments of x = deviation·u, u of this shape, given its cell."""
        if len(self.parts) == 1:
            return moments(cells, 0.0, deviation, fast)
        size, (cells, index) = cells.shape, cells.merge_block()
        parts = [
            moments(cells, mean * deviation, spread * deviation, fast)
            for _, mean, spread in self.parts
        ]
        share, total = self.posterior_shares(parts)
        center, variance = torch.zeros_like(total), torch.zeros_like(total)
        for p, part in zip(share, parts, strict=True):
            center += p * part.mean
        for p, part in zip(share, parts, strict=True):
            variance += p * (part.variance + (part.mean - center) ** 2)
        return Moments(*(part.view(-1)[index].view(size) for part in (center, variance, total)))

    def posterior_shares(self, parts: list[Moments]) -> tuple[Tensor, Tensor]:
        """Return the posterior probability of each part, and the logarithm of the likelihood."""
        logs = torch.stack(
            [part.log_mass + math.log(own[0]) for own, part in zip(self.parts, parts, strict=True)]
        )
        total = torch.logsumexp(logs, 0)
        return (logs - total).exp(), total


def _make_flat(points: int, rho: float) -> Shape:
    """Return evenly spaced points of variance ρ, each spread by a variance of 1 − ρ."""
    offsets = [2 * k + 1 - points for k in range(points)]
    unit = math.sqrt(rho / (sum(offset**2 for offset in offsets) / points))
    return Shape(tuple((1 / points, offset * unit, math.sqrt(1 - rho)) for offset in offsets))


def _make_heavy(sigma: float) -> Shape:
    """Return normal distributions of three deviations, with the weights of a log-normal one of
    log-deviation σ.
    """
    scales = [math.exp(sigma * point) for point in (-math.sqrt(3), 0.0, math.sqrt(3))]
    weights = (1 / 6, 2 / 3, 1 / 6)
    unit = math.sqrt(sum(weight * scale**2 for weight, scale in zip(weights, scales, strict=True)))
    return Shape(
        tuple((weight, 0.0, scale / unit) for weight, scale in zip(weights, scales, strict=True))
    )


NORMAL = Shape(((1.0, 0.0, 1.0),))
FLATTER = (_make_flat(2, 0.4), _make_flat(4, 0.8), _make_flat(4, 0.92), _make_flat(2, 0.88))
HEAVIER = tuple(map(_make_heavy, (0.2, 0.35, 0.5)))

# The choice of the start also needs the tails of updates of rank 1 and of unequal rows. Without
# them, and with fewer shapes for a rounded start, 18 of 126 planted layers that began at a rounded
# start fitted a stored one better.
HEAVIEST = (*HEAVIER, *map(_make_heavy, (0.7, 0.9)))


@dataclass(frozen=True, slots=True)
class Shaped:
    """The likeliest shape, and its scale.

    Args:
        shape: The shape.
        deviation: The standard deviation of the entries.
        log_likelihood: Log-likelihood of the cells that it was fitted to.
    """

    shape: Shape
    deviation: float
    log_likelihood: float


@dataclass(slots=True)
class _ScaleSums:
    """Sums over entries of ∂ log-likelihood/∂ log s, of its square, and of log-likelihoods."""

    score: float = 0.0
    squares: float = 0.0
    log_likelihood: float = 0.0


def _sum_scores(cells: CellMatrix, shape: Shape, deviation: float) -> _ScaleSums:
    """Return the sums for a shape of this deviation."""
    sums = _ScaleSums()
    for first, last in cells.spans():
        block = cells.rows(first, last)
        parts = [
            moments(block, mean * deviation, spread * deviation, fast=True)
            for _, mean, spread in shape.parts
        ]
        share, total = shape.posterior_shares(parts)
        score = torch.zeros_like(total)
        for p, part_moments, (_, mean, spread) in zip(share, parts, shape.parts, strict=True):
            square = part_moments.variance + part_moments.mean**2
            score += p * (
                (square / deviation - mean * part_moments.mean) / (deviation * spread**2) - 1
            )
        sums.score += block.total(score)
        sums.squares += block.total(score.square())
        sums.log_likelihood += block.total(total)
    return sums


def fit_deviation(cells: CellMatrix, shape: Shape, guess: float) -> Shaped:
    """Return a shape with its likeliest deviation, by steps of the score over its own variance.

    Args:
        cells: Cells of the entries.
        shape: The shape.
        guess: Initial deviation.
    """
    deviation, sums = guess, _sum_scores(cells, shape, guess)
    for _ in range(STEPS):
        step = max(-0.3, min(0.3, sums.score / max(sums.squares, 1e-9)))
        if abs(step) < 2e-3:
            break
        deviation *= math.exp(step)
        sums = _sum_scores(cells, shape, deviation)
    return Shaped(shape, deviation, sums.log_likelihood)


def fit_shape(cells: CellMatrix, guess: float, heavier: tuple[Shape, ...] | None = None) -> Shaped:
    """Return the likeliest shape of the entries: flatter and heavier ones are tried until the
    likelihood falls.

    Args:
        cells: Cells of the entries.
        guess: Their deviation if they are normal.
        heavier: Shapes with heavy tails, ascending; None for those of a model.
    """
    sample = cells.sample(SHAPE_SAMPLE)
    fits = [fit_deviation(sample, NORMAL, guess)]
    if heavier is None:
        # Stochastic rounding in training without master weights looks like heavy tails and a
        # rounded start, and is refused only where those are not offered together. Directions
        # explain the tails of other updates.
        heavier = HEAVIER[:1] if sample.rounded else HEAVIER
    for candidates in (FLATTER, heavier):
        last = fits[0]
        for shape in candidates:
            fits.append(fit_deviation(sample, shape, last.deviation))
            if fits[-1].log_likelihood < last.log_likelihood:
                break
            last = fits[-1]
    best, larger = max(fits, key=lambda fit: fit.log_likelihood), cells.sample(LARGE_SAMPLE)
    fitted = best if sample is larger else fit_deviation(larger, best.shape, best.deviation)
    if larger is cells:
        return fitted
    return replace(fitted, deviation=fitted.deviation * guess / fit_size(larger, guess).deviation)


# Spacing and end of the grid, and the deviation of the kernel, in units of s0.
SPACING, END, KERNEL = 0.25, 5.0, 0.15
POWERS = (1, 2, 4)

# Weight below which a point is no part of a shape.
MIN_WEIGHT = 1e-3

# Precision of a normal prior of the coefficients around the coefficients of a normal density; it
# only matters where cells are uninformative.
PRIOR_PRECISION = 0.01

# Number of entries that the density is fitted to, and most scoring steps.
SAMPLE, NEWTON_STEPS = 2**17, 40


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


def fit_density(cells: CellMatrix, deviation: float) -> Density:
    """Return the density of the entries, fitted to a sample, with their root mean square.

    Args:
        cells: Cells of the entries.
        deviation: s0, their deviation if they are normal.
    """
    sample = cells.sample(SAMPLE)
    unit = deviation if sample is cells else fit_size(sample, deviation).deviation
    grid = torch.arange(0, END + SPACING / 2, SPACING, dtype=torch.float64)
    likelihood = _compute_likelihood(sample, grid * unit, KERNEL * unit)
    counts = torch.cat([sample.rows(*span).weights.cpu() for span in sample.spans()])
    weights, information, features = _fit_coefficients(likelihood, counts, grid)
    square = grid**2 + KERNEL**2
    mean = float(weights @ square)
    slope = (weights * (square - mean)) @ features
    variance = float(slope @ torch.linalg.solve(information, slope))
    fourth = float(weights @ (grid**4 + 6 * grid**2 * KERNEL**2 + 3 * KERNEL**4))
    error = math.sqrt(variance * sample.count / cells.count) / (2 * mean)
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


def _compute_likelihood(cells: CellMatrix, points: Tensor, kernel: float) -> Tensor:
    """Return the likelihood of every cell at every |x|, up to a factor per cell."""
    columns = []
    for point in points.tolist():
        parts = []
        for first, last in cells.spans():
            block = cells.rows(first, last)
            right, left = (
                moments(block, mean, kernel, fast=True).log_mass for mean in (point, -point)
            )
            parts.append(torch.logaddexp(right, left).flatten().cpu())
        columns.append(torch.cat(parts))
    logs = torch.stack(columns, 1).double()
    return logs.sub_(logs.max(1, keepdim=True).values).exp_()


def _fit_coefficients(
    likelihood: Tensor, counts: Tensor, grid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of the grid, the information on the coefficients, and the features that
    they multiply.
    """
    features = torch.stack([(grid / 2) ** power for power in POWERS], 1)
    features = features - features.mean(0)
    multiplicity = torch.ones_like(grid)
    multiplicity[0] = 0.5  # both signs of the other points are counted
    start = torch.tensor([-2.0 if power == 2 else 0.0 for power in POWERS], dtype=torch.float64)
    coefficients, prior = start.clone(), PRIOR_PRECISION * torch.eye(len(POWERS)).double()

    def weights_at(trial: Tensor) -> Tensor:
        return torch.softmax(features @ trial + multiplicity.log(), 0)

    def objective(trial: Tensor) -> float:
        away = trial - start
        return float(
            counts @ (likelihood @ weights_at(trial)).log() - 0.5 * PRIOR_PRECISION * away @ away
        )

    weights, current = weights_at(coefficients), objective(coefficients)
    for _ in range(NEWTON_STEPS):
        scores = (
            likelihood * weights / (likelihood @ weights)[:, None]
        ) @ features - weights @ features
        gradient = counts @ scores - PRIOR_PRECISION * (coefficients - start)
        information = scores.T @ (scores * counts[:, None]) + prior
        step = torch.linalg.solve(information, gradient)
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
    return weights, information, features


# Standard deviations of the score test from which rows or columns count as different; rounds of
# fitting.
MIN_EXCESS, ROUNDS = 5.0, 4


@dataclass(frozen=True, slots=True)
class Scales:
    """√a and √b.

    Args:
        rows: ``(m,)``, of geometric mean 1.
        columns: ``(n,)``, likewise.
        row_variances: Posterior variances of log a; float64.
        column_variances: Posterior variances of log b.
    """

    rows: Tensor
    columns: Tensor
    row_variances: Tensor
    column_variances: Tensor

    def divide(self, cells: CellMatrix) -> CellMatrix:
        """Return cells of x_ij / √(a_i·b_j)."""
        return cells.change_rows(self.divide_rows)

    def divide_rows(self, block: Cells, first: int) -> Cells:
        """Return a block of rows, of which the first has the number ``first``, divided likewise."""
        scale = self.of_rows(first, first + len(block.lo))
        return block.map(lambda part: part / scale)

    def of_rows(self, first: int, last: int) -> Tensor:
        """Return √(a_i·b_j) of the rows from ``first`` to before ``last``."""
        return self.rows[first:last, None] * self.columns


def measure_norm(cells: CellMatrix, deviation: float, scales: Scales) -> tuple[float, float]:
    """Return √E[‖X‖²] before the division, and the standard error of its logarithm from that of the
    scales.

    Args:
        cells: Cells divided by the scales.
        deviation: s0 of their contents.
        scales: The scales.
    """
    open_energy = [torch.zeros(count, dtype=torch.float64) for count in cells.shape]
    variances, total = (scales.row_variances, scales.column_variances), 0.0
    for first, last in cells.spans():
        posterior = moments(cells.rows(first, last), 0.0, deviation)
        share = (
            posterior.variance.double() / deviation**2
        ).cpu()  # of the variance, that the cell leaves open
        energy = (
            ((posterior.mean.square() + posterior.variance) * scales.of_rows(first, last) ** 2)
            .double()
            .cpu()
        )
        energy *= (share**2 * (variances[0][first:last, None] + variances[1]) / 2).exp()
        total += float(energy.sum())
        open_energy[0][first:last] += (energy * share).sum(1)
        open_energy[1].add_((energy * share).sum(0))
    square = sum(float((part**2 * v).sum()) for part, v in zip(open_energy, variances, strict=True))
    return math.sqrt(total), math.sqrt(square) / 2 / total


def unscale(low_rank: LowRank, scales: Scales) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of L before the division, in float64."""
    (left, r_left), (right, r_right) = (
        torch.linalg.qr(part.double())
        for part in (low_rank.u * scales.rows[:, None], (low_rank.vh * scales.columns).T)
    )
    u, s, vh = torch.linalg.svd((r_left * low_rank.values.eta.to(r_left)) @ r_right.T)
    return left @ u, s, vh @ right.T


def measure_lengths(
    held_out: HeldOutCells, low_rank: LowRank, deviation: float, scales: Scales
) -> tuple[Tensor, Tensor]:
    """Return the likeliest length of X along each direction of L before the division, and its
    standard error.

    Entries count by what their cells know. The error is that of sampling.

    Args:
        held_out: Cells that L does not know.
        low_rank: L of the divided cells.
        deviation: s of the divided X − L.
        scales: The scales.
    """
    part, (u, s, vh) = held_out.subsample(), unscale(low_rank, scales)
    rows, columns = part.entries // vh.shape[1], part.entries % vh.shape[1]
    unit = u[rows] * vh.T[columns] / (scales.rows[rows] * scales.columns[columns])[:, None]
    lengths, information = s.clone(), torch.zeros(len(s), len(s)).to(unit)
    for _ in range(3):
        mean = (unit @ lengths).float()[None]
        posterior = moments(part.cells, mean, deviation)
        information = (unit * (1 - posterior.variance[0] / deviation**2)[:, None]).T @ unit
        information += 1e-9 * (1 + information.trace()) * torch.eye(len(s)).to(unit)
        lengths = lengths + torch.linalg.solve(
            information, unit.T @ (posterior.mean - mean)[0].double()
        )
    return lengths.cpu(), deviation * torch.linalg.inv(information).diagonal().sqrt().cpu()


def estimate_linear_lengths(
    held_out: HeldOutCells, low_rank: LowRank, density: Density
) -> tuple[Tensor, float]:
    """Return the length of X in each direction of L from posterior means without L, and its
    standard error.

    With h = E[x | cell] under the density and a = E[h²]/E[x²], Σ k·h/a over entries k of a
    direction is the length whenever E[k | x] is linear in x, whatever the distribution of x
    (Bussgang 1952). The likelihood of N(L, s²) needs a normal remainder: of entries that saturate,
    as in steps of Adam, only the few with small spacings change if the start is exact, and lengths
    come out up to 20% too small. a·L is subtracted from h for a smaller error.

    Args:
        held_out: Cells that L does not know.
        low_rank: L.
        density: The density of the entries.
    """
    part = held_out.subsample()
    rows, columns = part.entries // low_rank.vh.shape[1], part.entries % low_rank.vh.shape[1]
    unit = (low_rank.u[rows] * low_rank.vh.T[columns]).double()
    posterior = density.shape.moments(part.cells, density.deviation)
    mean, variance = posterior.mean[0].double(), posterior.variance[0].double()
    known = float(mean.square().sum() / (mean.square() + variance).sum())
    eta = low_rank.values.eta.to(unit)
    rest = mean / known - unit @ eta
    # Directions are orthogonal, and so nearly are their entries.
    lengths = eta + (unit.T @ rest) / unit.square().sum(0).clamp(min=1e-9)
    count = low_rank.u.shape[0] * low_rank.vh.shape[1]
    return lengths.cpu(), float(rest.std()) * math.sqrt(count / len(rest))


def fit_scales(cells: CellMatrix, size: Size) -> tuple[Scales, CellMatrix, Size] | None:
    """Fit the scales of rows and columns.

    Args:
        cells: Cells of the entries.
        size: Size of X, with one variance for all entries.

    Returns:
        The scales, the cells divided by them, and the size of their contents; None if one variance
            explains the cells
        equally well, by the score test or the Bayesian information criterion.
    """
    scores = _sum_scale_scores(cells, size.deviation)
    if max(_excess_variation(scores, dim) for dim in (0, 1)) < MIN_EXCESS:
        return None
    log_rows, log_columns = (torch.zeros(count, dtype=torch.float64) for count in cells.shape)
    variances = [torch.zeros(count, dtype=torch.float64) for count in cells.shape]
    deviation, divided = size.deviation, cells
    for turn in range(2 * ROUNDS):
        dim = turn % 2
        logs = log_columns if dim else log_rows
        step, variances[dim] = _newton_step(scores, dim, logs)
        logs += step
        logs -= logs.mean()
        scales = Scales(
            *((log / 2).exp().float().to(cells.device) for log in (log_rows, log_columns)),
            *variances,
        )
        divided = scales.divide(cells)
        scores = _sum_scale_scores(divided, deviation)
        deviation *= math.exp(max(-0.5, min(0.5, 0.5 * scores.level)))
    fitted = fit_size(divided, deviation)
    # Cells divided by √(a_i·b_j) have the same probabilities, so that the likelihoods are
    # comparable.
    penalty = (sum(cells.shape) - 2) / 2 * math.log(cells.count)
    if fitted.log_likelihood - size.log_likelihood < penalty:
        return None
    return scales, divided, fitted


@dataclass(slots=True)
class _Scores:
    """Sums over rows and columns of E[x²]/s² − 1 and of q.

    Args:
        score: Σ (E[x²]/s² − 1) of every row, and of every column.
        known: Σ q, likewise.
        per_known: An entry's contribution to the information per q.
        level: Σ (E[x²]/s² − 1) over Σ q of all entries.
    """

    score: tuple[Tensor, Tensor]
    known: tuple[Tensor, Tensor]
    per_known: float
    level: float


def _sum_scale_scores(cells: CellMatrix, deviation: float) -> _Scores:
    """Return the sums for x_ij ~ N(0, s²) given its cell."""
    score = tuple(torch.zeros(count, dtype=torch.float64) for count in cells.shape)
    known = tuple(torch.zeros(count, dtype=torch.float64) for count in cells.shape)
    squares = 0.0
    for first, last in cells.spans():
        posterior = moments(cells.rows(first, last), 0.0, deviation, fast=True)
        excess = (posterior.mean / deviation).square() + posterior.variance / deviation**2 - 1
        removed = 1 - posterior.variance / deviation**2
        for sums, values in ((score, excess), (known, removed)):
            sums[0][first:last] += values.sum(1).double().cpu()
            sums[1].add_(values.sum(0).double().cpu())
        squares += float(excess.double().square().sum())
    total = max(1e-9, float(known[0].sum()))
    return _Scores(
        (score[0], score[1]),
        (known[0], known[1]),
        squares / 4 / total,
        float(score[0].sum()) / total,
    )


def _excess_variation(scores: _Scores, dim: int) -> float:
    """Return the excess variation of the scores of rows (0) or columns (1) over chance, in standard
    deviations.
    """
    information = (scores.per_known * scores.known[dim]).clamp(min=1e-9)
    chi = float(((scores.score[dim] / 2) ** 2 / information).sum())
    return (chi - len(information)) / math.sqrt(2 * len(information))


def _newton_step(scores: _Scores, dim: int, logs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a step of log a (dim 0) or log b and its posterior variances.

    The variance of the prior is fitted by expectation maximization.
    """
    information = (scores.per_known * scores.known[dim]).clamp(min=1e-9)
    gradient = scores.score[dim] / 2
    target = logs + gradient / information  # the maximum of the likelihood alone
    prior = 1.0
    for _ in range(50):
        shrunk = target * information / (information + 1 / prior)
        prior = max(1e-8, float((shrunk**2 + 1 / (information + 1 / prior)).mean()))
    return (shrunk - logs).clamp(-1.5, 1.5), 1 / (information + 1 / prior)
