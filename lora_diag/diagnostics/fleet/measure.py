"""One adapter of a fleet: the norm and rank of its layers, and a sketch for comparison with others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np

from lora_diag.deltas import Delta
from lora_diag.diagnostics.fleet.layer import Measured, is_thin, measure_thin
from lora_diag.diagnostics.fleet.record import Fleet, FleetLayer
from lora_diag.errors import InputError
from lora_diag.thin import LENGTH

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Layers that are computed together: of rank 16, what is left of them takes 6 MB.
TOGETHER = 32

# Digits of a sketch, far below its own error.
DIGITS = 4


def fleet(path: str, kind: str, deltas: Iterable[Delta], device: str) -> Fleet:
    """Measure one adapter layer by layer; nothing of the size of a weight is kept.

    Args:
        path: The adapter's path.
        kind: Type of adapter.
        deltas: Its matrices.
        device: Device of the computation; thin factors are measured with NumPy on ``cpu``.

    Raises:
        InputError: The adapter cannot be read, or an entry is not finite.
    """
    layers: dict[str, FleetLayer] = {}
    update, space, top = np.zeros(LENGTH), np.zeros(LENGTH), 0.0  # top²: Σσ_1²
    for delta, found in _measure_layers(path, deltas, device):
        layers[delta.layer] = found.layer
        top = math.hypot(top, found.top)
        if found.update is not None and found.space is not None:
            update += found.update
            space += found.space
    ranks = [layer.rank for layer in layers.values()]
    known = [rank for rank in ranks if rank is not None]
    total = sum(known) if len(known) == len(ranks) else None
    fro = math.hypot(*(layer.fro for layer in layers.values()))
    if not math.isfinite(fro):
        raise InputError(f"{path}: its norm overflows float64; correct its alpha and factors")
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
        spike=min(1.0, (top / fro) ** 2) if fro else None,
        layers=layers,
        update=_round(update),
        space=_round(space),
    )


def _measure_layers(path: str, deltas: Iterable[Delta], device: str) -> Iterator[tuple[Delta, Measured]]:
    """Yield every layer as measured, in order: consecutive thin ones of one rank together."""
    for key, group in groupby(deltas, lambda delta: delta.rank if device == "cpu" and is_thin(delta) else None):
        while part := list(islice(group, TOGETHER if key is not None else 1)):
            thin = [delta for delta in part if is_thin(delta)] if key is not None else []
            for delta, found in zip(part, measure_thin(thin) if thin else [None], strict=True):
                if found is None:
                    from lora_diag.diagnostics.fleet.dense import measure_dense  # deferred: imports torch

                    found = measure_dense(path, delta, device)
                yield delta, found


def _round(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values.tolist())
