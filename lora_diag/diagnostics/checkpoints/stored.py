"""The updates of one layer at several steps from weights or any adapter, with torch, in row blocks
of all steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_diag.deltas import BLOCK_ENTRIES, Delta, DenseDelta, StoredDelta, row_blocks
from lora_diag.diagnostics.checkpoints import factors
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

Measured = tuple[list[str | None], factors.Evolution | None, float | None]


def measure_base(delta: Delta) -> float | None:
    """Return ‖W_base‖_F; None without BASE, or where it is not finite."""
    base_fro = math.nan if delta.base is None else norm(row_blocks(delta.base, delta.shape))
    return base_fro if math.isfinite(base_fro) else None


def estimate_bytes(task: factors.LayerSeries, settings: factors.CheckpointsSettings) -> int:
    """Estimate the memory of measuring a layer in bytes: one ΔW, blocks of all, and those computed
    in full.
    """
    single = max(bytes_of(delta, _make_allowance(settings)) for delta in task.deltas)
    computed = sum(isinstance(delta, DenseDelta) for delta in task.deltas) * math.prod(task.shape)
    spaces = len(task.deltas) * settings.directions * task.shape[0]
    return single + COMPUTED_ENTRY_BYTES * computed + 100 * BLOCK_ENTRIES + 8 * spaces


def _make_allowance(settings: factors.CheckpointsSettings) -> Allowance | None:
    return None if settings.memory is None else Allowance(settings.memory)


def measure_stored(
    task: factors.LayerSeries, settings: factors.CheckpointsSettings, device: torch.device
) -> Measured:
    """Measure one layer at all checkpoints.

    Args:
        task: The layer.
        settings: Settings of the measurement.
        device: Device of the singular values.

    Returns:
        Why each update is not finite, None if it is; the measurements of those that are, None
            without any; ‖W_base‖_F,
        None without BASE.
    """
    problems: list[str | None] = []
    values: list[Factors] = []
    spaces: list[Tensor] = []
    base_fro = None
    for delta in task.deltas:
        change = load_change(delta, device, allowance=_make_allowance(settings))
        problems.append(change.non_finite)
        if change.non_finite is None:
            found, base_fro = _decompose(change, task.shape, settings.directions), change.base_fro
            if found is None:
                problems[-1] = PRODUCT_OVERFLOW
                continue
            k = factors.count_directions(found.s.numpy(), settings.directions)
            values.append(found)
            spaces.append(found.vectors[0][:, :k].cpu().double())
    finite = [
        delta for delta, problem in zip(task.deltas, problems, strict=True) if problem is None
    ]
    if not finite:
        return problems, None, base_fro
    increments, unchanged = _multiply_increments(finite, task.shape)
    evolution = factors.Evolution(
        s=[each.s.numpy() for each in values],
        fro=[each.fro for each in values],
        increments=increments,
        spaces=[space.numpy() for space in spaces],
        unchanged=unchanged if isinstance(finite[0], StoredDelta) else [None, *unchanged[1:]],
        method=[each.method for each in values],
    )
    return problems, evolution, base_fro


def _decompose(change: Change, shape: tuple[int, int], directions: int) -> Factors | None:
    """Return all singular values of ΔW, with its ``directions`` largest left vectors; None if its
    norm overflows.

    The values that come with the vectors are used where they are all: one Gram matrix gives both.
    """
    if change.factors is not None and not math.isfinite(change.decompose().fro):
        return None
    largest = change.decompose(top=min(directions, *shape), vectors=True)
    values = largest.s if largest.rest is None else torch.cat([largest.s, largest.rest])
    whole = replace(largest, s=values) if len(values) == min(shape) else change.decompose()
    return replace(whole, u=largest.u, vh=largest.vh) if math.isfinite(whole.fro) else None


def _multiply_increments(
    deltas: Sequence[Delta], shape: tuple[int, int]
) -> tuple[factors.Array, list[float | None]]:
    """Return ⟨D_s, D_t⟩ of the increments, D_1 = ΔW_1, and the fraction of their entries that are
    zero.

    A block holds the same rows of all updates, so that one pass suffices and no stored update is in
    memory whole.
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
    return products.numpy(), (unchanged / math.prod(shape)).tolist()
