"""Singular values of B·A from its factors: QR of B and of Aᵀ, then the SVD of the r×r core. B·A is never formed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_diag.linalg.difference import norm
from lora_diag.linalg.exact import svd
from lora_diag.linalg.factors import Factors


def decompose_factored(b: Tensor, a: Tensor, top: int | None = None, vectors: bool = False) -> Factors:
    """Compute the singular values of B·A.

    With B = Q_b R_b and Aᵀ = Q_a R_a, B·A = Q_b (R_b R_aᵀ) Q_aᵀ, so the singular values are those of the core R_b R_aᵀ.

    Args:
        b: B, ``(m, r)``, finite.
        a: A, ``(r, n)``, finite.
        top: Number of largest values to keep; None for all min(m, n, r).
        vectors: Whether to compute singular vectors.

    Returns:
        The values that can be nonzero. Every step is backward stable in float64: the computed values are those of (B +
        δB)(A + δA) with ‖δB‖_F ≤ p·ε·‖B‖_F and likewise for A (Higham 2002, theorem 19.4), so each has an error of at
        most δ = 2p·ε·‖B‖_F‖A‖_F, with p = (m + n)·r.
    """
    b, a = b.to(torch.float64), a.to(torch.float64)
    scale = (norm([b]) or 1.0, norm([a]) or 1.0)  # the product of the factors' norms may underflow or overflow
    b, a = b / scale[0], a / scale[1]
    mode = "reduced" if vectors else "r"  # forming Q takes twice as long as R
    q_b, r_b = torch.linalg.qr(b, mode=mode)
    q_a, r_a = torch.linalg.qr(a.T, mode=mode)
    core = svd(r_b @ r_a.T, vectors)
    s = core.s
    energy = float((s**2).sum())
    bound = 2 * (b.shape[0] + a.shape[1]) * b.shape[1] * torch.finfo(torch.float64).eps
    kept = s[:top]
    error = (2 * bound * math.sqrt(len(kept) * energy) + len(kept) * bound**2) / energy if energy else 0.0
    return Factors(
        s=kept * scale[0] * scale[1],
        complete=len(kept) == len(s),
        method="factored",
        energy_error=min(1.0, error),
        fro=math.sqrt(energy) * scale[0] * scale[1],
        u=None if core.u is None else (q_b @ core.u)[:, :top],
        vh=None if core.vh is None else (core.vh @ q_a.T)[:top],
    )
