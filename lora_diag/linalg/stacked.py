"""Sums and products of matrices, dense or in factored form: a sum of products is one product of stacked factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_diag.linalg.difference import norm
from lora_diag.linalg.exact import decompose_factored

# A, or B and A of a product B·A.
Matrix = Tensor | tuple[Tensor, Tensor]

# Entries formed at a time, as elsewhere.
BLOCK_ENTRIES = 2**20


def stack_products(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return Σ w_k B_kA_k in factored form: [w_1B_1 w_2B_2 …] and [A_1; A_2; …], float64.

    Example:
        >>> pair = torch.ones(2, 1), torch.ones(1, 3)
        >>> b, a = stack_products([pair, pair], [1.0, 2.0])
        >>> b.tolist(), a.shape, (b @ a)[0, 0].item()
        ([[1.0, 2.0], [1.0, 2.0]], torch.Size([2, 3]), 3.0)
    """
    b = torch.cat([weight * pair[0].to(torch.float64) for pair, weight in zip(pairs, weights, strict=True)], dim=1)
    return b, torch.cat([pair[1].to(torch.float64) for pair in pairs], dim=0)


def total(parts: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Return Σ w_k X_k: in factored form if all parts are, else dense, float64.

    Args:
        parts: The X_k, all ``(m, n)``; at least one.
        weights: The w_k.
    """
    pairs = [part for part in parts if isinstance(part, tuple)]
    if len(pairs) == len(parts):
        return stack_products(pairs, weights)
    m, n = shape_of(parts[0])
    summed = torch.zeros(m, n, dtype=torch.float64, device=device_of(parts[0]))
    for part, weight in zip(parts, weights, strict=True):
        row = 0
        for block in rows_of(part):
            summed[row : row + len(block)] += weight * block
            row += len(block)
    return summed


def rows_of(matrix: Matrix) -> Iterator[Tensor]:
    """Yield the rows in blocks, float64; a product is formed one block at a time."""
    m, n = shape_of(matrix)
    step = max(1, BLOCK_ENTRIES // max(1, n))
    for first in range(0, m, step):
        if isinstance(matrix, tuple):
            yield matrix[0][first : first + step].to(torch.float64) @ matrix[1].to(torch.float64)
        else:
            yield matrix[first : first + step].to(torch.float64)


def shape_of(matrix: Matrix) -> tuple[int, int]:
    """Return ``(m, n)`` of a matrix or a product."""
    return (len(matrix[0]), matrix[1].shape[1]) if isinstance(matrix, tuple) else (matrix.shape[0], matrix.shape[1])


def device_of(matrix: Matrix) -> torch.device:
    """Return the device of a matrix, or of B."""
    return matrix[0].device if isinstance(matrix, tuple) else matrix.device


def inner(x: Matrix, y: Matrix) -> float:
    """Return ⟨X, Y⟩ = tr(XᵀY) in float64; for two products from thin matrices only: Σ (B_1ᵀB_2)∘(A_1A_2ᵀ).

    Example:
        >>> x = (torch.ones(2, 1), torch.ones(1, 3))
        >>> inner(x, x), inner(x, torch.ones(2, 3)), inner(torch.ones(2, 3), torch.ones(2, 3))
        (6.0, 6.0, 6.0)
    """
    if isinstance(y, tuple) and not isinstance(x, tuple):
        x, y = y, x
    if isinstance(x, tuple) and isinstance(y, tuple):
        (b, a), (d, c) = ((pair[0].to(torch.float64), pair[1].to(torch.float64)) for pair in (x, y))
        return float(((b.T @ d) * (a @ c.T)).sum())
    return sum(float((left * right).sum()) for left, right in zip(rows_of(x), rows_of(y), strict=True))


def gap(x: Matrix, y: Matrix) -> float:
    """Return ‖X − Y‖_F; for two products by QR of their stacked factors, so that small distances lose no digits.

    Example:
        >>> x = (torch.ones(2, 1), torch.ones(1, 3))
        >>> round(gap(x, (torch.ones(2, 1), torch.zeros(1, 3))), 6), gap(x, torch.ones(2, 3))
        (2.44949, 0.0)
    """
    if isinstance(x, tuple) and isinstance(y, tuple):
        return decompose_factored(*stack_products([x, y], [1.0, -1.0])).fro
    return norm(left - right for left, right in zip(rows_of(x), rows_of(y), strict=True))
