"""Upper bounds on the energy that a Krylov basis missed.

Let M = AᵀA and Q an orthonormal basis, p columns. In a basis of Q and its complement, rotated so that the Ritz values
θ_i² are on the diagonal,

    M = [ D  Fᵀ ]      D = diag(θ_1², …, θ_p²),   F = the residuals (I − QQᵀ)MQ,
        [ F  N  ]      trace N = ‖A‖_F² − Σθ_i²,  known exactly because ‖A‖_F is.

From below, θ_i ≤ σ_i (Cauchy): the energy found is a lower bound. From above there are two bounds.

(1) All missing energy is in the trace: Σ_{i≤r}σ_i² ≤ Σ_{i≤r}θ_i² + trace N.

(2) Let μ ≥ λ_max(N). By Sylvester's law of inertia M has as many eigenvalues above x > μ as D + Fᵀ(xI − N)⁻¹F, and
    (xI − N)⁻¹ ≤ I/(x − μ). So for every x > μ no more eigenvalues of M than of D + FᵀF/(x − μ) are above x, and
    λ_i(M) ≤ max(x, λ_i(D + FᵀF/(x − μ))) for all i: a p×p problem. With x = θ_r², if that exceeds μ, the bound is tight
    once the Ritz pairs converge. With x just above μ it also bounds values that have not converged, such as those of
    noise, by μ. For every i the least bound of several x is taken.

μ comes from a second, independent block of b Gaussian vectors in the complement, of dimension d. For a single vector y
in any symmetric N ⪰ 0 with largest eigenvalue L and eigenvector v, the largest Ritz value of the Krylov space of degree
q is below (1 − ε)L only if ⟨y, v⟩² < ‖y‖²(1 − ε)/(ε T_q(1 + 2ε/(1 − ε))²), T_q the Chebyshev polynomial (the argument
of Kuczyński and Woźniakowski 1992, theorem 4.1). The block's Krylov space contains that of y = X·(Xᵀv), for which
⟨y, v⟩²/‖y‖² has the distribution Beta(b/2, (d − 1)/2): rotated so that v is an axis, the other axes of y are a Gaussian
vector times the norm of the first. ε is chosen such that the event has probability 1e-10 at most. So (2) holds except
with that probability; (1) always holds. μ also bounds every later, larger basis, whose complement lies in this one.

Products run in the matrix's own precision. (2) carries an allowance for their rounding, where independent errors add up
to √n (Higham and Mary 2019): 4√n units of roundoff u in the energy, and an error E of the computed residuals F̂ with
EᵀE ⪯ n·u²·σ_1²·D, as FᵀF ⪯ (1 + t)F̂ᵀF̂ + (1 + 1/t)EᵀE for every t > 0. The columns of E were measured between 0.5 and
3 u·σ_1·θ_i for n from 1024 to 4096, over power laws, noise, nonnegative and sparse matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_diag.linalg.streamed import Matrix

# Probability that μ is too small.
FAILURE = 1e-10

# The least x over μ, and x over the larger of that and θ_K². Every x bounds the values above it best that have not
# converged: with four instead of one, the bound on power laws at three columns per value was half as large. Beyond
# CONVERGED·μ, θ_K² alone suffices.
ABOVE, FARTHER, CONVERGED = 1.05, (1.0, 1.1, 1.3, 1.8), 2.0


def missing(squares: Tensor, fro: float, a: Matrix) -> float:
    """Return bound (1): the fraction of energy that was not found.

    Args:
        squares: θ_i², float64.
        fro: ‖A‖_F.
        a: A; its shape gives the rounding of the values.
    """
    return max(0.0, 1 - float(squares.sum()) / fro**2) + sum(a.shape) * torch.finfo(torch.float64).eps


def missed(squares: Tensor, residual_gram: Tensor, top: int, fro: float, mu: float, a: Matrix) -> float:
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
    for x in [least] if last > CONVERGED * mu else [factor * least for factor in FARTHER]:
        if x > mu:
            above = torch.linalg.eigvalsh(torch.diag(squares) + bounded / (x - mu)).flip(0)[:top]
            upper = torch.minimum(upper, above.clamp(min=x))
    energy = float((upper - squares[:top]).clamp(min=0).sum())
    return min(1.0, energy / fro**2 + rounding(a))


def rounding(a: Matrix) -> float:
    """Return the allowance of bound (2) for rounding: once for its products, once for the values returned instead."""
    return 2 * 4 * math.sqrt(a.shape[1]) * torch.finfo(a.dtype).eps / 2


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
