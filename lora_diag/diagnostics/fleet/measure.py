"""One adapter of a fleet: the norm and rank of its layers, and a sketch for comparison with others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diag.deltas import Delta
from lora_diag.diagnostics.fleet.record import Fleet, FleetLayer
from lora_diag.errors import InputError
from lora_diag.layers.change import Change, load_change
from lora_diag.linalg import Factors
from lora_diag.linalg.sketch import LENGTH, sketch
from lora_diag.metrics import energy_curve, rank_at

# Digits of a sketch, far below its own error.
DIGITS = 4


@dataclass(slots=True)
class _Sums:
    """Running sketches and sums over layers."""

    update: Tensor
    space: Tensor
    top: float = 0.0


def fleet(path: str, kind: str, deltas: Iterable[Delta], device: torch.device) -> Fleet:
    """Measure one adapter layer by layer; nothing of the size of a weight is kept.

    Args:
        path: The adapter's path.
        kind: Type of adapter.
        deltas: Its matrices.
        device: Device of the computation.

    Raises:
        InputError: The adapter cannot be read, or an entry is not finite.
    """
    layers: dict[str, FleetLayer] = {}
    sums = _Sums(torch.zeros(LENGTH, dtype=torch.float64), torch.zeros(LENGTH, dtype=torch.float64))
    for delta in deltas:
        change = load_change(delta, device)
        if change.non_finite is not None:
            raise InputError(f"{path}: {delta.layer}: {change.non_finite}")
        factors = change.decompose(vectors=True)
        if not math.isfinite(factors.fro):
            raise InputError(f"{path}: {delta.layer}: the product of its factors overflows float64")
        layers[delta.layer] = _layer(delta, change, factors, sums)
    ranks = [layer.rank for layer in layers.values()]
    known = [rank for rank in ranks if rank is not None]
    total = sum(known) if len(known) == len(ranks) else None
    fro = math.hypot(*(layer.fro for layer in layers.values()))
    needed = sum(layer.rank_99 for layer in layers.values())
    return Fleet(
        adapter=path,
        kind=kind,
        modules=len(layers),
        dead=sum(layer.fro == 0 for layer in layers.values()),
        rank=max(known, default=None),
        fro=fro,
        total_rank=total,
        total_rank_99=needed,
        used=needed / total if total else None,
        spike=min(1.0, sums.top / fro**2) if fro else None,
        layers=layers,
        update=_rounded(sums.update),
        space=_rounded(sums.space),
    )


def _layer(delta: Delta, change: Change, factors: Factors, sums: _Sums) -> FleetLayer:
    rank = change.factors[0].shape[1] if change.factors is not None else None
    if factors.fro == 0.0:
        return FleetLayer(fro=0.0, rank=rank, rank_99=0, spike=None)
    assert factors.u is not None
    needed = rank_at(energy_curve(factors.s.numpy(), factors.fro, factors.complete), 0.99) or len(factors.s)
    matrix = change.factors if change.factors is not None else change.matrix
    assert matrix is not None
    sums.update += sketch(matrix, delta.layer)
    columns = factors.u[:, :needed]
    sums.space += sketch((columns, columns.T), delta.layer)
    largest = float(factors.s[0])
    sums.top += largest**2
    return FleetLayer(fro=factors.fro, rank=rank, rank_99=needed, spike=min(1.0, (largest / factors.fro) ** 2))


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values.tolist())
