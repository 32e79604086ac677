"""Short vectors whose inner products estimate those of matrices, to compare thousands without reading any again.

With independent g_t, h_t of independent entries of mean 0 and variance 1, E[(g_tᵀXh_t)(g_tᵀYh_t)] = ⟨X, Y⟩, and the
mean over d such products estimates it (linear sketches as in Alon, Matias and Szegedy 1999). The cosine of two sketches
has an error of about (1 − c²)/√d, where c is that of the matrices (measured: 1.0 to 1.1 times that at ranks 16 and 200,
up to 1.9 times at rank one), negligible for similar matrices. A sketch of several layers is the sum of theirs, each
with its own random signs, so that products of different layers are zero on average.
"""

from __future__ import annotations

import math
import zlib
from functools import lru_cache

import torch
from torch import Tensor

from lora_diag.linalg.stacked import Matrix, shape_of

# Length of a sketch.
LENGTH = 256


@lru_cache(maxsize=32)
def _normals(dimension: int, which: int) -> Tensor:
    """Return g_1 … g_d as rows, ``(LENGTH, dimension)`` float32, equal in every run."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{which}:{dimension}".encode()))
    return torch.randn(LENGTH, dimension, generator=generator)


def _signs(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(0, 2, (LENGTH,), generator=generator).to(torch.float64) * 2 - 1


def sketch(matrix: Matrix, name: str) -> Tensor:
    """Return g_tᵀXh_t/√d for every t, ``(LENGTH,)`` float64 on the CPU.

    Args:
        matrix: X, ``(m, n)``, dense or B and A.
        name: Name of the layer, which determines the signs.
    """
    m, n = shape_of(matrix)
    scaled = [_in_range(part) for part in (matrix if isinstance(matrix, tuple) else (matrix,))]
    *left, right = (part for part, _ in scaled)
    g, h = _normals(m, 0).to(right.device), _normals(n, 1).to(right.device)
    rows, columns = (g @ left[0], h @ right.T) if left else (g @ right, h)
    products = (rows * columns).sum(1).to(torch.float64).cpu() * _signs(name) / LENGTH**0.5
    found: Tensor = products * math.prod(scale for _, scale in scaled)
    return found


def _in_range(matrix: Tensor) -> tuple[Tensor, float]:
    """Return a matrix in float32 with entries up to 2, and the power of two of its scale."""
    largest = float(matrix.abs().max())
    scale = float(2.0 ** max(math.frexp(largest)[1] - 1, -126))
    return (matrix / scale).to(torch.float32), scale
