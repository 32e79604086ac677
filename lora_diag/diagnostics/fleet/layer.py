"""One layer of an adapter: its norm and rank, and sketches for comparison; from thin factors with NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_diag.deltas import Delta, FactoredDelta
from lora_diag.diagnostics.fleet.record import FleetLayer
from lora_diag.metrics import energy_curve, rank_at
from lora_diag.thin import BOTH, COLUMNS, LENGTH, MAX_RANK, fold, join, mixed, thin_values, triangle

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Measured:
    """One layer of one adapter.

    Args:
        layer: Its part of the record.
        top: σ_1².
        update: The sketch of ΔW; None for a zero update.
        space: The sketch of the projector on the left singular vectors up to 99% of the energy, likewise.
    """

    layer: FleetLayer
    top: float = 0.0
    update: NDArray[np.float64] | None = None
    space: NDArray[np.float64] | None = None


def layer_of(s: NDArray[np.float64], fro: float, complete: bool, rank: int | None) -> tuple[FleetLayer, float]:
    """Return a layer's part of the record, and σ_1².

    Args:
        s: The largest singular values.
        fro: ‖ΔW‖_F, not 0.
        complete: Whether ``s`` are all that can be nonzero.
        rank: Columns of its factors; None if it has none.
    """
    needed = rank_at(energy_curve(s, fro, complete), 0.99) or len(s)
    largest = float(s[0])
    spike = min(1.0, (largest / fro) ** 2)
    return FleetLayer(fro=fro, rank=rank, rank_99=needed, spike=spike), largest**2


def zero_layer(rank: int | None) -> Measured:
    """Return a layer whose update is zero."""
    return Measured(FleetLayer(fro=0.0, rank=rank, rank_99=0, spike=None))


def measure_thin(delta: Delta) -> Measured | None:
    """Measure a layer from its stored factors; None if it has none, or a number in them is not finite."""
    if not isinstance(delta, FactoredDelta) or delta.thin is None or delta.rank > MAX_RANK:
        return None
    b = delta.thin.read_b()
    left, folded = triangle(b), fold(b, BOTH)
    del b  # each factor is read, reduced and dropped while it is in the cache
    a = delta.thin.read_a()
    right, columns = triangle(a.T), fold(a.T, COLUMNS)
    scale = delta.thin.read_scale()
    found = thin_values(left, right, scale, vectors=True) if left is not None and right is not None else None
    if found is None:
        return None
    if found.fro == 0.0:
        return zero_layer(delta.rank)
    assert found.mix is not None
    layer, top = layer_of(found.s, found.fro, True, delta.rank)
    directions = mixed(folded, found.mix[:, : layer.rank_99])
    return Measured(
        layer,
        top,
        update=scale * join(folded[:LENGTH], columns, delta.layer),
        space=join(directions[:LENGTH], directions[LENGTH:], delta.layer),
    )
