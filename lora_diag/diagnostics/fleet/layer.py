"""One layer of an adapter: its norm and rank, and sketches for comparison; from thin factors with NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from lora_diag.deltas import Delta, FactoredDelta
from lora_diag.diagnostics.fleet.record import FleetLayer
from lora_diag.metrics import energy_curve, ranks_at
from lora_diag.thin import (
    BOTH,
    COLUMNS,
    ENOUGH,
    LENGTH,
    MAX_RANK,
    Grams,
    ThinValues,
    fold,
    gram,
    join,
    mixed,
    row_major,
    thin_energies,
    thin_values,
    transform,
    triangle,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_diag.checkpoints.decoding import Numbers

# The fraction of the energy that a layer's rank is counted to.
ENERGY = 0.99


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


def layer_of(s: NDArray[np.float64], fro: float, needed: int | None, rank: int | None) -> tuple[FleetLayer, float]:
    """Return a layer's part of the record, and σ_1².

    Args:
        s: The largest singular values.
        fro: ‖ΔW‖_F, not 0.
        needed: Smallest r with C(r) ≥ ``ENERGY``; None if it is beyond ``s``.
        rank: Columns of its factors; None if it has none.
    """
    largest = float(s[0])
    spike = min(1.0, (largest / fro) ** 2)
    return FleetLayer(fro=fro, rank=rank, rank_99=needed or len(s), spike=spike), largest**2


def zero_layer(rank: int | None) -> Measured:
    """Return a layer whose update is zero."""
    return Measured(FleetLayer(fro=0.0, rank=rank, rank_99=0, spike=None))


def is_thin(delta: Delta) -> TypeGuard[FactoredDelta]:
    """Return whether a layer has stored factors of a small rank, and nothing else takes part."""
    return isinstance(delta, FactoredDelta) and delta.thin is not None and delta.rank <= MAX_RANK


def measure_thin(deltas: Sequence[FactoredDelta]) -> list[Measured | None]:
    """Measure layers that are thin and of one rank from their stored factors; None where a number is not finite.

    Each factor is read, reduced and dropped while it is in the cache; the remaining steps are computed for all layers
    together.
    """
    reduced = [_reduce(delta) for delta in deltas]
    left, right = _stacked([gram for gram, _, _ in reduced]), _stacked([gram for _, gram, _ in reduced])
    folded = [each for _, _, each in reduced]
    values = thin_energies(left, right, np.array([each.scale for each in folded]))
    found = _measured(deltas, folded, values)
    for i in np.flatnonzero(values.energy_error > ENOUGH).tolist():
        found[i] = _measure_by_reflections(deltas[i])
    return found


@dataclass(frozen=True, slots=True)
class _Folded:
    """The factors of a layer, folded, and their scale.

    Args:
        rows: The rows of B in the buckets of both hashes, ``(2, LENGTH, r)``.
        columns: The columns of A in the buckets of theirs, ``(LENGTH, r)``.
        scale: s.
    """

    rows: Numbers
    columns: Numbers
    scale: float


Gram = tuple["NDArray[np.float64]", int]


def _reduce(delta: FactoredDelta) -> tuple[Gram, Gram, _Folded]:
    """Return BᵀB and AAᵀ with their numbers of terms, and the folded factors."""
    assert delta.thin is not None
    b = delta.thin.read_b()
    left, rows = gram(b), fold(b, BOTH)
    del b
    a = row_major(delta.thin.read_a().T)
    return left, gram(a), _Folded(rows.reshape(2, LENGTH, -1), fold(a, COLUMNS), delta.thin.read_scale())


def _stacked(grams: Sequence[Gram]) -> Grams:
    return Grams(np.stack([products for products, _ in grams]), np.array([terms for _, terms in grams]))


def _measure_by_reflections(delta: FactoredDelta) -> Measured | None:
    """Measure a layer whose energies are not known well enough: it is read again, and folded in float64."""
    assert delta.thin is not None
    b = delta.thin.read_b().astype(np.float64)
    left, rows = triangle(b), fold(b, BOTH)
    a = delta.thin.read_a().T.astype(np.float64)
    right, columns = triangle(a), fold(a, COLUMNS)
    if left is None or right is None:
        return None
    folded = _Folded(rows.reshape(2, LENGTH, -1), columns, delta.thin.read_scale())
    return _measured([delta], [folded], thin_values(left, right, folded.scale, vectors=True))[0]


def _measured(deltas: Sequence[FactoredDelta], folded: Sequence[_Folded], found: ThinValues) -> list[Measured | None]:
    """Return layers of one rank, given their values; None where a norm is not finite."""
    scale = np.array([each.scale for each in folded])
    assert found.mix is not None
    fro = np.where(np.isfinite(found.fro) & (found.fro > 0), found.fro, 1.0)
    needed = ranks_at(energy_curve(found.s, fro[:, None], True), ENERGY)
    directions = found.mix * (np.arange(found.s.shape[1]) < needed[:, None])[:, None]
    names = [delta.layer for delta in deltas]
    rows, row_size = _normalized([each.rows for each in folded])
    columns, column_size = _normalized([each.columns for each in folded])
    left_rows, right_rows = transform(rows).swapaxes(0, 1)
    update = (scale * row_size * column_size)[:, None] * join(left_rows, transform(columns), names)
    # Σ_k of (row transforms of u_k)·(column transforms of u_k), u_k = B·w_k, is one of B·WWᵀ and B.
    directions *= row_size[:, None, None]
    space = join(mixed(left_rows, directions @ directions.transpose(0, 2, 1)), right_rows, names)
    measured: list[Measured | None] = []
    for i, delta in enumerate(deltas):
        if not math.isfinite(found.fro[i]):
            measured.append(None)
        elif found.fro[i] == 0.0:
            measured.append(zero_layer(delta.rank))
        else:
            layer, top = layer_of(found.s[i], float(found.fro[i]), int(needed[i]), delta.rank)
            measured.append(Measured(layer, top, update[i], space[i]))
    return measured


def _normalized(parts: Sequence[Numbers]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Stack arrays, each divided by a power of two, so that products are in the range of float32, and return these."""
    stack: NDArray[Any] = np.stack(parts)
    flat = stack.reshape(len(stack), -1)
    largest = np.maximum(flat.max(axis=1), -flat.min(axis=1))
    size = np.ldexp(1.0, np.clip(np.frexp(largest)[1], -120, 120))
    stack *= (1 / size).astype(stack.dtype).reshape(-1, *[1] * (stack.ndim - 1))
    return stack, size
