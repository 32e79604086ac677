"""``verify-merge``: check a merged checkpoint against BASE and the adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from lora_diag.adapters import is_adapter
from lora_diag.checkpoints import as_path, check_exists, locate
from lora_diag.deltas import Delta, FactoredDelta, Pairing, StoredDelta, Unpaired, natural_order, selector
from lora_diag.diagnostics.verify_merge.measure import MergedLayer, verify
from lora_diag.diagnostics.verify_merge.record import Merge
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.records import LeftOut, Results
from lora_diag.running.inputs import compare
from lora_diag.running.layers import LayerRun
from lora_diag.running.measuring import record_unpaired
from lora_diag.running.options import RunOptions, show_options

# The index of an expert, stacked (``w[3]``) or separate (``experts.3.``); and every number in a name.
_EXPERT = re.compile(r"\[\d+\]$|(?<=experts\.)\d+(?=\.)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

# Reasons for tensors of BASE that MERGED does not have.
_MISSING_REASONS = {"only_in_base", "shape_differs", "not_float"}


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """Settings of the check of a layer.

    Args:
        memory: Memory limit of a layer in bytes; None without limit.
    """

    memory: int | None = None


@show_options
def verify_merge(
    base: Path | str,
    adapter: Path | str,
    merged: Path | str,
    **options: Unpack[RunOptions],
) -> Results[Merge]:
    r"""Check a merged checkpoint against BASE and the adapter, entry by entry.

    A layer is correct if every entry of M is a rounding of W + ΔW that a merge in M's dtype can give:
    |M − (W + ΔW)| ≤ ulp(M)/2 + δ, with δ the rounding inside ΔW. A layer that is not is tried for the usual faults.
    Files are compared on processors: the tasks of a cluster need no GPUs.

    Args:
        base: The checkpoint that the adapter was trained on.
        adapter: The adapter.
        merged: The merged checkpoint.
        **options: ``RunOptions``.

    Returns:
        One record for every weight of ``base`` that is in ``merged``, adapted or not, and for every adapted one that
        is not. ``lora_diag.diagnostics.verify_merge.record.outcome`` gives their joint outcome.

    Raises:
        UsageError: An option is invalid, an input is in the wrong place, or ``output`` would lose something.
        InputError: An input cannot be read, or the adapter does not fit ``base``.
        NothingComparedError: The three have no weight in common.

    Example:
        >>> base, adapter = "sample_checkpoints/base", "sample_checkpoints/lora_r4"
        >>> results = verify_merge(base, adapter, base, layers=r"layers\.0\..*q_proj")
        >>> [(record.layer, record.status) for record in results]
        [('model.layers.0.self_attn.q_proj.weight', 'dropped')]
    """
    engine = options.get("engine")
    if engine is not None and engine.gpus_per_task:
        raise UsageError("--gpus-per-task: verify-merge runs on CPUs only; remove the option")
    run = LayerRun("verify-merge", options, RunOptions)
    base, adapter, merged = map(as_path, (base, adapter, merged))
    check_exists(base)
    if not is_adapter(locate(adapter)):
        raise UsageError(f"{adapter}: not an adapter; the order is: loradiag verify-merge BASE ADAPTER MERGED")
    if is_adapter(locate(merged)):
        raise UsageError(
            f"{merged}: an adapter, not a merged checkpoint; the order is: loradiag verify-merge BASE ADAPTER MERGED"
        )
    verify = run.options["verify"]
    adapter_side = compare(
        base, adapter, None, None, run.options["allow_unmatched"], verify, stated_alpha=run.stated_alpha
    )
    merged_side = compare(base, merged, verify=verify)
    selected = selector(run.options["layers"], run.options["exclude"])
    tasks, unpaired = _align_layers(adapter_side.pairing, merged_side.pairing, merged, selected)
    return run.over(
        tasks,
        _measure_layer,
        _estimate_bytes,
        MergeSettings(),
        lambda layout, _, __: record_unpaired(Pairing((), unpaired), layout, run.where.here),
        (
            *adapter_side.inputs,
            *(item.model_copy(update={"role": "merged"}) for item in merged_side.inputs if item.role == "tuned"),
        ),
        {},
        recorded=("layers", "exclude", "allow_unmatched"),
    )


def _measure_layer(task: MergedLayer, settings: MergeSettings) -> Sequence[Merge | LeftOut]:
    return (verify(task, settings.memory),)


def _estimate_bytes(task: MergedLayer, settings: MergeSettings) -> int:
    return task.footprint if settings.memory is None else min(settings.memory, task.footprint)


def _align_layers(
    adapter_pairing: Pairing, merged_pairing: Pairing, merged: Path | str, selected: Callable[[str], bool]
) -> tuple[list[MergedLayer], tuple[Unpaired, ...]]:
    """Align the adapter's updates with the layers of MERGED, by the layers of BASE.

    Returns:
        One task a layer, in natural order of their names; and tensors that neither side allows to check.
    """
    updates, rest = _group_by_target(adapter_pairing, merged_pairing)
    siblings = _group_siblings(adapter_pairing)
    stored = [delta for delta in merged_pairing.deltas if isinstance(delta, StoredDelta)]
    tasks = [_make_task(delta, updates.get(delta.layer, ()), siblings) for delta in stored]
    absent = {item.layer: item for item in merged_pairing.unpaired if item.reason in _MISSING_REASONS}
    tasks += [_make_missing_task(delta, absent, merged) for delta in rest if selected(delta.layer)]
    added, unpaired = _compare_added_rows(adapter_pairing, merged_pairing)
    tasks += added
    unavailable = {task.layer for task in tasks if task.missing}
    unpaired = [item for item in unpaired if item.layer not in unavailable]
    chosen = sorted((task for task in tasks if selected(task.layer)), key=lambda task: natural_order(task.layer))
    if not any(task.adapted for task in chosen):
        raise NothingComparedError("nothing was compared: --layers and --exclude select no adapted weight; change them")
    not_selected = [
        Unpaired(task.layer, task.shape, "not_selected", "left out by --layers or --exclude")
        for task in tasks
        if not selected(task.layer)
    ]
    return chosen, (*(item for item in unpaired if selected(item.layer)), *not_selected)


def _group_by_target(
    adapter_pairing: Pairing, merged_pairing: Pairing
) -> tuple[dict[str, tuple[Delta, ...]], list[Delta]]:
    """Return the updates of every layer of MERGED, and those without a layer.

    Tied weights are stored once: where MERGED has no separate head, its update is part of that of the embedding.
    """
    names = {delta.layer: delta for delta in merged_pairing.deltas}
    layers_at = {
        (delta.base.name, delta.base.offset): delta.layer for delta in merged_pairing.deltas if delta.base is not None
    }
    updates: dict[str, tuple[Delta, ...]] = {}
    rest: list[Delta] = []
    for delta in adapter_pairing.deltas:
        location = (delta.base.name, delta.base.offset) if delta.base is not None else None
        target = delta.layer if delta.layer in names else layers_at.get(location) if location is not None else None
        if target is None or names[target].shape[1] != delta.shape[1]:
            rest.append(delta)
        else:
            updates[target] = (*updates.get(target, ()), delta)
    return updates, rest


def _make_task(
    delta: StoredDelta, updates: tuple[Delta, ...], siblings: dict[str, tuple[FactoredDelta, ...]]
) -> MergedLayer:
    return MergedLayer(
        layer=delta.layer,
        shape=delta.shape,
        base=delta.base,
        merged=delta.tuned,
        deltas=updates,
        is_matrix=delta.is_matrix,
        adapted=bool(updates),
        others=siblings.get(_drop_number(delta.layer), ()) if updates else (),
    )


def _make_missing_task(delta: Delta, absent: Mapping[str, Unpaired], merged: Path | str) -> MergedLayer:
    """Return the task of a layer that the adapter changes and that is missing in MERGED, with the reason."""
    item = absent.get(delta.layer) or (absent.get(delta.base.name) if delta.base is not None else None)
    if delta.base is None or (item is not None and item.reason == "not_float"):
        detail = item.detail if item is not None else "BASE stores it as other than plain numbers"
        raise InputError(
            f"{merged}: {delta.layer}: {detail}; merge into a dtype that is not quantized, or skip it with --exclude"
        )
    detail = "the adapter changes it, but MERGED has no such weight"
    if item is not None and item.reason == "shape_differs":
        detail = f"the adapter changes it, but MERGED has it in another shape: {item.detail.replace('TUNED', 'MERGED')}"
    return MergedLayer(delta.layer, delta.shape, delta.base, None, (delta,), delta.is_matrix, missing=detail)


def _group_siblings(adapter_pairing: Pairing) -> dict[str, tuple[FactoredDelta, ...]]:
    """Group factored updates that could be confused: experts of a block, or the same layer of other blocks."""
    groups: dict[str, list[FactoredDelta]] = {}
    for delta in adapter_pairing.deltas:
        if isinstance(delta, FactoredDelta):
            groups.setdefault(_drop_number(delta.layer), []).append(delta)
    return {kind: tuple(group) for kind, group in groups.items()}


def _drop_number(layer: str) -> str:
    """Return a name without the number of its expert, or else of its block.

    >>> _drop_number("model.layers.3.mlp.experts.down_proj[5]"), _drop_number("model.layers.3.mlp.up_proj.weight")
    ('model.layers.3.mlp.experts.down_proj*', 'model.layers.*.mlp.up_proj.weight')
    """
    return _EXPERT.sub("*", layer) if _EXPERT.search(layer) else _NUMBER.sub("*", layer)


def _compare_added_rows(adapter_pairing: Pairing, merged_pairing: Pairing) -> tuple[list[MergedLayer], list[Unpaired]]:
    """Compare vocabulary rows that MERGED adds with the rows in the adapter; also return the remaining tensors."""
    added = {
        item.layer: item for item in adapter_pairing.unpaired if item.reason == "added_rows" and item.rows is not None
    }
    tasks, rest = [], []
    for item in merged_pairing.unpaired:
        new = added.get(item.layer)
        if item.reason == "added_rows" and item.rows is not None and new is not None and new.shape == item.shape:
            assert new.rows is not None
            rows, columns = item.shape
            name = f"{item.layer} (added rows)"
            tasks.append(MergedLayer(name, (rows, columns), new.rows, item.rows))
            added.pop(item.layer)
        else:
            rest.append(replace(item, detail=item.detail.replace("TUNED", "MERGED")))
    rest += [item for item in adapter_pairing.unpaired if item.reason != "added_rows" or item.layer in added]
    return tasks, rest
