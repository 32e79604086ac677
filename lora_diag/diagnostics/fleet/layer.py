"""One layer of an adapter: its norm and rank, and sketches for comparison; from thin factors with NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from lora_diag.deltas import Delta, FactoredDelta
from lora_diag.diagnostics.fleet.record import FleetLayer
from lora_diag.metrics import energy_curve, ranks_at
from lora_diag.thin import (
    BOTH,
    COLUMNS,
    LENGTH,
    MAX_GRAM_ERROR,
    MAX_RANK,
    Grams,
    ThinValues,
    compute_grams,
    fold,
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

# Entries of factors that are read at once: 4 MiB in float32.
ENTRIES = 2**20

# The fraction of the energy that a layer's rank is counted to.
ENERGY = 0.99


@dataclass(frozen=True, slots=True)
class Measured:
    """One layer of one adapter.

    Args:
        layer: Its part of the record.
        top: σ_1.
        update: The sketch of ΔW; None for a zero update.
        space: The sketch of the projector on the left singular vectors up to 99% of the energy, likewise.
    """

    layer: FleetLayer
    top: float = 0.0
    update: NDArray[np.float64] | None = None
    space: NDArray[np.float64] | None = None


def layer_of(s: NDArray[np.float64], fro: float, needed: int | None, rank: int | None) -> tuple[FleetLayer, float]:
    """Return a layer's part of the record, and σ_1.

    Args:
        s: The largest singular values.
        fro: ‖ΔW‖_F, not 0.
        needed: Smallest r with C(r) ≥ ``ENERGY``; None if it is beyond ``s``.
        rank: Columns of its factors; None if it has none.
    """
    largest = float(s[0])
    spike = min(1.0, (largest / fro) ** 2)
    return FleetLayer(fro=fro, rank=rank, rank_99=needed or len(s), spike=spike), largest


def zero_layer(rank: int | None) -> Measured:
    """Return a layer whose update is zero."""
    return Measured(FleetLayer(fro=0.0, rank=rank, rank_99=0, spike=None))


def is_thin(delta: Delta) -> TypeGuard[FactoredDelta]:
    """Return whether a layer has stored factors of a small rank, and nothing else takes part."""
    return isinstance(delta, FactoredDelta) and delta.thin is not None and delta.rank <= MAX_RANK


def measure_thin(deltas: Sequence[FactoredDelta]) -> list[Measured | None]:
    """Measure layers that are thin and of one rank from their stored factors; None where a number is not finite.

    Factors of one shape are read and reduced together, which saves calls; the remaining steps are computed for all
    layers together.
    """
    kinds: dict[Hashable, list[int]] = {}
    for i, delta in enumerate(deltas):
        assert delta.thin is not None
        kinds.setdefault(delta.thin.kind, []).append(i)
    parts: list[list[int]] = []
    for alike in kinds.values():
        most = max(1, ENTRIES // (max(deltas[alike[0]].shape) * deltas[alike[0]].rank))
        parts += [alike[first : first + most] for first in range(0, len(alike), most)]
    reduced = [_reduce([deltas[i] for i in part]) for part in parts]
    order = [i for part in parts for i in part]
    ordered, folded = [deltas[i] for i in order], [each for _, _, some in reduced for each in some]
    left, right = _concatenate([grams for grams, _, _ in reduced]), _concatenate([grams for _, grams, _ in reduced])
    values = thin_energies(left, right, np.array([each.scale for each in folded]))
    measured = _make_measured(ordered, folded, values)
    for i in np.flatnonzero(values.energy_error > MAX_GRAM_ERROR).tolist():
        measured[i] = _measure_apart(ordered[i])
    return [measured[order.index(i)] for i in range(len(deltas))]


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


def _reduce(deltas: Sequence[FactoredDelta]) -> tuple[Grams, Grams, list[_Folded]]:
    """Return BᵀB and AAᵀ of layers of one kind, and their folded factors."""
    thin = [delta.thin for delta in deltas if delta.thin is not None]
    b = row_major(thin[0].read_each_b(thin))
    left, rows = compute_grams(b), fold(b, BOTH).reshape(len(thin), 2, LENGTH, -1)
    del b
    a = row_major(thin[0].read_each_a(thin).transpose(0, 2, 1))
    columns = fold(a, COLUMNS)
    folded = [_Folded(rows[i], columns[i], each.read_scale()) for i, each in enumerate(thin)]
    return left, compute_grams(a), folded


def _concatenate(grams: Sequence[Grams]) -> Grams:
    return Grams(np.concatenate([each.products for each in grams]), np.concatenate([each.terms for each in grams]))


def _measure_apart(delta: FactoredDelta) -> Measured | None:
    """Measure a layer whose energies are not known well enough: it is read again, and folded in float64."""
    assert delta.thin is not None
    b, a = delta.thin.read_b().astype(np.float64), delta.thin.read_a().T.astype(np.float64)
    if not (b.any() and a.any()) and np.isfinite(b).all() and np.isfinite(a).all():
        return zero_layer(delta.rank)
    left, rows = triangle(b), fold(b, BOTH)
    right, columns = triangle(a), fold(a, COLUMNS)
    if left is None or right is None:
        return None
    folded = _Folded(rows.reshape(2, LENGTH, -1), columns, delta.thin.read_scale())
    return _make_measured([delta], [folded], thin_values(left, right, folded.scale, vectors=True))[0]


def _make_measured(
    deltas: Sequence[FactoredDelta], folded: Sequence[_Folded], values: ThinValues
) -> list[Measured | None]:
    """Return layers of one rank, given their values; None where a norm is not finite."""
    scale = np.array([each.scale for each in folded])
    assert values.mix is not None
    fro = np.where(np.isfinite(values.fro) & (values.fro > 0), values.fro, 1.0)
    needed = ranks_at(energy_curve(values.s, fro[:, None], True), ENERGY)
    directions = values.mix * (np.arange(values.s.shape[1]) < needed[:, None])[:, None]
    names = [delta.layer for delta in deltas]
    rows, row_size = _normalize([each.rows for each in folded])
    columns, column_size = _normalize([each.columns for each in folded])
    left_rows, right_rows = transform(rows).swapaxes(0, 1)
    update = (scale * row_size * column_size)[:, None] * join(left_rows, transform(columns), names)
    # Σ_k of (row transforms of u_k)·(column transforms of u_k), u_k = B·w_k, is one of B·WWᵀ and B.
    directions *= row_size[:, None, None]
    space = join(mixed(left_rows, directions @ directions.transpose(0, 2, 1)), right_rows, names)
    measured: list[Measured | None] = []
    for i, delta in enumerate(deltas):
        if not math.isfinite(values.fro[i]):
            measured.append(None)
        elif values.fro[i] == 0.0:
            measured.append(zero_layer(delta.rank))
        else:
            layer, top = layer_of(values.s[i], float(values.fro[i]), int(needed[i]), delta.rank)
            measured.append(Measured(layer, top, update[i], space[i]))
    return measured


def _normalize(parts: Sequence[Numbers]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return stacked arrays, each divided by a power of two so that products are in float32's range, and the powers."""
    stack: NDArray[Any] = np.stack(parts)
    flat = stack.reshape(len(stack), -1)
    largest = np.maximum(flat.max(axis=1), -flat.min(axis=1))
    size = np.ldexp(1.0, np.clip(np.frexp(largest)[1], -120, 120))
    stack *= (1 / size).astype(stack.dtype).reshape(-1, *[1] * (stack.ndim - 1))
    return stack, size
