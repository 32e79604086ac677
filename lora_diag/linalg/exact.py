"""Singular values by LAPACK (cuSOLVER on a GPU), in float64: the reference."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_diag.errors import InputError
from lora_diag.linalg.devices import move, move_if_small
from lora_diag.linalg.factors import Factors, fix_signs

# The drivers, fastest first. Divide and conquer (gesdd) and cuSOLVER's Jacobi (gesvdj) have failed to converge in
# practice; the QR iteration (gesvd) has not.
CPU_DRIVERS = ("gesdd", "gesvd")
CUDA_DRIVERS = ("gesvdj", "gesvd")


class Svd(NamedTuple):
    """A thin singular value decomposition and the driver that computed it."""

    s: Tensor
    u: Tensor | None
    vh: Tensor | None
    driver: str


def decompose_exact(matrix: Tensor, fro: float, top: int | None = None, vectors: bool = False) -> Factors:
    """Compute the singular values of a matrix by a full decomposition.

    Args:
        matrix: A, ``(m, n)``, finite.
        fro: ‖A‖_F.
        top: Number of largest values to keep.
        vectors: Whether to compute singular vectors.

    Returns:
        The values. The solver returns the exact values of A + E with ‖E‖_2 ≤ p·ε·‖A‖_2 (Anderson et al., LAPACK Users'
        Guide, 3rd ed., §4.9.1), so by Weyl |σ̂_i − σ_i| ≤ δ = p·ε·σ_1, and by Cauchy–Schwarz |Σ_{i≤r}(σ̂_i² − σ_i²)| ≤
        2δ√r‖A‖_F + rδ². p is "a modestly growing function" of the dimensions; max(m, n) is used, far above observed
        values.

    Raises:
        InputError: No driver converged.
    """
    factors = svd(matrix.to(torch.float64), vectors)
    kept = factors.s[:top]
    delta = max(matrix.shape) * torch.finfo(torch.float64).eps * float(factors.s[0])
    error = (2 * delta * math.sqrt(len(kept)) * fro + len(kept) * delta**2) / fro**2 if fro else 0.0
    return Factors(
        s=kept,
        complete=len(kept) == min(matrix.shape),
        method=f"exact:{factors.driver}",
        energy_error=error,
        fro=fro,
        u=None if factors.u is None else factors.u[:, :top],
        vh=None if factors.vh is None else factors.vh[:top],
    )


def svd(matrix: Tensor, vectors: bool) -> Svd:
    """Decompose a float64 matrix with the first driver that converges.

    Args:
        matrix: ``(m, n)``, float64, finite.
        vectors: Whether to compute singular vectors.

    Returns:
        Values on the CPU, vectors of fixed signs on the device of the matrix, and the driver's name.

    Raises:
        InputError: No driver converged.
    """
    device = matrix.device
    matrix = move_if_small(matrix)
    for driver in CUDA_DRIVERS if matrix.is_cuda else CPU_DRIVERS:
        try:
            u, s, vh = _run(matrix, driver, vectors)
        except (torch.linalg.LinAlgError, np.linalg.LinAlgError):  # type: ignore[attr-defined]
            continue
        if u is None or vh is None:
            return Svd(s.cpu(), None, None, driver)
        u, vh = fix_signs(u, vh)
        return Svd(s.cpu(), move(u, device), move(vh, device), driver)
    raise InputError(f"the singular value decomposition of a {tuple(matrix.shape)} matrix did not converge")


def _run(matrix: Tensor, driver: str, vectors: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Run one driver: torch offers only gesdd on the CPU, so gesvd is run by SciPy."""
    if driver == "gesvd" and not matrix.is_cuda:
        import scipy.linalg  # 0.1 s, and rarely needed

        parts = scipy.linalg.svd(matrix.numpy(), full_matrices=False, lapack_driver="gesvd")
        u, s, vh = (torch.from_numpy(part) for part in parts)
        return (u, s, vh) if vectors else (None, s, None)
    on_gpu = driver if matrix.is_cuda else None
    if not vectors:
        return None, torch.linalg.svdvals(matrix, driver=on_gpu), None
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False, driver=on_gpu)
    return u, s, vh
