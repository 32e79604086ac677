"""Interference of several updates of one layer: their spaces pair by pair, and their sum."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from lora_diag.deltas import Delta, DenseDelta, FactoredDelta, footprint
from lora_diag.diagnostics.interference.parts import InterferenceSettings, LayerUpdates, Part, read_part, within
from lora_diag.diagnostics.interference.record import EnergyOverlap, Interference, Union
from lora_diag.diagnostics.interference.union import union
from lora_diag.layers.agreement import agreement
from lora_diag.layers.change import COMPUTED_ENTRY_BYTES, Change, append_note, compute_on_device
from lora_diag.layers.left_out import not_finite
from lora_diag.linalg import Allowance, require_memory, resolve_device, whole_bytes
from lora_diag.linalg.stacked import inner
from lora_diag.metrics.interference import classify_relation, is_near_chance
from lora_diag.records import LeftOut

# The relation of two updates is judged at the requested rank nearest to this.
RELATION_RANK = 8

# Bytes of an entry whose magnitude is sorted (two copies and its index), and of one that TIES compares in a block.
_SORTED, _COMPARED = 16, 96


def size(task: LayerUpdates, settings: InterferenceSettings) -> int:
    """Estimate the memory of measuring a layer in bytes: every update with its vectors, and the sum.

    With a memory limit, the result is at least the need and at most the limit.
    """
    if settings.memory is not None:
        return min(settings.memory, max_bytes(task, settings))
    dense = [u for u in task.updates if not isinstance(u.delta, FactoredDelta)]
    vectors = 8 * min(task.shape) * sum(task.shape)
    return (
        sum(footprint(u.delta) for u in task.updates)
        + (len(dense) + 1) * vectors * bool(dense)
        + 4 * math.prod(task.shape)
    )


def max_bytes(task: LayerUpdates, settings: InterferenceSettings) -> int:
    """Return the largest memory of a layer in bytes: the stored part of every update, and the most expensive step.

    An update without factors keeps ΔW and all singular vectors. The steps are decomposing one update, decomposing the
    sum in float64, products of the sum's vectors with theirs, and TIES, which sorts the entries of one update at a
    time.
    """
    entries, small = math.prod(task.shape), min(task.shape)
    vectors = 8 * small * sum(task.shape)
    dense = [update.delta for update in task.updates if not isinstance(update.delta, FactoredDelta)]
    stored = sum(footprint(u.delta) for u in task.updates if isinstance(u.delta, FactoredDelta))
    stored += sum(entries * _entry_bytes(delta) + vectors for delta in dense)
    requested = Allowance(0, settings.method, None, vectors=True)
    entry_sizes = (COMPUTED_ENTRY_BYTES if isinstance(delta, DenseDelta) else _entry_bytes(delta) for delta in dense)
    steps = [whole_bytes(task.shape, requested, entry_size) for entry_size in entry_sizes]
    kept = 0
    if dense:
        kept = 8 * entries + vectors
        steps += [whole_bytes(task.shape, requested, 8), kept + 6 * 8 * small**2]
    if settings.density > 0:
        sorting = _SORTED * entries * (settings.density < 1)
        steps.append(kept + sorting + _COMPARED * min(2**20, entries) * len(task.updates))
    return stored + max(steps, default=0)


def _entry_bytes(delta: Delta) -> int:
    return 8 if isinstance(delta, DenseDelta) or "float64" in delta.dtypes else 4


def _check_room(task: LayerUpdates, settings: InterferenceSettings) -> None:
    """Refuse a layer that does not fit into memory.

    Raises:
        MemoryLimitError: The layer does not fit; the message states whether it would without TIES.
    """
    if settings.memory is None:
        return
    needed, without_ties = max_bytes(task, settings), max_bytes(task, replace(settings, density=0.0))
    fix = "--density 0, which leaves out TIES and sign conflicts" if without_ties <= settings.memory else "--exclude it"
    factored = all(isinstance(update.delta, FactoredDelta) for update in task.updates)
    description = "the entries of its updates, for TIES," if factored else "its updates with all their singular vectors"
    require_memory(needed, settings.memory, task.shape, f"{description} take", fix)


def interference(task: LayerUpdates, settings: InterferenceSettings) -> tuple[Interference | Union | LeftOut, ...]:
    """Compare all updates of one layer.

    Args:
        task: The layer.
        settings: Settings of the measurement.

    Returns:
        One record for each pair of nonzero updates, and one for all together; if an update is not finite, one
        ``left_out`` record instead.

    Raises:
        InputError: A file could not be read.
    """
    records, fallback = compute_on_device(partial(_measure, task, settings), resolve_device(settings.device))
    return tuple(
        record.model_copy(update={"spectrum": append_note(record.spectrum, fallback)})
        if isinstance(record, Union)
        else record
        for record in records
    )


def _measure(
    task: LayerUpdates, settings: InterferenceSettings, device: torch.device
) -> tuple[Interference | Union | LeftOut, ...]:
    if device.type == "cpu":  # the limit applies to the machine's memory
        _check_room(task, settings)
    parts: list[Part] = []
    for update in task.updates:
        part = read_part(update, settings, device)
        if isinstance(part, Change):
            left_out = not_finite(update.delta, part)
            return (left_out.model_copy(update={"detail": f"{update.name}: {left_out.detail}"}),)
        parts.append(part)
    changed = [part for part in parts if part.fro > 0]
    pairs = [_compare_pair(task, first, second, settings) for first, second in combinations(changed, 2)]
    return (*pairs, union(task, parts, changed, settings))


def _compare_pair(task: LayerUpdates, first: Part, second: Part, settings: InterferenceSettings) -> Interference:
    cosine = inner(first.matrix, second.matrix) / first.factors.fro / second.factors.fro
    cosine = max(-1.0, min(1.0, cosine))
    by_chance = 1 / math.sqrt(math.prod(task.shape))
    # Up to the number of directions of either; larger ranks give the same.
    ranks = [r for r in settings.ranks if r <= max(first.rank, second.rank)] or [min(settings.ranks)]
    energy = {str(r): _energy_within(task, first, second, r) for r in ranks}
    relation_rank = min(ranks, key=lambda rank: abs(rank - RELATION_RANK))
    near = _is_near_chance(first.u, second, relation_rank) and _is_near_chance(second.u, first, relation_rank)
    near = (
        near
        and _is_near_chance(first.v, second, relation_rank, rows=True)
        and _is_near_chance(second.v, first, relation_rank, rows=True)
    )
    noise = "unresolved" in {first.resolution.verdict, second.resolution.verdict}
    return Interference(
        layer=task.layer,
        shape=task.shape,
        first=first.update.name,
        second=second.update.name,
        first_fro=first.factors.fro,
        second_fro=second.factors.fro,
        cosine=cosine,
        cosine_random=by_chance,
        columns={str(r): agreement(first.u[:, :r], second.u[:, :r]) for r in ranks},
        rows={str(r): agreement(first.v[:, :r], second.v[:, :r]) for r in ranks},
        energy=energy,
        relation="noise" if noise else classify_relation(near, cosine, by_chance),
    )


def _energy_within(task: LayerUpdates, first: Part, second: Part, rank: int) -> EnergyOverlap:
    u, w = first.u[:, :rank], second.u[:, :rank]
    return EnergyOverlap(
        second_in_first=within(u, second),
        first_in_second=within(w, first),
        random_first=u.shape[1] / task.shape[0],
        random_second=w.shape[1] / task.shape[0],
    )


def _is_near_chance(vectors: Tensor, part: Part, rank: int, rows: bool = False) -> bool:
    space = vectors[:, :rank]
    return is_near_chance(within(space, part, rows), space.shape[1], len(space), part.effective)
