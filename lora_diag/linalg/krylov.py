"""Krylov methods: the K largest singular values by block Lanczos, with bounds and costs; eigenpairs
by ARPACK.

The basis. Q is an orthonormal basis of a block Krylov space span{Ω, MΩ, …, M^jΩ} of M = AᵀA, p
columns, with full reorthogonalization. It grows until the bound on the missing energy meets the
tolerance, as long as that is expected to cost less than all singular values: at every check the
bound is extrapolated, and ``krylov_cost`` gives the cost of the columns that are still needed. Flat
spectra are recognized at the first checks, which cost a few percent of the full method that takes
over. The projected problem is solved on the CPU, so that a matrix on a GPU is awaited once per
check, once per probe, and for the values.

The bounds. In a basis of Q and its complement, rotated so that the Ritz values θ_i² are on the
diagonal,

    M = [ D  Fᵀ ]      D = diag(θ_1², …, θ_p²),   F = the residuals (I − QQᵀ)MQ,
        [ F  N  ]      trace N = ‖A‖_F² − Σθ_i²,  known exactly because ‖A‖_F is.

From below, θ_i ≤ σ_i (Cauchy): the energy found is a lower bound. From above there are two bounds.

(1) All missing energy is in the trace: Σ_{i≤r}σ_i² ≤ Σ_{i≤r}θ_i² + trace N.

(2) Let μ ≥ λ_max(N). By Sylvester's law of inertia M has as many eigenvalues above x > μ as D +
Fᵀ(xI − N)⁻¹F, and
    (xI − N)⁻¹ ≤ I/(x − μ). So for every x > μ no more eigenvalues of M than of D + FᵀF/(x − μ) are
    above x, and λ_i(M) ≤ max(x, λ_i(D + FᵀF/(x − μ))) for all i: a p×p problem. With x = θ_r², if
    that exceeds μ, the bound is tight once the Ritz pairs converge. With x just above μ it also
    bounds values that have not converged, such as those of noise, by μ. For every i the least bound
    of several x is taken.

μ comes from a second, independent block of b Gaussian vectors in the complement, of dimension d.
For a single vector y in any symmetric N ⪰ 0 with largest eigenvalue L and eigenvector v, the
largest Ritz value of the Krylov space of degree q is below (1 − ε)L only if ⟨y, v⟩² < ‖y‖²(1 −
ε)/(ε T_q(1 + 2ε/(1 − ε))²), T_q the Chebyshev polynomial (the argument of Kuczyński and
Woźniakowski 1992, theorem 4.1). The block's Krylov space contains that of y = X·(Xᵀv), for which
⟨y, v⟩²/‖y‖² has the distribution Beta(b/2, (d − 1)/2): rotated so that v is an axis, the other axes
of y are a Gaussian vector times the norm of the first. ε is chosen such that the event has
probability 1e-10 at most. So (2) holds except with that probability; (1) always holds. μ also
bounds every later, larger basis, whose complement lies in this one.

Products run in the matrix's own precision. (2) carries an allowance for their rounding, where
independent errors add up to √n (Higham and Mary 2019): 4√n units of roundoff u in the energy, and
an error E of the computed residuals F̂ with EᵀE ⪯ n·u²·σ_1²·D, as FᵀF ⪯ (1 + t)F̂ᵀF̂ + (1 + 1/t)EᵀE
for every t > 0. The columns of E were measured between 0.5 and 3 u·σ_1·θ_i for n from 1024 to 4096,
over power laws, noise, nonnegative and sparse matrices.

Where (1) certifies (nearly all energy was found), and for vectors, the values are recomputed in
float64 from their subspace, and their backward error, (m + n)ε in the energy, is part of it.

The cost decides whether Krylov pays, and when to stop it. Costs are in flops of a thin float32
product. Only ratios are used, never a clock, so that a choice, and with it every byte of a record,
is the same on every machine. They were measured on one core of an Intel Xeon (AVX-512, MKL), where
thin products run at 150 Gflop/s (docs/benchmarks.md has the table). On two cores of an AMD EPYC
(OpenBLAS), thin products ran at 107, the full spectrum at 65; the relative costs differ by less
than 1.5.

The largest eigenpairs of a symmetric operator given by products with vectors come from ARPACK's
implicitly restarted Lanczos (Lehoucq, Sorensen and Yang 1998) by SciPy: memory is that of its
basis, independent of the number of products. A Ritz value is never beyond the true end of the
spectrum, and is within ‖Hv − λv‖ of an eigenvalue; missing an eigenvalue beyond it requires a
random start orthogonal to its eigenvector. Among the others, multiple or clustered eigenvalues may
be skipped in favour of the next. The outermost eigenvalues of both ends without vectors come from
one Lanczos process without restarts, which takes a third of the products and stores three vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_diag.errors import InputError
from lora_diag.linalg.devices import fetch, move
from lora_diag.linalg.exact import Factors, fix_signs
from lora_diag.linalg.streamed import Matrix, normal, times, times_wide

# Probability that μ is too small.
FAILURE = 1e-10

# The least x over μ, and x over the larger of that and θ_K². Every x bounds the values above it
# best that have not converged: with four instead of one, the bound on power laws at three columns
# per value was half as large. Beyond CONVERGED·μ, θ_K² alone suffices.
ABOVE, FARTHER, CONVERGED = 1.05, (1.0, 1.1, 1.3, 1.8), 2.0


def trace_bound(squares: Tensor, fro: float, a: Matrix) -> float:
    """Return bound (1): the fraction of energy that was not found.

    Args:
        squares: θ_i², float64.
        fro: ‖A‖_F.
        a: A; its shape gives the rounding of the values.
    """
    return (
        max(0.0, 1 - float(squares.sum()) / fro**2) + sum(a.shape) * torch.finfo(torch.float64).eps
    )


def inertia_bound(
    squares: Tensor, residual_gram: Tensor, top: int, fro: float, mu: float, a: Matrix
) -> float:
    """Return bound (2) on the fraction of energy that the first values lack, at most 1.

    Args:
        squares: θ_i², descending, ``(p,)``, float64.
        residual_gram: FᵀF in the basis of Ritz vectors, ``(p, p)``.
        top: K; the bound holds for C(r) with every r ≤ K.
        fro: ‖A‖_F.
        mu: μ ≥ λ_max(N).
        a: A; its shape and dtype give the allowance for rounding.
    """
    error = a.shape[1] * (torch.finfo(a.dtype).eps / 2) ** 2 * float(squares[0]) * squares
    computed = float(residual_gram.diagonal()[:top].sum())
    t = min(1.0, math.sqrt(float(error[:top].sum()) / computed)) if computed > 0 else 1.0
    bounded = (1 + t) * residual_gram + torch.diag((1 + 1 / max(t, 1e-9)) * error)
    last = float(squares[top - 1])
    upper = torch.full((top,), math.inf, dtype=torch.float64, device=squares.device)
    least = max(last, ABOVE * mu)  # a smaller x than θ_K² improves none of the K bounds
    points = [least] if last > CONVERGED * mu else [factor * least for factor in FARTHER]
    for x in points:
        if x > mu:
            above = torch.linalg.eigvalsh(torch.diag(squares) + bounded / (x - mu)).flip(0)[:top]
            upper = torch.minimum(upper, above.clamp(min=x))
    energy = float((upper - squares[:top]).clamp(min=0).sum())
    return min(1.0, energy / fro**2 + rounding_allowance(a))


def rounding_allowance(a: Matrix) -> float:
    """Return the allowance of bound (2) for rounding: of its products, and of the returned values,
    taken from Y.
    """
    return 2 * 4 * math.sqrt(a.shape[1]) * torch.finfo(a.dtype).eps / 2


@cache
def enlargement(dimension: int, probes: int, degree: int) -> float:
    """Return 1/(1 − ε): μ over the largest Ritz value of a probe.

    Args:
        dimension: d, of the complement.
        probes: b, random vectors.
        degree: q, of the Krylov space.

    Example:
        >>> round(enlargement(4096, 16, 5), 2)
        1.38
    """
    from scipy.special import betaincinv  # 0.1 s, for the largest values only

    quantile = float(betaincinv(probes / 2, (dimension - 1) / 2, FAILURE)) if dimension > 1 else 1.0
    epsilon = 0.0
    share = math.inf  # largest ⟨y, v⟩²/‖y‖² with which the event is possible
    while share > quantile:
        epsilon += 0.005
        chebyshev = math.cosh(degree * math.acosh(1 + 2 * epsilon / (1 - epsilon)))
        share = (1 - epsilon) / (epsilon * chebyshev**2)
    return 1 / (1 - epsilon)


# Costs of one flop of float64 products relative to that of a thin product in float32: 57 to 78
# Gflop/s.
GRAM = PROJECTED = 2.3

# The same of eigenvalues, fitted by EIGENVALUES·(1 + FEW/n): 29 Gflop/s at order 1152, 42 at 2048,
# 48 at 4096. Up to order 1024 MKL runs at 16 to 19.
EIGENVALUES, FEW, SMALL, UP_TO = 2.4, 1150, 8.5, 1024

# Costs of a column over n: of its QR decompositions, and at every check of its copy in float64.
COLUMN, COPY = 2000, 450

# Cost of the problems of a check over p³ and p² (1.5 ms at p = 96, 15 at 256, 49 at 416), and of a
# probe over mn (22 ms at 2048², 85 at 8192×2048).
CHECK, SMALL_CHECK, PROBE = 56, 19000, 800

# Eigenvectors besides the eigenvalues, over these alone: 1.7 for the largest, 4.9 where all are
# computed (4096²).
SOME_VECTORS = 2.5

# The first two checks, after which hopeless spectra are recognized, may cost this fraction of a
# full method.
LOSS = 0.1

# Columns of the basis over K with which power laws from exponent 0.5 on were certified, and the
# largest cost of trying.
TYPICAL, WORTH = 4.0, 0.75


def full_cost(shape: tuple[int, ...], vectors: bool = False) -> float:
    """Return the cost of all singular values by the Gram matrix.

    Args:
        shape: ``(m, n)``.
        vectors: Whether the largest singular vectors are computed, too.
    """
    n, m = sorted(shape)
    product = GRAM * 17 / 16 * m * n**2  # 17/32 of a full product: linalg.exact.PANELS
    eigenvalues = (SMALL if n <= UP_TO else EIGENVALUES * (1 + FEW / n)) * 4 / 3 * n**3
    return product + eigenvalues * (SOME_VECTORS if vectors else 1.0)


def krylov_cost(shape: tuple[int, ...], checks: Sequence[int], top: int = 0) -> float:
    """Return the cost of a Krylov basis that was checked at these numbers of columns, the last of
    which it has.

    Args:
        shape: ``(m, n)``.
        checks: Columns of the basis at every check.
        top: K, the number of values, to count the probe and the values as well; 0 before the end.
    """
    n, m = sorted(shape)
    columns = checks[-1]
    products = 4.0 * m * n * columns + 4 * n * columns**2 + COLUMN * n * columns
    projected = 4 * PROJECTED * n * columns**2
    checking = sum(CHECK * p**3 + SMALL_CHECK * p**2 + COPY * n * p for p in checks)
    if not top:
        return products + projected + checking
    return products + projected + checking + PROBE * m * n + 2 * PROJECTED * m * columns * top


# Columns added at a time: wide enough for matrix products at nearly full speed (32 columns took 1.3
# times as long as 16 at 4096²), narrow enough to stop early.
BLOCK = 32

# Rows of the basis that are converted to float64 at a time.
GRAM_ROWS = 512

# Columns and degree of the probe for μ. With degree 4 a probe took 0.8 of the time, but μ was 1.13
# times larger, and half of the matrices of a 1 B pair needed 224 columns instead of 192 for 64
# values.
PROBES, DEGREE = 16, 5

# Maximum size of the basis as a fraction of the smaller dimension; beyond it the Gram matrix is
# cheaper.
LARGEST_BASIS = 0.25

# The bound falls faster than a geometric series once Ritz values converge: columns to the next
# check over those that the last two checks predict. With 0.5 power laws of 2048² were checked at
# 224 columns where 192 sufficed.
NEXT = 0.4

# Beyond LOSS: cost of a step to the next check over that of a full method; rate of the bound over
# the one before; bound over the tolerance after a probe that refuted the estimate (it falls by
# about ten with every block near convergence).
STEP, SLOWER, REFUTED = 0.15, 0.15, 20.0

# μ over its estimate up to which the bound is expected to fall as before: 0.9 to 1.6 where a larger
# basis certified a spectrum, 1.8 to 3.8 on plateaus at K, which none did (1536² and 4096²).
MILD = 1.7

# Squared norm of the residual over θ⁴, of a Ritz value θ² near the largest eigenvalue outside the
# basis.
UNCONVERGED = 0.03

# A flat spectrum is followed only if its bound is within this factor of the tolerance. Its bound
# falls at a decreasing rate: from 2.1 times the tolerance 448 columns of 2048² sufficed, from 2.8
# times 832 of 4096² did not. SLOW: columns needed over those that the last two checks predict.
NEAR, SLOW = 2.5, 2.0

# Largest rate at which the bound of a flat spectrum falls: its logarithm by column. 0.002 to 0.005
# were measured; from the last check before the basis held the signal to the next one it falls
# faster.
CREEP = 0.006


@dataclass(frozen=True, slots=True)
class _Basis:
    """A Krylov basis with its products, and their Gram matrices in float64.

    Args:
        q: Q, ``(n, p)``, orthonormal to working precision.
        y: Y = A·Q.
        z: Z = Aᵀ·Y.
        qq: QᵀQ, ``(p, p)``.
        zz: ZᵀZ.
        qz: QᵀZ.
    """

    q: Tensor
    y: Tensor
    z: Tensor
    qq: Tensor
    zz: Tensor
    qz: Tensor


@dataclass(frozen=True, slots=True)
class _Ritz:
    """Ritz values, vectors and residuals of M = AᵀA.

    Args:
        squares: θ_i², descending, ``(p,)``, float64.
        vectors: ``(p, p)`` float64; Ritz vectors in the basis Q.
        residuals: FᵀF in the Ritz basis, ``(p, p)``.
    """

    squares: Tensor
    vectors: Tensor
    residuals: Tensor


def decompose_krylov(
    matrix: Matrix,
    fro: float,
    top: int,
    vectors: bool = False,
    tol: float = 5e-4,
    seed: int = 0,
    largest: int | None = None,
    budget: float | None = None,
) -> Factors | None:
    """Compute the largest singular values until the bound on every energy fraction is below
    ``tol``.

    Args:
        matrix: A, ``(m, n)``, finite; its scale must let AᵀA neither underflow nor overflow.
        fro: ‖A‖_F.
        top: K, the number of values.
        vectors: Whether to compute singular vectors. Then σ_K must also be certified to exceed all
            that was not found: a bound on the energy does not bound the error of the subspace where
            values are close.
        tol: Required bound on |Ĉ(r) − C(r)|, r ≤ K.
        seed: Seed of the random start and of the probes.
        largest: Maximum number of columns of the basis, if below ``LARGEST_BASIS`` of the smaller
            dimension; None for that.
        budget: Maximum cost of the basis, in the unit of ``full_cost``; None for ``WORTH`` of a
            full method.

    Returns:
        The values, lower bounds of the true ones up to rounding, with vectors if requested; None if
            a full method is
        expected to be cheaper, as for flat spectra, if A is zero, if the basis would exceed its
            maximum, or if a solver
        fails.
    """
    max_columns = int(LARGEST_BASIS * min(matrix.shape))
    if largest is not None:
        max_columns = min(max_columns, largest)
    if fro == 0.0 or first_basis(top, vectors) > max_columns:
        return None
    budget = WORTH * full_cost(matrix.shape, vectors) if budget is None else budget
    try:
        return _decompose(matrix, fro, top, vectors, tol, seed, max_columns, budget)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None


def _decompose(
    matrix: Matrix,
    fro: float,
    top: int,
    vectors: bool,
    tol: float,
    seed: int,
    max_columns: int,
    budget: float,
) -> Factors | None:
    """Compute the values as ``decompose_krylov``, or None; a solver that fails raises
    ``LinAlgError``.
    """
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if is_wide else matrix
    generator = torch.Generator().manual_seed(seed)
    basis, mu, target = _make_first_block(tall, generator), math.inf, first_basis(top, vectors)
    progress, correction = _Progress(tall.shape, top, tol, budget), 1.0
    rounds = 3 if tall.device.type == "cpu" else 2
    while target <= max_columns:
        grown = _grow(tall, basis, target, rounds)
        projected = fetch(grown.qq, grown.zz, grown.qz)
        if rounds < 3 and not _is_orthonormal(projected[0], tall.dtype):
            rounds = 3  # the Krylov space is exhausted; these blocks are computed again
            continue
        basis, ritz = grown, _rayleigh_ritz(*projected)
        columns, last, flat = target, float(ritz.squares[top - 1]), _is_flat(ritz, top, fro, tall)
        error = expected = trace_bound(ritz.squares[:top], fro, tall)
        if error > tol:
            assumed = min(mu, correction * _estimate_mu(ritz, fro, tall))
            expected = inertia_bound(ritz.squares, ritz.residuals, top, fro, assumed, tall)
            if (
                mu < math.inf and expected <= tol and (not vectors or last > mu)
            ):  # μ of an earlier probe may do
                error = min(error, inertia_bound(ritz.squares, ritz.residuals, top, fro, mu, tall))
            # A probe needs a margin after a refuted estimate of μ, and where it alone exceeds the
            # cost of a failure, of few values, whose estimate is from beyond K unless it is that of
            # noise.
            few = not flat and 3 * top < columns
            exceeds = progress.exceeds_loss(columns, PROBE) and not progress.exceeds_loss(columns)
            cautious = progress.refuted > 0 or (few and exceeds)
            likely = expected <= (tol / 2 if cautious else tol) and (not vectors or last > assumed)
            if error > tol and likely:
                probed = _bound_outside(tall, basis.q, generator)
                correction, mu = correction * max(1.0, probed / assumed), min(mu, probed)
                expected = inertia_bound(ritz.squares, ritz.residuals, top, fro, mu, tall)
                if not vectors or last > mu:
                    error = min(error, expected)
                if error > tol:
                    progress.refute(probed / assumed)
        if error <= tol:
            return _make_factors(tall, basis, ritz, top, vectors, is_wide, fro, error)
        if flat and (vectors or expected > NEAR * tol):
            return None
        below_noise = last < _noise_edge(ritz, fro, tall)
        target = progress.next_check(columns, max(expected, tol), flat, below_noise, max_columns)
    return None


def first_basis(top: int, vectors: bool = False) -> int:
    """Return the number of columns of the smallest basis for K values: K + 32, or 2K + 32 with
    vectors, in blocks.

    That is rounded up to whole blocks of ``BLOCK`` columns, of which there are at least two.

    Args:
        top: K.
        vectors: Whether to compute singular vectors.
    """
    return max(2, math.ceil((2 if vectors else 1) * top / BLOCK) + 1) * BLOCK


def may_be_cheaper(shape: tuple[int, ...], top: int, vectors: bool = False) -> bool:
    """Return whether K values of a matrix may be cheaper than all of them.

    They may if the first basis is within ``LARGEST_BASIS``, two failed checks cost at most ``LOSS``
    of a full method, and a typical success at most ``WORTH``.

    Args:
        shape: ``(m, n)``.
        top: K, the number of values.
        vectors: Whether to compute singular vectors.

    Example:
        >>> may_be_cheaper((4096, 4096), 64), may_be_cheaper((512, 512), 64)
        (True, False)
    """
    first = first_basis(top, vectors)
    checks = (first, first + math.ceil(top / 2 / BLOCK) * BLOCK)
    if first > LARGEST_BASIS * min(shape):
        return False
    full = full_cost(shape, vectors)
    success = krylov_cost(shape, (*checks, max(checks[-1] + 32, round(TYPICAL * top))), top)
    return krylov_cost(shape, checks) <= LOSS * full and success <= WORTH * full


def smallest_order(top: int) -> int:
    """Return the order of the smallest square matrix of which K values may be cheaper than all of
    them, within 32.

    Example:
        >>> smallest_order(8), smallest_order(64)
        (896, 1504)
    """
    order = BLOCK
    while not may_be_cheaper((order, order), top):
        order += BLOCK
    return order


class _Progress:
    """How the bound fell from check to check, and whether the columns that it still needs are worth
    their cost.

    Up to ``LOSS`` of the cost of a full method any spectrum is followed whose predicted cost is
    within the budget. Beyond, a step costs ``STEP`` of a full method at most, or adds one block, or
    an eighth of the columns in whole blocks. It must keep what was predicted: a rate of ``SLOWER``
    times the last one, and after a probe that found μ above ``MILD`` times its estimate a bound
    within ``REFUTED`` of the tolerance. So a spectrum that disappoints costs about ``LOSS`` +
    ``STEP``, unless it kept its promise at earlier checks beyond ``LOSS``.
    """

    def __init__(self, shape: tuple[int, ...], top: int, tol: float, budget: float) -> None:
        self.shape = shape
        self.top = top
        self.tol = tol
        self.budget = budget
        self.full = full_cost(shape)
        self.checks: list[tuple[int, float]] = []
        self.rate = self.refuted = 0.0
        self.mildly = False

    def refute(self, factor: float) -> None:
        """Count a probe that did not confirm the expected bound: μ is larger than its estimate by
        ``factor``.
        """
        self.refuted += PROBE * math.prod(self.shape)
        self.mildly = factor < MILD

    def exceeds_loss(self, columns: int, probe: float = 0.0) -> bool:
        """Return whether a check at so many columns, and a probe at this cost per entry, cost more
        than ``LOSS``.
        """
        beyond = self.cost(columns) + probe * math.prod(self.shape) > LOSS * self.full
        return beyond and self.budget < math.inf

    def cost(self, columns: int, top: int = 0) -> float:
        """Return the cost of all checks and refuted probes so far, and of a check at so many
        columns.
        """
        return self.refuted + krylov_cost(
            self.shape, [*(p for p, _ in self.checks if p < columns), columns], top
        )

    def next_check(
        self, columns: int, bound: float, flat: bool, below_noise: bool, max_columns: int
    ) -> int:
        """Record a check that missed ``tol``; return the number of columns at the next one.

        More than ``max_columns`` if a full method is expected to be cheaper.

        Args:
            columns: Columns of the basis.
            bound: The bound with that basis, at least ``tol``.
            flat: Whether the spectrum is that of noise.
            below_noise: Whether θ_K is below the edge of noise with the energy that was not found.
            max_columns: Maximum number of columns.
        """
        previous = self.checks[-1] if self.checks else None
        costly = self.exceeds_loss(columns)
        if costly and self.refuted and not self.mildly and bound > REFUTED * self.tol:
            return max_columns + 1
        self.checks.append((columns, bound))
        rate, needed = 0.0, self.top / 2
        if previous is not None:
            rate = math.log(previous[1] / bound) / (columns - previous[0])
            if self.mildly:  # the bound before was that of the estimate
                rate = max(rate, self.rate)
            if flat:
                rate = min(rate, CREEP)
            if costly and rate < SLOWER * self.rate:
                return max_columns + 1
            needed = math.inf
            if rate > 0:
                needed = (SLOW if flat else NEXT) * math.log(bound / self.tol) / rate
        self.rate, self.mildly = rate, False
        total = math.ceil(columns + max(1, min(needed, max_columns)))
        if self.cost(total, self.top) > self.budget:
            return max_columns + 1
        blocks = max(1, round((total - columns) / BLOCK))
        affordable = max(LOSS * self.full, self.cost(columns) + STEP * self.full)
        while blocks > 1 and self.cost(columns + blocks * BLOCK) > affordable:
            blocks -= 1
        # a check costs as much as some columns, and more with the size of the basis
        target = columns + max(math.ceil(columns / 8 / BLOCK), blocks) * BLOCK
        hopeless = below_noise and not flat and bound > REFUTED * self.tol
        return max_columns + 1 if hopeless and self.exceeds_loss(target) else target


def _make_first_block(a: Matrix, generator: torch.Generator) -> _Basis:
    """Return the basis of one block, Q₁ random and orthonormal, with its products."""
    q, _ = torch.linalg.qr(_draw_random(a, min(BLOCK, a.shape[1]), generator))
    empty = torch.empty(0, 0, device=a.device, dtype=torch.float64)
    return _extend(
        _Basis(q[:, :0], q.new_empty(a.shape[0], 0), q[:, :0], empty, empty, empty),
        q,
        *normal(a, q),
    )


def _draw_random(a: Matrix, columns: int, generator: torch.Generator) -> Tensor:
    """Return a Gaussian matrix ``(n, columns)``, drawn on the CPU: the same for every device."""
    return move(torch.randn(a.shape[1], columns, generator=generator, dtype=a.dtype), a.device)


def _grow(a: Matrix, basis: _Basis, target: int, rounds: int) -> _Basis:
    """Return the basis with blocks added until it has ``target`` columns."""
    q, back = basis.q, basis.z
    blocks, products, backs = list[Tensor](), list[Tensor](), list[Tensor]()
    while q.shape[1] < target:
        block = _orthonormalize(back[:, -BLOCK:], q, rounds)
        product, back = normal(a, block)
        q = torch.cat((q, block), 1)
        for stored, new in zip((blocks, products, backs), (block, product, back), strict=True):
            stored.append(new)
    return (
        _extend(basis, *(torch.cat(new, 1) for new in (blocks, products, backs)))
        if blocks
        else basis
    )


def _extend(basis: _Basis, q: Tensor, y: Tensor, z: Tensor) -> _Basis:
    """Return a basis with more columns and their products."""
    new = {"q": q, "y": y, "z": z}
    whole = {name: torch.cat((getattr(basis, name), columns), 1) for name, columns in new.items()}
    old = basis.q.shape[1]
    products = basis.qq.new_zeros(3, whole["q"].shape[1], q.shape[1])
    below = basis.qq.new_zeros(q.shape[1], old)
    # by rows that stay in the cache: new pages for copies of Q and Z took a third of the time
    rows = GRAM_ROWS if q.device.type == "cpu" else len(q)
    for q_rows, z_rows in zip(
        *(torch.split(whole[name], rows) for name in ("q", "z")), strict=True
    ):
        left, right = q_rows.to(torch.float64), z_rows.to(torch.float64)
        for product, one, other in zip(
            products, (left, right, left), (left, right, right), strict=True
        ):
            product.addmm_(one.T, other[:, old:])
        below.addmm_(left[:, old:].T, right[:, :old])
    corners = (basis.qq, products[0, :old].T), (basis.zz, products[1, :old].T), (basis.qz, below)
    grams = (
        torch.cat((torch.cat(corner), last), 1)
        for corner, last in zip(corners, products, strict=True)
    )
    return _Basis(*whole.values(), *grams)


def _orthonormalize(block: Tensor, q: Tensor, rounds: int = 3) -> Tensor:
    """Orthonormalize a block against Q and itself.

    Two rounds of projection and QR suffice while directions remain (Giraud et al. 2005). If the
    Krylov space is exhausted, QR adds arbitrary columns, and a third round removes Q from them. A
    GPU would have to be awaited for that decision; there, ``rounds`` are made.
    """
    for turn in range(rounds):
        block, r = torch.linalg.qr(block - q @ (q.T @ block))
        diagonal = r.diagonal().abs()
        if (
            turn == 1 and r.device.type == "cpu" and diagonal.min() > 0.5
        ):  # the second projection removed nothing
            break
    return block


def _is_orthonormal(gram: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a basis with this Gram matrix is orthonormal to working precision: within
    1.2e-5 in float32.
    """
    return (
        float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max())
        < 100 * torch.finfo(dtype).eps
    )


def _rayleigh_ritz(qq: Tensor, zz: Tensor, qz: Tensor) -> _Ritz:
    """Solve the projected problem, in float64, allowing for a basis that is orthonormal to working
    precision only.

    With Q·C orthonormal, the residuals of its columns have the Gram matrix Cᵀ(ZᵀZ −
    (CᵀQᵀZ)ᵀ(CᵀQᵀZ))C. QᵀZ replaces YᵀY, whose rows are those of A: where A has four times as many
    rows as columns, that was half of the projection.
    """
    c = torch.linalg.inv(torch.linalg.cholesky(qq)).T
    inside = c.T @ qz
    projected = inside @ c
    squares, w = torch.linalg.eigh((projected + projected.T) / 2)
    vectors = c @ w.flip(1)
    residuals = vectors.T @ (zz - inside.T @ inside) @ vectors
    return _Ritz(squares.flip(0).clamp_(min=0), vectors, residuals)


def _make_factors(
    a: Matrix,
    basis: _Basis,
    ritz: _Ritz,
    top: int,
    vectors: bool,
    is_wide: bool,
    fro: float,
    error: float,
) -> Factors:
    """Return the singular values of A restricted to span(V), V the first Ritz vectors, with their
    bound.

    Where bound (2) certifies, its allowance for rounding covers values from Y = A·Q. Bound (1) may
    be smaller than that rounding, which also vectors would have: there, A·V is computed in float64.
    """
    columns, c = basis.q.shape[1], move(ritz.vectors[:, :top], a.device)
    u = vh = None
    if error >= trace_bound(ritz.squares[:top], fro, a):
        error = math.inf  # of bound (1), which the values in float64 replace
    elif not vectors:
        product = times_wide(basis.y, c)
        s = torch.linalg.eigvalsh((product.T @ product).cpu()).clamp_(min=0).sqrt_().flip(0)
        return Factors(s, False, f"krylov:{columns}", error, fro)
    v, _ = torch.linalg.qr(basis.q.to(torch.float64) @ c)
    product = times_wide(a, v)
    if vectors:
        u, r = torch.linalg.qr(product)
        u_core, s, vh_core = torch.linalg.svd(r.cpu())
        u, vh = u @ move(u_core, a.device), move(vh_core, a.device) @ v.T
        u, vh = fix_signs(vh.T, u.T) if is_wide else fix_signs(u, vh)
    else:
        s = torch.linalg.svdvals(torch.linalg.qr(product, mode="r").R.cpu())
    error = min(trace_bound(s**2, fro, a), error)
    return Factors(s, False, f"krylov:{columns}", error, fro, u, vh)


def _bound_outside(a: Matrix, q: Tensor, generator: torch.Generator) -> float:
    """Return μ ≥ the largest eigenvalue of (I − QQᵀ)AᵀA(I − QQᵀ), from the Krylov space of fresh
    random vectors.
    """
    dimension = a.shape[1] - q.shape[1]
    block = _orthonormalize(_draw_random(a, PROBES, generator), q)
    products = []
    for _ in range(DEGREE):
        product, back = normal(a, block)
        products.append(product)
        q = torch.cat((q, block), 1)
        block = _orthonormalize(back, q)
    products.append(times(a, block))
    product = torch.cat(products, 1).to(torch.float64)
    largest = float(torch.linalg.eigvalsh((product.T @ product).cpu())[-1])
    return enlargement(dimension, block.shape[1], DEGREE) * largest


def _estimate_mu(ritz: _Ritz, fro: float, a: Matrix) -> float:
    """Return an estimate of μ, to save a probe.

    λ_max(N) was measured near the first Ritz value θ_i² whose squared residual norm is above
    UNCONVERGED·θ_i⁴ (0.01 to 0.1 on power laws, ranks and 96 to 256 columns), and at the edge of
    the Marchenko–Pastur distribution for noise.
    """
    p = len(ritz.squares)
    unconverged = ritz.residuals.diagonal() > UNCONVERGED * ritz.squares**2
    first = int(unconverged.to(torch.uint8).argmax()) if bool(unconverged.any()) else p - 1
    largest = max(float(ritz.squares[max(first, p // 3, (p - 48) // 2)]), _noise_edge(ritz, fro, a))
    return enlargement(a.shape[1] - p, PROBES, DEGREE) * largest


def _is_flat(ritz: _Ritz, top: int, fro: float, a: Matrix) -> bool:
    """Return whether fewer than min(K, p/2) Ritz values exceed the edge of noise with the energy
    that was not found.
    """
    edge = _noise_edge(ritz, fro, a)
    return int((ritz.squares > edge).sum()) < min(top, len(ritz.squares) // 2)


def _noise_edge(ritz: _Ritz, fro: float, a: Matrix) -> float:
    """Return λ_max of a noise matrix that has the energy of N and its shape (Marchenko and Pastur
    1967).
    """
    m, n = a.shape
    energy = max(0.0, fro**2 - float(ritz.squares.sum()))
    return energy / (n - len(ritz.squares)) * (1 + math.sqrt(n / m)) ** 2


# An operator this small is written out: one product a column is what Lanczos would take, too.
DENSE_UP_TO = 64

# Relative tolerance of ARPACK. Its bound is on the residual; the error of the eigenvalue is
# proportional to its square.
TOLERANCE = 1e-3

# Number of basis vectors, and maximum number of restarts.
BASIS_SIZE, MAX_RESTARTS = 20, 30

NOT_FINITE = "a Hessian-vector product is not finite: the weights are broken, or the loss overflows"


@dataclass(frozen=True, slots=True)
class Eigenpairs:
    """Eigenpairs at one end of a symmetric operator; without vectors, these have no columns.

    Args:
        values: ``(k,)`` float64, the outermost first.
        vectors: ``(n, k)``, of norm 1.
        residual: ‖Hv − λv‖ of the outermost.
        products: Number of products, including that for the residual.
    """

    values: Tensor
    vectors: Tensor
    residual: float
    products: int


def basis_size(size: int, count: int) -> int:
    """Return the number of vectors of size ``size`` in the basis of Lanczos for ``count``
    eigenvalues.

    >>> basis_size(10**6, 1), basis_size(10**6, 30), basis_size(100, 60)
    (20, 61, 100)
    """
    return min(size, max(2 * count + 1, BASIS_SIZE))


def eigenpairs(
    product: Callable[[Tensor], Tensor], size: int, count: int, seed: int, device: torch.device
) -> Eigenpairs:
    """Return the largest eigenvalues, by sign, with eigenvectors.

    Args:
        product: H·x for x ``(n,)`` float32 on the device.
        size: n.
        count: Number of eigenvalues; fewer if the operator has fewer.
        seed: Seed of the random start.
        device: Device of x.

    Raises:
        InputError: Lanczos failed or did not converge, or a product is not finite.

    Reference:
        Lehoucq, Sorensen and Yang 1998, ARPACK Users' Guide.

    Example:
        >>> h = torch.diag(torch.arange(-3.0, 97.0))
        >>> found = eigenpairs(lambda x: h @ x, 100, 2, 0, torch.device("cpu"))
        >>> found.values.round(decimals=3).tolist()
        [96.0, 95.0]
    """
    calls = 0

    def times(x: Any) -> Any:
        nonlocal calls
        calls += 1
        y = product(torch.as_tensor(x, dtype=torch.float32).reshape(-1).to(device))
        if not bool(torch.isfinite(y).all()):
            raise InputError(NOT_FINITE)
        return y.cpu().numpy()

    if size <= max(DENSE_UP_TO, count + 1):
        values, vectors = _solve_dense(times, size, count)
    else:
        values, vectors = _run_lanczos(times, size, count, seed)
    first = vectors[:, 0]
    residual = torch.from_numpy(times(first.numpy())).double() - values[0] * first.double()
    return Eigenpairs(values, vectors.to(device), float(residual.norm()), calls)


def extreme_eigenpairs(
    product: Callable[[Tensor], Tensor], size: int, seed: int, device: torch.device
) -> tuple[Eigenpairs, Eigenpairs]:
    """Return the largest and the smallest eigenvalue, by sign, from one Lanczos process; without
    eigenvectors.

    All products are counted for the smallest. Tolerances are relative to the largest in size, since
    the many near-zero eigenvalues of a Gauss–Newton matrix would never meet one of their own size.
    Three vectors are stored, not a basis. Without reorthogonalization rounding adds copies of
    converged Ritz values, which leave the outermost ones and their residuals β_j|s_j| valid to
    rounding (Paige 1980).

    Args:
        product: As in ``eigenpairs``.
        size: n.
        seed: Seed of the random start.
        device: Device of x.

    Raises:
        InputError: Lanczos did not converge, or a product is not finite.

    Reference:
        Paige 1980, "Accuracy and effectiveness of the Lanczos algorithm for the symmetric
        eigenproblem".

    Example:
        >>> h = torch.diag(torch.arange(-3.0, 97.0))
        >>> top, bottom = extreme_eigenpairs(lambda x: h @ x, 100, 0, torch.device("cpu"))
        >>> (
        ...     abs(float(top.values) - 96) < top.residual,
        ...     abs(float(bottom.values) + 3) < bottom.residual,
        ... )
        (True, True)
    """
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device)
    x /= torch.linalg.vector_norm(x, dtype=torch.float64)
    before, beta, steps = torch.zeros_like(x), 0.0, BASIS_SIZE * MAX_RESTARTS
    t = torch.zeros(steps, steps, dtype=torch.float64)  # eigh reads the lower triangle
    for step in range(1, steps):
        y = product(x).sub_(before, alpha=beta)
        t[step - 1, step - 1] = alpha = float((x * y).sum(dtype=torch.float64))
        y.sub_(x, alpha=alpha)
        t[step, step - 1] = beta = float(torch.linalg.vector_norm(y, dtype=torch.float64))
        if not math.isfinite(beta):
            raise InputError(NOT_FINITE)
        values, vectors = torch.linalg.eigh(t[:step, :step])
        errors = beta * vectors[-1].abs()
        if max(errors[0], errors[-1]) <= TOLERANCE * values.abs().max():
            none = torch.empty(size, 0, device=device)
            top = Eigenpairs(values[-1:], none, float(errors[-1]), 0)
            return top, Eigenpairs(values[:1], none, float(errors[0]), step)
        before, x = x, y.div_(beta)
    raise InputError(
        "Lanczos", f"did not converge in {step} products", "give another $seed, or fewer layers"
    )


def _solve_dense(times: Callable[[Any], Any], size: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues, descending, and their vectors, from the whole matrix."""
    columns = torch.stack(
        [torch.from_numpy(times(unit.numpy())) for unit in torch.eye(size)], 1
    ).double()
    values, vectors = torch.linalg.eigh((columns + columns.T) / 2)
    return values.flip(0)[:count], vectors.flip(1)[:, :count].float()


def _run_lanczos(
    times: Callable[[Any], Any], size: int, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues, descending, and their vectors.

    Raises:
        InputError: Lanczos failed or did not converge.
    """
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh  # 0.1 s

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator)
    operator = LinearOperator((size, size), matvec=times, dtype="float32")
    limits: dict[str, Any] = {
        "ncv": basis_size(size, count),
        "tol": TOLERANCE,
        "maxiter": MAX_RESTARTS,
    }
    try:
        values, vectors = eigsh(operator, k=count, which="LA", v0=start.numpy(), **limits)
    except ArpackNoConvergence as error:
        problem = f"the largest eigenvalues did not converge in {MAX_RESTARTS} restarts"
        raise InputError("Lanczos", problem, "give fewer $eigenvalues") from error
    except ArpackError as error:
        # of an operator that is zero, as of a layer that the loss does not depend on
        if times(start.numpy()).any():
            raise InputError(f"Lanczos failed: {error}") from error
        random = torch.randn(size, count, generator=generator)
        return torch.zeros(count, dtype=torch.float64), torch.linalg.qr(random)[0]
    order = torch.argsort(torch.from_numpy(values), descending=True)
    return torch.from_numpy(values).double()[order], torch.from_numpy(vectors)[:, order]
