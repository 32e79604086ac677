"""Singular values of several matrices on top of each other, from the sum of their Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lora_diag.linalg.difference import norm
from lora_diag.linalg.factors import Factors
from lora_diag.linalg.gram import gram_matrix


def decompose_stack(matrices: Iterable[Tensor], top: int | None = None) -> Factors:
    """Compute the singular values of S = [A_1; A_2; …], one A in memory at a time.

    SᵀS = ΣA_tᵀA_t, so they are the roots of the eigenvalues of that sum, in float64.

    Args:
        matrices: The A_t, ``(k_t, n)`` each, finite; at least one.
        top: Keep only so many of the largest values.

    Returns:
        The values, min(Σk_t, n) of them at most. Their bound is that of ``gram`` for a matrix of Σk_t rows.

    Example:
        >>> decompose_stack([torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])]).s.tolist()
        [4.0, 3.0]
    """
    gram: Tensor | None = None
    fro, rows = 0.0, 0
    for matrix in matrices:
        gram = gram_matrix(matrix, gram)
        fro, rows = math.hypot(fro, norm([matrix])), rows + len(matrix)
    if gram is None:
        raise ValueError("a stack of at least one matrix is needed")
    n = len(gram)
    squares = torch.linalg.eigvalsh(gram, UPLO="L").clamp_(min=0).flip(0).cpu()
    possible = min(n, rows)
    kept = squares[:possible][:top].sqrt()
    epsilon = torch.finfo(torch.float64).eps
    gamma = rows * epsilon / (1 - rows * epsilon)
    error = math.sqrt(len(kept)) * gamma + len(kept) * n * epsilon * float(squares[0]) / fro**2 if fro else 0.0
    return Factors(kept, len(kept) == possible, "gram", error, fro)
