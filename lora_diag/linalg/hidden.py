"""An update hidden by rounding: its size and its leading directions, from the cells of a stored
checkpoint.

Model: X = L + noise of variance s², L of low rank. The estimator alternates between the moments of
every entry given its cell and L, and a new L from the shrunk singular values of the posterior mean
(``shrink``). s follows from the size: with s0² the maximum-likelihood variance of X where L = 0,

    s² = s0² − Ση²/(mn)   (rule ``norm``)      or      s² = s0² − Σx²/(mn)   (rule ``debiased``).

Maximizing the likelihood of s itself makes it collapse. The second rule keeps more of the norm of L
and has up to a third less error if cells are informative, but overfits otherwise. A third rule,
``held_out``, maximizes the likelihood of held-out cells, which includes the error of L and does not
collapse: on updates of exactly low rank it has up to half the error of the others. Held-out cells
decide between them (``recover``), and their s is that of the posterior moments. L has momentum
(Nesterov), restarted when it shrinks (O'Donoghue and Candès 2015), and over-relaxation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lora_diag.linalg.cells import CellMatrix, Cells, Shrunk, moments, select_between, shrink
from lora_diag.linalg.streamed import Streamed

# Number of entries from which the start of training is chosen and shapes are scaled, where twice as
# many are distinct.
LARGE_SAMPLE = 2**19

# Maximum step of log s, smallest s/s0, and tolerance: float32 moments permit no finer steps.
MAX_STEP, MIN_DEVIATION, TOLERANCE = 0.3, 0.03, 3e-3
MAX_ITERATIONS = 100

# α: iterations take singular values of (1 − 1/α)L + M/α, M the posterior mean given L. Moments
# change by the fraction 1 − q_ij of a change of L_ij, so that this is a gradient step of size 1/α
# with curvatures q_ij ≤ 1, which momentum β < 1 keeps stable for 1/α < (2 + 2β)/(1 + 2β), hence for
# α > 3/4.
RELAXATION = 0.8

# Singular vectors that are kept beyond the rank of L, and random ones that are added to them, in
# every iteration. With 4 and 8, values near the noise edge took up to twice the iterations to
# appear, and a fit ended without some.
EXTRA = 32

Rule = Literal["norm", "debiased", "held_out"]

# Number of standard errors of the gain in held-out cells from which there are directions, and from
# which another rule is better. With 2 for both 1 of 100 layers of noise had directions; with 3 real
# layers lose less than 1% of ε.
MIN_GAIN, MIN_IMPROVEMENT = 3.0, 2.0

# Fraction of the entries whose cells are held out to test the estimator, their largest number, how
# many of them s is fitted to at most, and how many random numbers are drawn at a time.
HELD_OUT_FRACTION = 0.05
MAX_HELD_OUT = 2**20
MAX_FITTED = 2**17
DRAW_BLOCK = 2**20

# Normal deviate of the upper end of an interval of 95%.
Z95 = 1.96

# Standard deviation of log s about that of the fit, before held-out cells are seen: few cells
# change it little.
PRIOR_DEVIATION = 0.5


@dataclass(frozen=True, slots=True)
class Size:
    """The size of X, with L = 0.

    Args:
        deviation: s0, the standard deviation of its entries.
        fro: √ΣE[x² | cells]: ‖X‖_F.
        error: Standard error of log ‖X‖_F, if the entries are independent and normal.
        information: q, the mean fraction of an entry's variance that its cell removes.
        log_likelihood: Log-likelihood of all cells.
    """

    deviation: float
    fro: float
    error: float
    information: float
    log_likelihood: float


@dataclass(frozen=True, slots=True)
class LowRank:
    """L = U·diag(η)·V, with its singular values.

    Args:
        u: ``(m, k)``.
        vh: ``(k, n)``.
        values: η and x, and the noise of the score.
        deviation: s, of the remainder outside L.
        information: q given L.
        iterations: Number of iterations.
        converged: Whether it converged.
    """

    u: Tensor
    vh: Tensor
    values: Shrunk
    deviation: float
    information: float
    iterations: int
    converged: bool

    @property
    def rank(self) -> int:
        """Number of directions above the noise."""
        return len(self.values.eta)

    @property
    def energy(self) -> float:
        """‖L‖_F²."""
        return float((self.values.eta**2).sum())

    def with_lengths(self, eta: Tensor) -> LowRank:
        """Return U·diag(η)·V for other η."""
        return replace(self, values=replace(self.values, eta=eta))

    def rows(self, first: int, last: int) -> Tensor:
        """Return the rows ``first:last`` of L."""
        return (self.u[first:last] * self.values.eta.to(self.u)) @ self.vh


def fit_size(cells: CellMatrix, guess: float) -> Size:
    """Return the size of X by maximum likelihood, with L = 0.

    log s += ½·log g/q with g = mean E[x²|cell]/s², a scoring step.

    Args:
        cells: Cells of the entries.
        guess: Initial deviation, such as the root mean square of ΔW; positive.
    """
    deviation = guess
    for _ in range(60):
        sums = _sum_moments(cells, deviation)
        step = _scoring_step(sums)
        deviation *= math.exp(step)
        if abs(step) < 1e-4:
            break
    return Size(
        deviation=deviation,
        fro=deviation * math.sqrt(sums.square),
        error=sums.error,
        information=sums.information,
        log_likelihood=sums.log_likelihood,
    )


@dataclass(slots=True)
class _CellSums:
    """Sums over entries: of E[x²]/s², (E[x²]/s² − 1)², 1 − Var[x]/s², and log-likelihoods, given
    the cells.
    """

    square: float = 0.0
    scores: float = 0.0
    known: float = 0.0
    log_likelihood: float = 0.0
    entries: int = 0

    @property
    def information(self) -> float:
        """Mean of 1 − Var[x]/s², at least 1e-9."""
        return max(1e-9, self.known / self.entries)

    @property
    def error(self) -> float:
        """Standard error of log s0: one over the root of the observed information."""
        return 1 / math.sqrt(self.scores) if self.scores > 0 else math.inf


def _sum_moments(cells: CellMatrix, deviation: float) -> _CellSums:
    """Return the sums for x ~ N(0, s²) given its cell, s = ``deviation``."""
    sums = _CellSums()
    for first, last in cells.spans():
        block = cells.rows(first, last)
        posterior = moments(block, 0.0, deviation)
        square = ((posterior.mean / deviation) ** 2 + posterior.variance / deviation**2).double()
        sums.square += block.total(square)
        sums.scores += block.total((square - 1).square())
        sums.known += block.total(1 - posterior.variance / deviation**2)
        sums.log_likelihood += block.total(posterior.log_mass)
        sums.entries += block.count
    return sums


def _scoring_step(sums: _CellSums) -> float:
    """Return a step of log s, of at most a factor of 3."""
    return max(-1.1, min(1.1, 0.5 * math.log(sums.square / sums.entries) / sums.information))


@dataclass(frozen=True, slots=True)
class HeldOutCells:
    """Held-out cells, which a fit does not use.

    Args:
        cells: The cells, as one row.
        entries: Their row-major indices in the matrix.
    """

    cells: Cells
    entries: Tensor

    def low_rank_at(self, low_rank: LowRank) -> Tensor:
        """Return L at the entries, as one row."""
        rows, columns = self.entries // low_rank.vh.shape[1], self.entries % low_rank.vh.shape[1]
        left, right = low_rank.u * low_rank.values.eta.to(low_rank.u), low_rank.vh.T.contiguous()
        spans = torch.split(torch.arange(len(self.entries), device=self.entries.device), 2**12)
        return torch.cat([(left[rows[part]] * right[columns[part]]).sum(1) for part in spans])[None]

    def log_likelihood(self, low_rank: LowRank, deviation: float) -> Tensor:
        """Return the log-likelihood of every cell under N(L, s²)."""
        return moments(self.cells, self.low_rank_at(low_rank), deviation).log_mass

    def subsample(self) -> HeldOutCells:
        """Return at most ``MAX_FITTED`` of the cells, to which s is fitted."""
        count = len(self.entries)
        if count <= MAX_FITTED:
            return self
        sample = torch.arange(0, count, count // MAX_FITTED + 1, device=self.entries.device)
        return HeldOutCells(self.cells.at(sample), self.entries[sample])

    def scoring_step(self, mean: Tensor, deviation: float, center: float) -> float:
        """Return a scoring step of log s for the likelihood of the cells, with a normal prior
        around log ``center``.
        """
        posterior = moments(self.cells, mean, deviation, fast=True)
        square = (posterior.mean - mean) ** 2 + posterior.variance
        excess = float((square / deviation**2 - 1).sum(dtype=torch.float64))
        known = float((1 - posterior.variance / deviation**2).sum(dtype=torch.float64))
        pull = math.log(center / deviation) / PRIOR_DEVIATION**2
        return max(-MAX_STEP, min(MAX_STEP, (excess + pull) / (2 * known + 1 / PRIOR_DEVIATION**2)))

    def fit_deviation(self, low_rank: LowRank) -> float:
        """Return the likeliest s given L, with a normal prior around its own s."""
        part, deviation = self.subsample(), low_rank.deviation
        mean = part.low_rank_at(low_rank)
        for _ in range(40):
            step = part.scoring_step(mean, deviation, low_rank.deviation)
            deviation *= math.exp(step)
            if abs(step) < TOLERANCE:
                break
        return deviation


def _estimate_lengths(
    held_out: HeldOutCells, low_rank: LowRank, deviation: float
) -> tuple[Tensor, float]:
    """Return the likeliest length of X in each direction of L by cells that L does not know, and
    its standard error.
    """
    part = held_out.subsample()
    rows, columns = part.entries // low_rank.vh.shape[1], part.entries % low_rank.vh.shape[1]
    unit = low_rank.u[rows] * low_rank.vh.T[columns]
    lengths, known = low_rank.values.eta.to(unit), torch.zeros(())
    for _ in range(3):  # directions are orthogonal, and so nearly are their entries
        mean = (unit @ lengths)[None]
        posterior = moments(part.cells, mean, deviation, fast=True)
        known = 1 - posterior.variance[0] / deviation**2
        lengths += (unit.T @ (posterior.mean - mean)[0]) / (unit.square().T @ known).clamp(min=1e-9)
    count = low_rank.u.shape[0] * low_rank.vh.shape[1]
    return lengths.double().cpu(), deviation * math.sqrt(
        count / max(float(known.sum(dtype=torch.float64)), 1e-9)
    )


def _estimate_stretch(
    held_out: HeldOutCells, low_rank: LowRank, deviation: float
) -> tuple[float, Tensor]:
    """Compare the lengths of L with those that held-out cells show.

    Shrinkage takes x to η, its length in the direction that was found. Where few entries changed
    both are too small, by up to a third. Σc_i² of lengths c_i in r directions exceeds that of the
    truth by r·SE², and √Σc_i² has a standard error of SE.

    Returns:
        A factor γ ≥ 1 of all values, with a normal prior around 1; and the largest Σ_{i≤r}x_i² that
            held-out cells
        allow over the estimated one, for every r, at least 1.
    """
    lengths, error = _estimate_lengths(held_out, low_rank, deviation)
    eta = low_rank.values.eta.double().cpu()
    square = float(eta.square().sum())
    excess = float((lengths * eta).sum()) / square - 1
    factor = 1 + max(0.0, excess) * PRIOR_DEVIATION**2 / (PRIOR_DEVIATION**2 + error**2 / square)
    return factor, bound_energies(lengths, error, eta)


def bound_energies(lengths: Tensor, error: float, eta: Tensor) -> Tensor:
    """Return the largest Σ_{i≤r}x_i² that lengths allow, over the estimated one, for every r; at
    least 1.

    Args:
        lengths: c_i, the lengths in the directions of L.
        error: Their standard error.
        eta: η of L.
    """
    norms = (lengths.square() - error**2).cumsum(0).clamp(min=0.0).sqrt()
    return ((norms + Z95 * error).square() / eta.square().cumsum(0)).clamp(min=1.0)


def fit_low_rank(
    cells: CellMatrix,
    size: Size,
    rule: Rule = "norm",
    start: LowRank | None = None,
    seed: int = 0,
    held_out: HeldOutCells | None = None,
    keep: bool = True,
) -> LowRank:
    """Estimate L by alternating between posterior means and shrunk singular values.

    Args:
        cells: Cells of the entries.
        size: Size of X.
        rule: Rule for s given L.
        start: Initial L; None for L = 0.
        seed: Seed of the first vectors.
        held_out: Cells that are not to be known; the rule ``held_out`` without them keeps the s of
            ``start``.
        keep: Whether posterior means are kept in memory.

    Returns:
        L; not ``converged`` if ``MAX_ITERATIONS`` did not suffice; of rank 0 if no value is above
            the noise edge.
    """
    shape, s0 = cells.shape, size.deviation
    norm = s0 * math.sqrt(cells.count)
    buffer = torch.empty(shape, device=cells.device) if keep else None
    deviation = s0 if start is None else start.deviation
    part = None if held_out is None else held_out.subsample()
    mean: Callable[[int, int], Tensor | float] = (lambda *_: 0.0) if start is None else start.rows
    momentum, previous, basis = 1.0, start, None if start is None else start.vh.T
    for iteration in range(1, MAX_ITERATIONS + 1):
        relaxation = 1.0 if previous is None else max(RELAXATION, previous.information)
        posterior = _Posterior(cells, mean, deviation, buffer, held_out, relaxation)
        estimate, basis = _compute_shrunk_svd(posterior, basis, seed)
        if rule == "held_out":
            step = (
                0.0
                if part is None
                else part.scoring_step(part.low_rank_at(estimate), deviation, deviation)
            )
        else:
            lengths = estimate.values.eta if rule == "norm" else estimate.values.debiased
            remaining = max(MIN_DEVIATION**2, 1 - float((lengths**2).sum()) / norm**2)
            step = max(-MAX_STEP, min(MAX_STEP, math.log(s0 * math.sqrt(remaining) / deviation)))
        deviation *= math.exp(step)
        limit = TOLERANCE * max(estimate.energy**0.5, 0.01 * norm)
        converged = _distance(estimate, previous) <= limit and abs(step) <= TOLERANCE
        if converged or (estimate.rank == 0 and previous is None):
            return replace(estimate, deviation=deviation, iterations=iteration, converged=True)
        momentum, mean = _extrapolate(momentum, estimate, previous)
        previous = estimate
    return replace(estimate, deviation=deviation, iterations=MAX_ITERATIONS)


@dataclass(slots=True)
class _Posterior:
    """E[X | cells] − (1 − α)·L for a mean L, computed when it is read.

    Args:
        cells: The cells.
        mean: Rows of L.
        deviation: s.
        buffer: Where the blocks of the first pass are kept; None to compute them in every pass.
        held_out: Cells that are not to be known.
        relaxation: α.
        information: q, after the first pass; 0 before.
    """

    cells: CellMatrix
    mean: Callable[[int, int], Tensor | float]
    deviation: float
    buffer: Tensor | None
    held_out: HeldOutCells | None
    relaxation: float
    information: float = 0.0

    def blocks(self) -> Iterator[Tensor]:
        """Yield E[X | cells] − (1 − α)·L in row blocks."""
        if self.buffer is not None and self.information:
            yield from (self.buffer[first:last] for first, last in self.cells.spans())
            return
        variance, columns = 0.0, self.cells.shape[1]
        for first, last in self.cells.spans():
            mean = self.mean(first, last)
            rows = self.cells.rows(first, last)
            block, variances, _ = moments(rows, mean, self.deviation, fast=True, likelihood=False)
            if self.held_out is not None:
                inside = (
                    select_between(self.held_out.entries, first * columns, last * columns)
                    - first * columns
                )
                block.view(-1)[inside] = (
                    mean.reshape(-1)[inside] if isinstance(mean, Tensor) else mean
                )
                variances.view(-1)[inside] = self.deviation**2
            variance += float(variances.sum(dtype=torch.float64))
            if self.relaxation < 1:
                block.sub_(mean, alpha=1 - self.relaxation)
            if self.buffer is not None:
                self.buffer[first:last] = block
            yield block
        self.information = min(
            1.0, max(1e-9, 1 - variance / (self.cells.count * self.deviation**2))
        )

    def shrink(self, u: Tensor, s: Tensor, vh: Tensor) -> LowRank:
        """Return L with the singular values above the noise edge, shrunk."""
        values = shrink(s, self.cells.shape, self.deviation, self.information, self.relaxation)
        rank = len(values.eta)
        return LowRank(u[:, :rank], vh[:rank], values, self.deviation, self.information, 0, False)


def _compute_shrunk_svd(
    posterior: _Posterior, basis: Tensor | None, seed: int
) -> tuple[LowRank, Tensor]:
    """Return L from the values above the noise edge, and a first basis for the next call."""
    shape = posterior.cells.shape
    smaller = min(shape)
    streamed = Streamed(posterior.blocks, shape, device=posterior.cells.device)
    width = 24 if basis is None else basis.shape[1] + EXTRA
    while True:
        width = min(width, smaller)
        passes = 3 if basis is None else 1
        basis = _widen_basis(basis, shape[1], width, posterior.cells.device, seed)
        for _ in range(passes):
            left = torch.linalg.qr(streamed.times(basis))[0]
            basis = streamed.T.times(left)
        # Values above the noise edge are far above the rounding of the Gram matrix in float64.
        squares, small_u = torch.linalg.eigh(basis.double().T @ basis.double())
        s, small_u = (
            squares.flip(0).clamp(min=1e-14 * float(squares[-1]) + 1e-60).sqrt(),
            small_u.flip(1),
        )
        vh = (basis @ small_u.float() / s.float()).T
        found = posterior.shrink(small_u, s, vh)
        if found.rank + 4 <= width or width == smaller:
            return replace(found, u=left @ found.u.float()), vh[: found.rank + EXTRA].T
        basis, width = vh.T, 2 * width


def _widen_basis(
    basis: Tensor | None, columns: int, width: int, device: torch.device, seed: int
) -> Tensor:
    """Return a basis with random columns added up to ``width``."""
    existing = 0 if basis is None else basis.shape[1]
    fresh = torch.randn(
        columns, width - existing, generator=torch.Generator().manual_seed(seed)
    ).to(device)
    return fresh if basis is None else torch.cat([basis, fresh / math.sqrt(columns)], 1)


def _inner(first: LowRank, second: LowRank) -> float:
    """Return ⟨L, L'⟩."""
    if not first.rank or not second.rank:
        return 0.0
    inside = (first.u.T @ second.u).double() * (first.vh @ second.vh.T).double()
    return float(first.values.eta.to(inside) @ inside @ second.values.eta.to(inside))


def _distance(first: LowRank, second: LowRank | None) -> float:
    """Return ‖L − L'‖_F; without L', ‖L‖_F."""
    if second is None:
        return math.sqrt(first.energy)
    return math.sqrt(max(0.0, first.energy + second.energy - 2 * _inner(first, second)))


def _extrapolate(
    momentum: float, low_rank: LowRank, previous: LowRank | None
) -> tuple[float, Callable[[int, int], Tensor]]:
    """Return the next momentum, and the rows of L + β(L − L').

    They are those of L if there is no L' or β = 0, and, with the momentum reset, if L shrinks.
    """
    following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
    beta = (momentum - 1) / following
    if previous is None or not previous.rank or beta == 0.0:
        return following, low_rank.rows
    # L shrinks: the last step overshot
    if _inner(low_rank, previous) > low_rank.energy or low_rank.energy < previous.energy:
        return 1.0, low_rank.rows
    ahead = low_rank.u * low_rank.values.eta.to(low_rank.u) * (1 + beta)
    left = torch.cat([ahead, previous.u * -previous.values.eta.to(low_rank.u) * beta], 1)
    right = torch.cat([low_rank.vh, previous.vh])
    return following, lambda first, last: left[first:last] @ right


@dataclass(frozen=True, slots=True)
class Recovered:
    """The detectable part of L.

    Args:
        z: Mean gain in log-likelihood of held-out cells over L = 0, in standard errors; 0 without a
            direction.
        low_rank: L from all cells; None if z is not significant.
        rule: The rule for s given L.
        deviation: s of X − L̂ by held-out cells, the error of L̂ included.
        stretch: Factor by which η and x of the fit were too small, by held-out cells; ``low_rank``
            has longer η.
        upper: Largest Σ_{i≤r}x_i² that held-out cells allow, over that of the fit, for every r;
            None without L.
        held_out: Held-out cells; None without L.
        unseen: L from the other cells, not stretched; None without L.
    """

    z: float
    low_rank: LowRank | None
    rule: Rule = "norm"
    deviation: float = 0.0
    stretch: float = 1.0
    upper: Tensor | None = None
    held_out: HeldOutCells | None = None
    unseen: LowRank | None = None


def recover(cells: CellMatrix, size: Size, seed: int = 0, keep: bool = True) -> Recovered:
    """Estimate L if held-out cells support it.

    Args:
        cells: Cells of the entries.
        size: Size of X.
        seed: Seed of the held-out cells and of the first vectors.
        keep: Whether posterior means are kept in memory, four bytes an entry; else they are
            computed in every pass.

    Returns:
        L with the rule that held-out cells prefer; without L if they do not support it.
    """
    entries = _draw_held_out(cells.shape, seed, cells.device)
    held_out = HeldOutCells(cells.at(entries), entries)
    baseline = moments(held_out.cells, 0.0, size.deviation).log_mass
    low_rank = fit_low_rank(cells, size, seed=seed, held_out=held_out, keep=keep)
    rule: Rule = "norm"
    if not low_rank.rank:
        return Recovered(0.0, None)
    deviation = held_out.fit_deviation(low_rank)
    gains = held_out.log_likelihood(low_rank, deviation) - baseline
    z = _in_standard_errors(gains)
    if z <= MIN_GAIN:
        return Recovered(z, None)
    first = low_rank
    other_rules: tuple[Rule, ...] = ("held_out", "debiased")
    for other_rule in other_rules:
        if rule == "held_out" and deviation < first.deviation / 2:
            break  # almost nothing is outside L, where ``debiased`` is not better
        fit = fit_low_rank(cells, size, other_rule, first, seed, held_out, keep)
        if not fit.rank:
            continue
        likeliest = held_out.fit_deviation(fit)
        other_gains = held_out.log_likelihood(fit, likeliest) - baseline
        if _in_standard_errors(other_gains - gains) > MIN_IMPROVEMENT:
            low_rank, rule, deviation, gains = fit, other_rule, likeliest, other_gains
    whole = fit_low_rank(cells, size, rule, low_rank, seed, keep=keep)
    stretch, upper = _estimate_stretch(held_out, low_rank, deviation)
    longer = whole.with_lengths(whole.values.eta * stretch)
    if stretch > 1:
        deviation = held_out.fit_deviation(low_rank.with_lengths(low_rank.values.eta * stretch))
    return Recovered(
        _in_standard_errors(gains), longer, rule, deviation, stretch, upper, held_out, low_rank
    )


def _draw_held_out(shape: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """Return the held-out entries as row-major indices, ascending; at least one."""
    total = math.prod(shape)
    share = min(HELD_OUT_FRACTION, MAX_HELD_OUT / total)
    random = torch.Generator().manual_seed(seed)
    parts = []
    for first in range(0, total, DRAW_BLOCK):
        draw = torch.rand(min(DRAW_BLOCK, total - first), generator=random)
        parts.append((draw <= share).nonzero()[:, 0] + first)
    entries = torch.cat(parts)
    return (entries if len(entries) else torch.zeros(1, dtype=torch.long)).to(device)


def _in_standard_errors(gains: Tensor) -> float:
    """Return a mean over its standard error; 0 without one."""
    values = gains.double()
    error = float(values.std()) / math.sqrt(values.numel()) if values.numel() > 1 else 0.0
    return float(values.mean()) / error if error > 0 else 0.0
