"""The updates of one layer at several steps from weights or any adapter, with torch, in row blocks of all steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_diag.deltas import BLOCK_ENTRIES, Delta, DenseDelta, StoredDelta, row_blocks
from lora_diag.diagnostics.checkpoints.factors import ZERO, CheckpointsSettings, Evolution, LayerSeries
from lora_diag.layers.change import (
    COMPUTED_ENTRY_BYTES,
    PRODUCT_OVERFLOW,
    Change,
    bytes_of,
    load_addend,
    load_change,
)
from lora_diag.linalg.difference import norm
from lora_diag.linalg.exact import Factors
from lora_diag.linalg.methods import Allowance


def measure_base(delta: Delta) -> float | None:
    """Return ‖W_base‖_F; None where it is not finite.

    Raises:
        InputError: A file could not be read.
    """
    assert delta.base is not None
    base_fro = norm(row_blocks(delta.base, delta.shape))
    return base_fro if math.isfinite(base_fro) else None


def estimate_stored_bytes(task: LayerSeries, settings: CheckpointsSettings) -> int:
    """Estimate the memory of measuring a layer in bytes: one ΔW, blocks of all, and those computed in full."""
    rows, directions = task.shape[0], settings.directions
    allowance = None if settings.memory is None else Allowance(settings.memory, settings.method, settings.top)
    single = max(bytes_of(delta, allowance) for delta in task.deltas)
    computed = (
        sum(isinstance(delta, DenseDelta) for delta in task.deltas) * COMPUTED_ENTRY_BYTES * math.prod(task.shape)
    )
    return single + computed + 32 * BLOCK_ENTRIES + 8 * len(task.deltas) * directions * rows


Measured = tuple[list[str | None], Evolution | None, float | None]


def measure_stored(task: LayerSeries, settings: CheckpointsSettings, device: torch.device) -> Measured:
    """Measure one layer at all checkpoints.

    Args:
        task: The layer.
        settings: Settings of the measurement.
        device: Device of the singular values.

    Returns:
        Why each update is not finite, None if it is; the measurements of those that are, None without any; ‖W_base‖_F,
        None without BASE.

    Raises:
        InputError: A file could not be read, or a decomposition did not converge.
        MemoryLimitError: The layer does not fit.
    """
    allowance = None if settings.memory is None else Allowance(settings.memory, settings.method, settings.top)
    problems: list[str | None] = []
    values: list[tuple[Factors, Tensor]] = []
    base_fro = None
    for delta in task.deltas:
        change = load_change(delta, device, allowance=allowance)
        factors, problem = None, change.non_finite
        if problem is None:
            factors = change.decompose(settings.method, settings.top, tol=settings.tol, seed=settings.seed)
            problem = None if math.isfinite(factors.fro) else PRODUCT_OVERFLOW
            base_fro = change.base_fro
        problems.append(problem)
        if problem is None and factors is not None:
            values.append((factors, _compute_directions(change, factors, settings)))
    finite = [delta for delta, problem in zip(task.deltas, problems, strict=True) if problem is None]
    if not finite:
        return problems, None, base_fro
    increments, unchanged = _multiply_increments(finite, task.shape)
    spaces = [space for _, space in values]
    overlaps = np.full((len(spaces), len(spaces)), np.nan)
    for i, first in enumerate(spaces):
        for j, second in enumerate(spaces[: i + 1]):
            if k := min(first.shape[1], second.shape[1]):
                overlaps[i, j] = overlaps[j, i] = min(1.0, float((first.T @ second).square().sum()) / k)
    found = Evolution(
        s=[factors.s.numpy() for factors, _ in values],
        complete=[factors.complete for factors, _ in values],
        fro=np.array([factors.fro for factors, _ in values]),
        increments=increments,
        overlaps=overlaps,
        directions=np.array([space.shape[1] for space in spaces], np.int64),
        unchanged=unchanged,
        method=[factors.method for factors, _ in values],
    )
    return problems, found, base_fro


def _compute_directions(change: Change, factors: Factors, settings: CheckpointsSettings) -> Tensor:
    """Return the left singular vectors of the k largest values that are not zero, ``(out, k)`` float64 on the CPU."""
    s = factors.s[: settings.directions]
    k = int((s > ZERO * s[0]).sum()) if factors.fro > 0 else 0
    if k == 0:
        return torch.zeros(0, 0, dtype=torch.float64)
    top = change.decompose(settings.method, k, vectors=True, tol=settings.tol, seed=settings.seed)
    return top.vectors[0][:, :k].to("cpu", torch.float64)


def _multiply_increments(
    deltas: Sequence[Delta], shape: tuple[int, int]
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float64]], list[float | None]]:
    """Return ⟨D_s, D_t⟩ of the increments, D_1 = ΔW_1, and the fraction of their entries that are zero.

    The blocks hold the same rows of all updates, so that one pass suffices and no update is in memory whole.
    """
    products = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    unchanged = torch.zeros(len(deltas), dtype=torch.float64)
    addends = list(map(load_addend, deltas))
    step = max(1, 4 * BLOCK_ENTRIES // (shape[1] * len(deltas)))
    for first in range(0, shape[0], step):
        last = min(shape[0], first + step)
        stack = torch.stack([addend.rows(first, last).reshape(-1) for addend in addends])
        stack[1:] -= stack[:-1].clone()
        products += stack @ stack.T
        unchanged += (stack == 0).sum(dim=1)
    fractions = [float(count) / math.prod(shape) for count in unchanged]
    return products.numpy(), [fractions[0] if isinstance(deltas[0], StoredDelta) else None, *fractions[1:]]
