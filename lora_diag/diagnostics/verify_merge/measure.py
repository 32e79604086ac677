"""Measurement of ``verify-merge``: check a merged checkpoint against BASE and the adapter, layer by
layer.

Decides from W, ΔW and M of each layer whether its merge is correct; ``faults`` diagnoses incorrect
ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from lora_diag.adapters import Adapter
from lora_diag.deltas import (
    Delta,
    FactoredDelta,
    Pairing,
    StoredDelta,
    Unpaired,
    natural_order,
    selector,
)
from lora_diag.diagnostics.verify_merge import faults
from lora_diag.diagnostics.verify_merge.record import CORRECT, Merge
from lora_diag.errors import Given, InputError, NothingComparedError, UsageError
from lora_diag.layers.task import LayerSettings
from lora_diag.linalg.merge import (
    Addend,
    Check,
    MergeRounding,
    Whole,
    shortest_dtype,
    unit_roundoff,
)
from lora_diag.linalg.methods import require_memory
from lora_diag.linalg.rounding import LAYOUT, SHORTER
from lora_diag.records import LeftOut, Results
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import Comparison
from lora_diag.running.layers import LayerRun
from lora_diag.running.options import RunOptions, show_options
from lora_diag.storage import Checkpoint
from lora_diag.storage.rewriting import read_recipe

# Number of changed entries inspected to infer the dtype of MERGED's values.
SAMPLE = 2**16

# If ΔW should change more than this fraction of the entries and none changed, coarse arithmetic is
# not the cause: its errors have both signs and would change some.
DROPPED = 0.1

# A correct layer must distinguish a scale of 1 from one with this error; otherwise it is
# inconclusive.
RESOLVED = 0.05

# If the errors of c allow more than this, test entry by entry whether ΔW was computed precisely.
RESOLVED_ENTRIES = 0.005

# If rounding removed or added more than this fraction of ΔW, the standard error of c is not that of
# the scale.
LOST_FRACTION = 0.1

OK = faults.Fault("ok", "")


def verify(task: faults.MergedLayer, memory: int | None = None) -> Merge | LeftOut:
    """Compare one layer of MERGED with BASE and the adapter.

    Args:
        task: The layer.
        memory: Memory limit in bytes; None without limit.

    Returns:
        The record; if BASE or the adapter is not finite or the norm of ΔW overflows, a ``left_out``
            record.
    """
    if task.missing:
        return _make_record(task, faults.Fault("missing", task.missing))
    if memory is not None and task.held:
        use = "its update, which is held whole, takes"
        require_memory(task.needed, memory, task.shape, use, "$exclude it")
    keeps = task.adapted and (memory is None or task.footprint <= memory)
    task = replace(task, kept=[], max_kept=task.shape[0] if keeps else 1)
    addend, problem = faults.sum_addends(task.deltas, task.shape)
    if problem is not None:
        return _make_left_out(task, problem)
    rounding, is_guess = _infer_rounding(task)
    trial = faults.try_merge(task, addend, rounding)
    check = trial.check
    if check.base_non_finite is not None:
        return _make_left_out(task, check.base_non_finite)
    if check.non_finite is not None:
        fault = faults.Fault("other", _describe_problem(task, check.non_finite))
        return _make_record(task, fault, rounding)
    if not math.isfinite(check.expected + abs(check.inner)):
        return _make_left_out(task, "the squares of its entries overflow float64")
    return _make_record(task, _judge(trial, is_guess), rounding, check)


def _judge(trial: faults.FaultTrial, is_guess: bool) -> faults.Fault:
    """Return status and cause of a layer; ``is_guess`` as of ``_infer_rounding``."""
    correct = _find_correct_merge(trial)
    if correct is None:
        return faults.find_fault(trial)
    if verdict := _decide_by_entries(trial, correct):
        return verdict
    check = trial.check
    ambiguous = is_guess or trial.task.merged.is_quantized or isinstance(trial.addend, Whole)
    if ambiguous and check.moved <= faults.MAX_UNEXPLAINED * check.entries and check.expected > 0:
        return _distinguish_from_zero(trial)
    cause = _explain_ambiguity(correct)
    return faults.Fault("inconclusive", cause) if cause else OK


def _decide_by_entries(trial: faults.FaultTrial, correct: faults.FaultTrial) -> faults.Fault | None:
    """Return the verdict of single entries where the error of the scale is large; None where they
    decide nothing.

    The entries are tested for a ΔW that was computed in float32. The verdict is ``wrong scale``, or
    ``ok`` where M is W + ΔW to the last bit and neither 1 − RESOLVED nor 1 + RESOLVED fits.
    """
    unresolved = not correct.check.resolves(RESOLVED)
    coherent = faults.is_coherent(trial.check) and not correct.check.resolves(RESOLVED_ENTRIES)
    if not trial.has_testable_scale or not (coherent or unresolved):
        return None
    exact = _find_correct_merge(trial.make_precise())
    if exact is None:
        return faults.find_precise_scale(trial)
    if not (unresolved and exact.check.moved):
        return None
    for factor in (1 - RESOLVED, 1 + RESOLVED):
        scaled = exact.retry(exact.addend.times(factor))
        if faults.count_distinct_lines(scaled.check) < faults.MIN_LINES:
            return None
    return OK


def _find_correct_merge(trial: faults.FaultTrial) -> faults.FaultTrial | None:
    """Return the correct merge that explains every entry and the scale of a layer; None without
    one.

    Roundings that all entries share are no noise: a W that was rounded first, a sum that was
    rounded twice, a scaling s that was rounded itself. Each is tried as such.
    """
    if trial.explains:
        return trial
    if not trial.task.deltas or trial.check.moved == 0:
        return None
    dtype = trial.rounding.dtype
    finer = [
        other for other in LAYOUT if LAYOUT[dtype][2] < LAYOUT[other][2] < LAYOUT[torch.float32][2]
    ]
    addends: list[Addend] = [trial.addend]
    addends += [trial.addend.times(factor) for factor in trial.task.list_rounded_scales(dtype)]
    # The first order is the trial itself.
    _, *orders = product(addends, (None, *trial.rounding.bases), (None, *finer))
    for addend, first, between in orders:
        other = trial.retry(addend, False, first=first, between=between)
        if other.explains:
            return other
    return None


def _explain_ambiguity(correct: faults.FaultTrial) -> str:
    """Return why this file cannot determine the scale to ``RESOLVED``; empty if it can, or the
    scale is not tested.
    """
    check = correct.check
    if not correct.has_testable_scale:
        return ""
    if abs(check.ideal / check.expected - 1) <= LOST_FRACTION and check.resolves(RESOLVED):
        return ""
    for factor in (1 + RESOLVED, 1 - RESOLVED):
        if correct.retry(correct.addend.times(factor), whole=False).explains:
            return (
                f"M is a rounding of W + ΔW and of W + {factor:.4g}·ΔW: this file is too coarse "
                "for the scale"
            )
    return ""


def _distinguish_from_zero(trial: faults.FaultTrial) -> faults.Fault:
    """Return the verdict if the tolerance permits both ΔW and zero, assuming ΔW was computed in
    float32.
    """
    sharp = trial.retry(roundoff=2.0**-24).check
    if sharp.count == 0 and sharp.moved > 0:
        return OK
    if sharp.unchanged == sharp.entries and sharp.count > DROPPED * sharp.entries:
        return faults.Fault("dropped", faults.NOT_ADDED)
    cause = "M is a rounding of W + ΔW and of W alone: this file is too coarse to distinguish them"
    return faults.Fault("inconclusive", cause)


def _infer_rounding(task: faults.MergedLayer) -> tuple[MergeRounding, bool]:
    """Return the possible rounding of a correct merge, and whether its dtype is a guess (see
    ``_find_dtype``).
    """
    dtype, is_guess = _find_dtype(task)
    mantissa = LAYOUT[dtype][2]
    update_dtypes = [getattr(torch, delta.dtypes[1], dtype) for delta in task.deltas]
    update_dtypes = [other for other in update_dtypes if other in LAYOUT]
    factored = [delta for delta in task.deltas if isinstance(delta, FactoredDelta)]
    scales = [delta.scale for delta in factored]
    is_longer = any(LAYOUT[other][2] > mantissa for other in update_dtypes)
    bases = SHORTER[getattr(torch, task.base.dtype)]
    # A quantized base is dequantized in a dtype of the merger's choice.
    if not task.base.is_quantized:
        bases = tuple(other for other in bases if mantissa <= LAYOUT[other][2])
    rounding = MergeRounding(
        dtype=dtype,
        roundoff=max(map(unit_roundoff, [dtype, *update_dtypes])),
        cast=is_longer or not all(map(_is_power_of_two, scales)),
        scale=max((abs(scale) for scale in scales if scale), default=1.0),
        diagonal=any(delta.diagonal for delta in factored),
        bases=bases,
        dequantized=task.base.is_quantized,
    )
    return rounding, is_guess


def _is_power_of_two(scale: float | None) -> bool:
    """Return whether a scale is known and a power of two or its negative, so that scaling by it is
    exact.
    """
    return bool(scale) and math.frexp(scale or 0.0)[0] in {0.5, -0.5}


def _find_dtype(task: faults.MergedLayer) -> tuple[torch.dtype, bool]:
    """Return the dtype of MERGED's values, judged by changed entries, and whether it is a guess.

    It is one if no entry changed and the unchanged ones fit into a shorter dtype than the stored
    one.
    """
    stored = getattr(torch, task.merged.dtype)
    if task.merged.is_quantized or stored == torch.bfloat16:
        return stored, False
    unchanged: Tensor | None = None
    for w, m, _ in task.blocks():
        changed = m[m.double() != w.double()]
        if len(changed):
            return shortest_dtype(changed[:: max(1, len(changed) // SAMPLE)]), False
        if not task.adapted:
            # M = W so far, independent of the dtype; a block that differs is inspected separately.
            return stored, False
        if unchanged is None:
            unchanged = m.reshape(-1)[:SAMPLE]
    shortest = shortest_dtype(unchanged) if unchanged is not None else stored
    return shortest, shortest != stored


def _make_left_out(task: faults.MergedLayer, problem: str) -> LeftOut:
    """Return the ``left_out`` record of a layer with entries that are not finite, or whose squares
    overflow.
    """
    detail = _describe_problem(task, problem)
    return LeftOut(layer=task.layer, shape=task.stored_shape, reason="non_finite", detail=detail)


def _describe_problem(task: faults.MergedLayer, problem: str) -> str:
    """Return a description of an entry with its index in the stored tensor: a vector is read as one
    row.
    """
    return problem if task.is_matrix else problem.replace("[0, ", "[")


def _make_record(
    task: faults.MergedLayer,
    verdict: faults.Fault,
    rounding: MergeRounding | None = None,
    check: Check | None = None,
) -> Merge:
    """Return the record of a layer; its numbers are null without a check."""
    scale = scale_expected = scale_error = residual = None
    if check is not None and math.isfinite(check.scale_error):
        scale_error = check.scale_error
    if check is not None and check.expected > 0:
        scale = check.inner / check.expected
        scale_expected = check.ideal / check.expected
        residual = math.sqrt(check.residual / check.expected)
    return Merge(
        layer=task.layer,
        shape=task.stored_shape,
        adapted=task.adapted,
        status=verdict.status,
        dtype=str(rounding.dtype).removeprefix("torch.") if rounding is not None else None,
        differing=check.count if check else None,
        differing_share=check.count / max(1, check.entries) if check else None,
        max_ulp=check.worst if check else None,
        scale=scale,
        scale_expected=scale_expected,
        scale_error=scale_error,
        retained=scale if verdict.status in CORRECT else None,
        residual=residual,
        unchanged=check.unchanged / max(1, check.entries) if check else None,
        expected_fro=math.sqrt(check.expected) if check else None,
        observed_fro=math.sqrt(check.observed) if check else None,
        base_fro=math.sqrt(check.base) if check else None,
        cosine_to_base=faults.cosine_to_base(task, check) if check else None,
        cause=verdict.cause,
    )


# The index of an expert, stacked (``w[3]``) or separate (``experts.3.``); and every number in a
# name.
_EXPERT = re.compile(r"\[\d+\]$|(?<=experts\.)\d+(?=\.)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

# Reasons for tensors of BASE that MERGED does not have, or has in another shape or as other than
# plain numbers.
_MISSING_REASONS = {"only_in_base", "shape_differs", "not_float"}


ORDER = "loradiag verify-merge BASE ADAPTER MERGED"


@show_options
def verify_merge(
    base: Path | str,
    adapter: Path | str,
    merged: Path | str,
    **options: Unpack[RunOptions],
) -> Results[Merge]:
    r"""Check a merged checkpoint against BASE and the adapter, entry by entry.

    A layer is correct if every entry of M is a rounding of W + ΔW that a merge in M's dtype can
    give: |M − (W + ΔW)| ≤ ulp(M)/2 + δ, with δ the rounding inside ΔW. A layer that is not is tried
    for the usual faults.
    The comparison runs on CPUs only; the tasks of a cluster need no GPUs.

    Args:
        base: The checkpoint that the adapter was trained on.
        adapter: The adapter.
        merged: The merged checkpoint.
        **options: ``RunOptions``.

    Returns:
        One record for every selected weight of ``base`` that is in ``merged``, adapted or not, for
            every adapted one
        that is not, and for vocabulary rows that both the adapter and ``merged`` add; what cannot
            be measured is in
        ``left_out``. ``lora_diag.diagnostics.verify_merge.record.outcome`` gives their joint
            outcome.

    Raises:
        UsageError: An option is invalid, an input is in the wrong place, or ``output`` may be
            neither replaced nor resumed.
        InputError: An input cannot be read, the adapter does not fit ``base``, an adapted weight is
            stored as other than plain numbers, or the results file cannot be written.
        NothingComparedError: The three have no weight in common, or no adapted one is selected.

    Example:
        >>> base, adapter = "sample_checkpoints/base", "sample_checkpoints/lora_r4"
        >>> results = verify_merge(base, adapter, base, layers=r"layers\.0\..*q_proj")
        >>> [(record.layer, record.status) for record in results]
        [('model.layers.0.self_attn.q_proj.weight', 'dropped')]
    """
    engine = options.get("engine")
    if engine is not None and engine.gpus_per_task:
        raise UsageError(
            Given("gpus_per_task"), "verify-merge runs on CPUs only", "remove the option"
        )
    run = LayerRun("verify-merge", options, RunOptions)
    everything = {"layers": None, "exclude": None}  # the selection is by names of MERGED's layers
    refused = (Checkpoint, f"not an adapter; the order is: {ORDER}")
    updates = run.compare(base, adapter, refuse=refused, **everything)
    assert updates.base is not None
    refused_merge = (Adapter, f"an adapter, not a merged checkpoint; the order is: {ORDER}")
    written = run.compare(updates.base, merged, "merged", refuse=refused_merge, **everything)
    notes = _compare_recipes(updates, written)
    selected = selector(run.options["layers"], run.options["exclude"])
    tasks, unpaired = _align_layers(updates.pairing, written.pairing, merged, selected)
    last = written.inputs[-1]
    return run.over(
        tasks,
        _measure_layer,
        lambda task, settings: task.footprint,
        LayerSettings(),
        Pairing((), unpaired),
        (*updates.inputs, last.model_copy(update={"notes": (*last.notes, *notes)})),
        {},
        recorded=("layers", "exclude", "allow_unmatched"),
    )


def _compare_recipes(updates: Comparison, written: Comparison) -> tuple[str, ...]:
    """Return a note if ``loradiag merge`` made MERGED and the adapter from different inputs or
    settings.

    Raises:
        UsageError: It made MERGED from several updates, of which the adapter is one, or from a
            multiple of it.
    """
    assert isinstance(updates.update, Adapter)
    assert isinstance(written.update, Checkpoint)
    recipe = read_recipe(written.update)
    other = read_recipe(updates.update.checkpoint)
    if not recipe:
        return ()
    merged = recipe["updates"]
    digests = [update.get("fingerprint") for update in merged if isinstance(update, dict)]
    is_single = len(merged) == 1
    scale = recipe.get("scale")
    made = f"the merge of {len(merged)} updates with --method {recipe.get('method')}"
    if is_single:
        made = f"BASE plus {scale} times one update"
    made = legible(made)
    if not other and updates.inputs[-1].fingerprint in digests:
        if is_single and scale == 1:
            return ()
        fix = (
            "write the same merge as an adapter (loradiag merge without --checkpoint), and give "
            "it as ADAPTER"
        )
        raise UsageError(f"{written.update.path}: is {made}, not BASE plus this adapter; {fix}")
    if recipe != other:
        return (f"is {made}; ADAPTER is not the merge of the same updates and settings",)
    return (f"is {made}, as ADAPTER",)


def _measure_layer(task: faults.MergedLayer, settings: LayerSettings) -> Sequence[Merge | LeftOut]:
    """Return the record of one layer."""
    return (verify(task, settings.memory),)


def _align_layers(
    adapter_pairing: Pairing,
    merged_pairing: Pairing,
    merged: Path | str,
    selected: Callable[[str], bool],
) -> tuple[list[faults.MergedLayer], tuple[Unpaired, ...]]:
    """Align the adapter's updates with the layers of MERGED, by the layers of BASE.

    Tied weights are stored once: where MERGED has no separate head, the head's update is one of the
    embedding.

    Returns:
        One task for each selected layer, in natural order of their names; and the selected tensors
            that cannot be
        checked, with the layers of MERGED that are not selected.

    Raises:
        NothingComparedError: No adapted weight is selected.
    """
    stored = {
        delta.layer: delta for delta in merged_pairing.deltas if isinstance(delta, StoredDelta)
    }
    layers_at = {(delta.base.name, delta.base.offset): delta.layer for delta in stored.values()}
    updates: dict[str, tuple[Delta, ...]] = {}
    siblings: dict[str, list[FactoredDelta]] = {}
    tasks: list[faults.MergedLayer] = []
    missing = {
        item.layer: item for item in merged_pairing.unpaired if item.reason in _MISSING_REASONS
    }
    for delta in adapter_pairing.deltas:
        if isinstance(delta, FactoredDelta):
            siblings.setdefault(_drop_number(delta.layer), []).append(delta)
        target = delta.layer
        if target not in stored and delta.base is not None:
            target = layers_at.get((delta.base.name, delta.base.offset), target)
        if target in stored and stored[target].shape[1] == delta.shape[1]:
            updates[target] = (*updates.get(target, ()), delta)
        elif selected(delta.layer):
            tasks.append(_make_missing_task(delta, missing, merged))
    others = {kind: tuple(group) for kind, group in siblings.items()}
    for layer, pair in stored.items():
        deltas = updates.get(layer, ())
        tasks.append(
            faults.MergedLayer(
                layer,
                pair.shape,
                pair.base,
                pair.tuned,
                deltas,
                pair.is_matrix,
                bool(deltas),
                others=others.get(_drop_number(layer), ()) if deltas else (),
            )
        )
    added, unpaired = _make_added_tasks(adapter_pairing, merged_pairing)
    tasks += added
    chosen = [task for task in tasks if selected(task.layer)]
    chosen.sort(key=lambda task: natural_order(task.layer))
    if not any(task.adapted for task in chosen):
        raise NothingComparedError(
            "nothing was compared", "$layers and $exclude select no adapted weight", "change them"
        )
    unavailable = {task.layer for task in tasks if task.missing}
    rest = [item for item in unpaired if item.layer not in unavailable and selected(item.layer)]
    rest += [
        Unpaired.by_selection(task.layer, task.shape) for task in tasks if not selected(task.layer)
    ]
    return chosen, tuple(rest)


def _make_missing_task(
    delta: Delta, missing: Mapping[str, Unpaired], merged: Path | str
) -> faults.MergedLayer:
    """Return the task of a layer that the adapter changes and that is missing in MERGED, with the
    reason.

    Raises:
        InputError: BASE or MERGED stores it as other than plain numbers.
    """
    item = missing.get(delta.layer)
    if item is None and delta.base is not None:
        item = missing.get(delta.base.name)
    if delta.base is None or (item is not None and item.reason == "not_float"):
        detail = item.detail if item is not None else "BASE stores it as other than plain numbers"
        raise InputError(
            merged,
            f"{delta.layer}: {detail}",
            "merge into a dtype that is not quantized, or skip it with $exclude",
        )
    detail = "the adapter changes it, but MERGED has no such weight"
    if item is not None and item.reason == "shape_differs":
        shapes = item.detail.replace("TUNED", "MERGED")
        detail = f"the adapter changes it, but MERGED has it in another shape: {shapes}"
    return faults.MergedLayer(
        delta.layer, delta.shape, delta.base, delta.base, (delta,), delta.is_matrix, missing=detail
    )


def _drop_number(layer: str) -> str:
    """Return a name without the number of its expert, or else of its block.

    >>> (
    ...     _drop_number("model.layers.3.mlp.experts.down_proj[5]"),
    ...     _drop_number("model.layers.3.mlp.up_proj.weight"),
    ... )
    ('model.layers.3.mlp.experts.down_proj*', 'model.layers.*.mlp.up_proj.weight')
    """
    return _EXPERT.sub("*", layer) if _EXPERT.search(layer) else _NUMBER.sub("*", layer)


def _make_added_tasks(
    adapter_pairing: Pairing, merged_pairing: Pairing
) -> tuple[list[faults.MergedLayer], list[Unpaired]]:
    """Return tasks for vocabulary rows that both MERGED and the adapter add, and the remaining
    unpaired tensors.
    """
    rows_of = {
        (item.layer, item.shape): item.rows
        for item in adapter_pairing.unpaired
        if item.reason == "added_rows" and item.rows is not None
    }
    tasks, unpaired = [], []
    for item in merged_pairing.unpaired:
        key = item.layer, item.shape
        if item.reason == "added_rows" and item.rows is not None and key in rows_of:
            rows, columns = item.shape
            name = f"{item.layer} (added rows)"
            tasks.append(faults.MergedLayer(name, (rows, columns), rows_of.pop(key), item.rows))
        else:
            unpaired.append(replace(item, detail=item.detail.replace("TUNED", "MERGED")))
    unpaired += [
        item
        for item in adapter_pairing.unpaired
        if item.reason != "added_rows" or (item.layer, item.shape) in rows_of
    ]
    return tasks, unpaired
