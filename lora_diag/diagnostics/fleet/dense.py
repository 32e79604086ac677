"""A layer of an adapter whose update is not the product of two stored factors, or whose rank is large; with torch."""

from __future__ import annotations

import math

import torch

from lora_diag.deltas import Delta
from lora_diag.diagnostics.fleet.layer import ENERGY, Measured, layer_of, zero_layer
from lora_diag.errors import InputError
from lora_diag.layers.change import load_change
from lora_diag.linalg import resolve_device
from lora_diag.metrics import energy_curve, rank_at
from lora_diag.thin import sketch


def measure_dense(path: str, delta: Delta, device: str) -> Measured:
    """Measure one layer.

    Args:
        path: The adapter's path.
        delta: The layer.
        device: Device of the computation.

    Raises:
        InputError: The adapter cannot be read, or an entry is not finite.
    """
    torch.set_num_threads(1)  # of this Python thread alone: adapters are measured side by side
    change = load_change(delta, resolve_device(device))
    if change.non_finite is not None:
        raise InputError(f"{path}: {delta.layer}: {change.non_finite}")
    factors = change.decompose(vectors=True)
    if not math.isfinite(factors.fro):
        raise InputError(f"{path}: {delta.layer}: the product of its factors overflows float64")
    rank = change.factors[0].shape[1] if change.factors is not None else None
    if factors.fro == 0.0:
        return zero_layer(rank)
    assert factors.u is not None
    s = factors.s.numpy()
    needed = rank_at(energy_curve(s, factors.fro, factors.complete), ENERGY)
    layer, top = layer_of(s, factors.fro, needed, rank)
    parts = change.factors if change.factors is not None else (change.matrix,)
    arrays = [part.to("cpu", torch.float64).numpy() for part in parts if part is not None]
    update = sketch((arrays[0], arrays[1]) if len(arrays) == 2 else arrays[0], delta.layer)
    columns = factors.u[:, : layer.rank_99].cpu().numpy()
    return Measured(layer, top, update, sketch((columns, columns.T), delta.layer))
