"""Timing of the kernels of the spectral methods on this machine, with synthetic matrices.

Times the kernels of the methods only; the cost of a whole run is computed in ``decisions.plan.cost``.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lora_diag.linalg.decompose import decompose
from lora_diag.linalg.difference import difference
from lora_diag.linalg.exact import gram_matrix
from lora_diag.linalg.stacked import BLOCK_ENTRIES

# σ_i ∝ i^-DECAY, as for the updates of the benchmark; the work of krylov depends on it.
DECAY = 0.7


def time_full(order: int) -> tuple[float, float]:
    """Return the seconds of a Gram product ``(n, n)`` × ``(n, n)`` and of its eigenvalues.

    Args:
        order: n.
    """
    matrix = torch.randn(order, order, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    gram = gram_matrix(matrix)
    between = time.perf_counter()
    torch.linalg.eigvalsh(gram)
    return between - start, time.perf_counter() - between


def time_leading(order: int, top: int) -> float:
    """Return the seconds for the ``top`` largest values of an ``(n, n)`` matrix with a decaying spectrum.

    Args:
        order: n.
        top: K.
    """
    matrix = make_decaying(order)
    start = time.perf_counter()
    decompose(matrix, top=top)
    return time.perf_counter() - start


def time_pass(order: int) -> float:
    """Return the seconds of the pass over two bf16 matrices ``(n, n)``: copy, subtract, compute norms.

    Args:
        order: n.
    """
    update = make_decaying(order)
    base = torch.full((order, order), 0.02, dtype=torch.bfloat16)
    tuned = (base + update).to(torch.bfloat16)
    rows = max(1, BLOCK_ENTRIES // order)
    start = time.perf_counter()
    # copying a block simulates reading it from a cached file
    blocks = ((b.clone(), t.clone()) for b, t in zip(torch.split(base, rows), torch.split(tuned, rows), strict=True))
    difference(blocks, (order, order), torch.device("cpu"))
    return time.perf_counter() - start


def make_decaying(order: int) -> Tensor:
    """Return an ``(n, n)`` float32 matrix with singular values near i^-0.7."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(order, order, generator=generator) for _ in range(2))
    return (left * torch.arange(1, order + 1) ** -DECAY) @ right / order
