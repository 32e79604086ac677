"""The K largest singular values by block Lanczos with full reorthogonalization, and a bound on the missing energy.

Let M = AᵀA and Q an orthonormal basis of a block Krylov space span{Ω, MΩ, …, M^jΩ}, p columns. In a basis of Q and its
complement, rotated so that the Ritz values θ_i² are on the diagonal,

    M = [ D  Fᵀ ]      D = diag(θ_1², …, θ_p²),   F = the residuals (I − QQᵀ)MQ,
        [ F  N  ]      trace N = ‖A‖_F² − Σθ_i²,  known exactly because ‖A‖_F is.

From below, θ_i ≤ σ_i (Cauchy): the energy found is a lower bound. From above there are two bounds.

(1) All missing energy is in the trace: Σ_{i≤r}σ_i² ≤ Σ_{i≤r}θ_i² + trace N.

(2) Let μ ≥ λ_max(N). By Sylvester's law of inertia M has as many eigenvalues above x > μ as D + Fᵀ(xI − N)⁻¹F, and
    (xI − N)⁻¹ ≤ I/(x − μ). With x = λ_i(M) ≥ θ_r² for i ≤ r, whenever θ_r² > μ,
    λ_i(M) ≤ λ_i(D + FᵀF/(θ_r² − μ)), a p×p problem. Converged Ritz pairs have tiny residuals, and the bound is tight.

μ comes from a second, independent block of b random vectors: for any symmetric N ⪰ 0 with largest eigenvalue L, the
largest Ritz value of the Krylov space of degree q from a Gaussian x is below (1 − ε)L only if ⟨x, v_1⟩² < ‖x‖²(1 −
ε)/(ε T_q(1 + 2ε/(1 − ε))²), T_q the Chebyshev polynomial (the argument of Kuczyński and Woźniakowski 1992, theorem
4.1). ε is chosen such that this happens to all b vectors with probability 1e-10 at most. So (2) holds except with that
probability; (1) always holds.

Products run in the matrix's own precision; the values returned are recomputed in float64 from their subspace, and
their backward error, (m + n)ε in the energy, is part of (1). (2) carries an allowance of 4√n units of roundoff of the
matrix's precision, where independent rounding errors add up to √n (Higham and Mary 2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diag.linalg.factors import Factors, fix_signs
from lora_diag.linalg.streamed import Matrix, normal, times, times_wide

# Columns added at a time: wide enough for matrix products at nearly full speed (32 columns took 1.3 times as long as 16
# at 4096²), narrow enough to stop early.
BLOCK = 32

# Columns and degree of the probe for μ, and the probability that it is too small.
PROBES, DEGREE, FAILURE = 16, 4, 1e-10

# Maximum size of the basis as a fraction of the smaller dimension; beyond it the Gram matrix is cheaper.
LARGEST_BASIS = 0.25


@dataclass(frozen=True, slots=True)
class _Ritz:
    """Ritz values and vectors of M = AᵀA.

    Args:
        squares: θ_i², descending, ``(p,)``, float64.
        vectors: ``(p, p)`` float64; Ritz vectors in the basis Q.
    """

    squares: Tensor
    vectors: Tensor


def decompose_krylov(
    matrix: Matrix,
    fro: float,
    top: int,
    vectors: bool = False,
    tol: float = 1e-4,
    seed: int = 0,
    largest: int | None = None,
) -> Factors | None:
    """Compute the largest singular values until the bound on every energy fraction is below ``tol``.

    Args:
        matrix: A, ``(m, n)``, finite; its scale must let AᵀA neither underflow nor overflow.
        fro: ‖A‖_F.
        top: K, the number of values.
        vectors: Whether to compute singular vectors.
        tol: Required bound on |Ĉ(r) − C(r)|, r ≤ K.
        seed: Seed of the random start and of the probes.
        largest: Maximum number of columns of the basis; None for ``LARGEST_BASIS``.

    Returns:
        The values, lower bounds of the true ones up to float64 rounding; None if the basis would exceed ``largest``, as
        for flat spectra, for which a full method is cheaper, or if a solver fails.
    """
    most = int(LARGEST_BASIS * min(matrix.shape))
    if largest is not None:
        most = min(most, largest)
    if fro == 0.0 or first_basis(top) > most:
        return None
    try:
        return _decompose(matrix, fro, top, vectors, tol, seed, most)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None


def _decompose(matrix: Matrix, fro: float, top: int, vectors: bool, tol: float, seed: int, most: int) -> Factors | None:
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    n = tall.shape[1]
    generator = torch.Generator(matrix.device).manual_seed(seed)
    q, y, z = _start(tall, generator)
    target = first_basis(top)
    while target <= most:
        q, y, z = _grow(tall, q, y, z, target)
        ritz = _rayleigh_ritz(q, y)
        error = _missing(ritz.squares[:top], fro, tall)
        if error > tol and (residual_gram := _promising(ritz, q, z, top, fro, tol)) is not None:
            mu = _enlargement(n) * _largest_outside(tall, q, generator)
            error = min(error, _bound(ritz, residual_gram, top, fro, mu, tall))
        if error <= tol:
            u, s, vh = _values(tall, q.to(torch.float64) @ ritz.vectors[:, :top])
            u, vh = fix_signs(vh.T, u.T) if wide else fix_signs(u, vh)
            error = min(_missing(s**2, fro, tall), error)
            return Factors(s.cpu(), False, f"krylov:{q.shape[1]}", error, fro, *((u, vh) if vectors else ()))
        if _is_flat(ritz, fro, n):
            return None
        target += max(BLOCK, target // 2 // BLOCK * BLOCK)
    return None


def first_basis(top: int) -> int:
    """Return the number of columns of the smallest basis for K values."""
    return 2 * top + BLOCK


def _start(a: Matrix, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first block: Q₁ orthonormal and random, Y = A·Q₁, Z = Aᵀ·Y."""
    omega = torch.randn(a.shape[1], min(BLOCK, a.shape[1]), generator=generator, device=a.device, dtype=a.dtype)
    q, _ = torch.linalg.qr(omega)
    return q, *normal(a, q)


def _grow(a: Matrix, q: Tensor, y: Tensor, z: Tensor, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Add blocks until the basis has ``target`` columns."""
    while q.shape[1] < target:
        block = _orthonormal(z[:, -BLOCK:], q)
        product, back = normal(a, block)
        q, y, z = torch.cat((q, block), 1), torch.cat((y, product), 1), torch.cat((z, back), 1)
    return q, y, z


def _orthonormal(block: Tensor, q: Tensor) -> Tensor:
    """Orthonormalize a block against Q and itself.

    Two rounds of projection and QR suffice while directions remain (Giraud et al. 2005). If the Krylov space is
    exhausted, QR adds arbitrary columns, and a third round removes Q from them.
    """
    for turn in range(3):
        block, r = torch.linalg.qr(block - q @ (q.T @ block))
        diagonal = r.diagonal().abs()
        if turn == 1 and diagonal.min() > 0.5:  # the second projection removed nothing
            break
    return block


def _rayleigh_ritz(q: Tensor, y: Tensor) -> _Ritz:
    """Solve the projected problem, in float64, allowing for a basis that is orthonormal to working precision only."""
    q, y = q.to(torch.float64), y.to(torch.float64)
    inverse = torch.linalg.inv(torch.linalg.cholesky(q.T @ q)).T  # Q·inverse is orthonormal
    squares, w = torch.linalg.eigh(inverse.T @ (y.T @ y) @ inverse)
    return _Ritz(squares.flip(0).clamp_(min=0), inverse @ w.flip(1))


def _residual_gram(ritz: _Ritz, q: Tensor, z: Tensor) -> Tensor:
    """Return FᵀF in the Ritz basis, ``(p, p)``."""
    q, z = q.to(torch.float64), z.to(torch.float64)
    residual = (z - q @ (q.T @ z)) @ ritz.vectors
    return residual.T @ residual


def _values(a: Matrix, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of A restricted to span(V), in float64: U, σ, Vᵀ."""
    v, _ = torch.linalg.qr(v)
    u, r = torch.linalg.qr(times_wide(a, v))
    u_core, s, vh_core = torch.linalg.svd(r)
    return u @ u_core, s, vh_core @ v.T


def _missing(squares: Tensor, fro: float, a: Matrix) -> float:
    """Return bound (1): the fraction of energy that was not found."""
    return max(0.0, 1 - float(squares.sum()) / fro**2) + sum(a.shape) * torch.finfo(torch.float64).eps


def _bound(ritz: _Ritz, residual_gram: Tensor, top: int, fro: float, mu: float, a: Matrix) -> float:
    """Return bound (2) for a given μ, with the allowance for rounding; 1 without a useful bound."""
    gap = float(ritz.squares[top - 1]) - mu
    if gap <= 0:
        return 1.0
    above = torch.linalg.eigvalsh(torch.diag(ritz.squares) + residual_gram / gap).flip(0)
    missed = torch.cumsum(above[:top] - ritz.squares[:top], 0).max()
    # Once for the products in the bound, once for the returned values that replace these.
    rounding = 2 * 4 * math.sqrt(a.shape[1]) * torch.finfo(a.dtype).eps / 2
    return max(0.0, float(missed)) / fro**2 + rounding


def _promising(ritz: _Ritz, q: Tensor, z: Tensor, top: int, fro: float, tol: float) -> Tensor | None:
    """Return FᵀF; None if bound (2) would not hold with an estimate of μ, to save computing it and the probe.

    On power laws and geometric decay λ_max(N) was measured near the Ritz value in the middle of the basis.
    """
    gap = float(ritz.squares[top - 1]) - _enlargement(len(q)) * float(ritz.squares[len(ritz.squares) // 2])
    if gap <= 0:
        return None
    residual_gram = _residual_gram(ritz, q, z)
    return residual_gram if float(residual_gram.diagonal()[:top].sum()) / gap <= tol * fro**2 else None


def _largest_outside(a: Matrix, q: Tensor, generator: torch.Generator) -> float:
    """Return the largest Ritz value of (I − QQᵀ)AᵀA(I − QQᵀ) in the Krylov space of fresh random vectors."""
    block = _orthonormal(torch.randn(a.shape[1], PROBES, generator=generator, device=a.device, dtype=a.dtype), q)
    products = []
    for _ in range(DEGREE):
        product, back = normal(a, block)
        products.append(product)
        q = torch.cat((q, block), 1)
        block = _orthonormal(back, q)
    products.append(times(a, block))
    product = torch.cat(products, 1).to(torch.float64)
    return float(torch.linalg.eigvalsh(product.T @ product)[-1])


def _enlargement(n: int) -> float:
    """Return 1/(1 − ε): μ over the largest Ritz value of the probe, for the smallest ε with the required probability.

    For a Gaussian x, P(|⟨x, v_1⟩| < t) < 0.8·t, and ‖x‖ is about √n.

    Example:
        >>> round(_enlargement(4096), 2)
        1.75
    """
    epsilon = 0.0
    failure = 1.0
    while failure > FAILURE:
        epsilon += 0.01
        chebyshev = math.cosh(DEGREE * math.acosh(1 + 2 * epsilon / (1 - epsilon)))
        failure = min(1.0, 0.8 * math.sqrt(n * (1 - epsilon) / epsilon) / chebyshev) ** PROBES
    return 1 / (1 - epsilon)


def _is_flat(ritz: _Ritz, fro: float, n: int) -> bool:
    """Return whether the basis holds little more energy than its fraction of the dimensions: no decay to exploit."""
    p = len(ritz.squares)
    return float(ritz.squares.sum()) / fro**2 < 2 * p / n
