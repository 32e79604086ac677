"""Singular values by LAPACK (cuSOLVER on a GPU), in float64: the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_diag.errors import InputError

# cuSOLVER's drivers, fastest first; the Jacobi one may fail to converge, QR has not been seen to.
CUDA_DRIVERS = ("gesvdj", "gesvd")


def singular_values(matrix: Tensor) -> tuple[Tensor, str, float]:
    """Return all singular values of a matrix.

    Args:
        matrix: ``(m, n)``, finite, float32 or float64.

    Returns:
        The values, descending, float64, on the CPU; the name of what ran; and a bound δ with |σ̂_i − σ_i| ≤ δ.
        The solver returns the exact values of a matrix A + E with ‖E‖_2 ≤ p·ε·‖A‖_2 (Anderson et al., LAPACK Users'
        Guide, 3rd ed., §4.9.1), and |σ_i(A+E) − σ_i(A)| ≤ ‖E‖_2 (Weyl). p is "a modestly growing function" of the
        dimensions; we take max(m, n), far above what is seen.

    Raises:
        InputError: No driver converged.
    """
    values, driver = _svdvals(matrix.to(torch.float64))
    values = values.cpu()
    bound = max(matrix.shape) * torch.finfo(torch.float64).eps * float(values[0])
    return values, f"exact:{driver}", bound


def _svdvals(matrix: Tensor) -> tuple[Tensor, str]:
    drivers = CUDA_DRIVERS if matrix.is_cuda else (None,)
    for driver in drivers:
        try:
            return torch.linalg.svdvals(matrix, driver=driver), driver or "gesdd"
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
    raise InputError(f"the singular value decomposition of a {tuple(matrix.shape)} matrix did not converge")
