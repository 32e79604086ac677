"""Lower bound of the largest singular value of a matrix that is read once, in row blocks.

For every q with ‖q‖ ≤ 1, ‖Wᵀq‖ ≤ σ_1(W). The part of q that belongs to a block B is B·v, with v the
direction of s = Wᵀq so far (a power step), and the parts before shrink so that the norm of q stays
1:

    y = B·v,   c² = ‖s‖² + ‖y‖²,   s ← (‖s‖·s + Bᵀy)/c.

That is certified whatever v is, and close to σ_1 if the blocks share their leading right singular
vector. A matrix of one block has the power iteration itself (Golub and Van Loan 2013, section 7.3).

Rounding. With u the unit roundoff of the products and b the rows of a block, the error of s is at
most b·u·‖B‖_F·‖q_B‖ in each block (Higham 2002, section 3.5), hence b·u·‖W‖_F over all by the
Cauchy–Schwarz inequality.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Power steps in the first block, where v is not known yet, and in each other block.
FIRST_STEPS, STEPS = 6, 1
# Smallest divisor: a norm whose squares underflow must not give a q of a norm above 1.
TINY = 1e-140


class LargestValue:
    """Running lower bound of σ_1 of a matrix, without waiting for a GPU.

    Args:
        shape: ``(rows, columns)``.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._start = torch.cos(torch.arange(shape[1], dtype=torch.float64).square())
        self._s: Tensor | None = None
        self._unit = 0.0

    def add(self, block: Tensor) -> None:
        """Add the next rows, ``(rows, columns)``."""
        block = block if block.dtype == torch.float64 else block.float()
        s = torch.zeros_like(self._start, device=block.device) if self._s is None else self._s
        v = self._start.to(block.device) if self._s is None else s
        norm = torch.linalg.vector_norm(s)
        for _ in range(FIRST_STEPS if self._s is None else STEPS):
            v = v / torch.linalg.vector_norm(v).clamp(min=TINY)
            y = (block @ v.to(block.dtype)).double()
            c = torch.hypot(norm, torch.linalg.vector_norm(y)).clamp(min=TINY)
            v = norm / c * s + ((y / c).to(block.dtype) @ block).double()
        self._s = v
        self._unit = max(self._unit, len(block) * torch.finfo(block.dtype).eps)

    def bound(self, fro: float) -> float:
        """Return a lower bound of σ_1; ``fro`` is ‖W‖_F."""
        power = (
            0.0
            if self._s is None
            else float(torch.linalg.vector_norm(self._s)) * (1 - 1e-6) - self._unit * fro
        )
        return max(
            fro * (1 - 1e-12) / math.sqrt(min(self._shape)), power
        )  # in this order for a power of NaN
