"""Measurement of ``verify-merge``: check a merged checkpoint against BASE and the adapter, layer by layer.

Decides from W, ΔW and M of each layer whether its merge is correct; ``faults`` diagnoses incorrect ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from lora_diag.adapters import Adapter
from lora_diag.checkpoints import Checkpoint
from lora_diag.deltas import (
    BLOCK_ENTRIES,
    Delta,
    DenseDelta,
    FactoredDelta,
    Pairing,
    Side,
    StoredDelta,
    Unpaired,
    footprint,
    natural_order,
    row_blocks,
    row_spans,
    selector,
)
from lora_diag.diagnostics.verify_merge.faults import (
    MAX_UNEXPLAINED,
    MIN_LINES,
    NOT_ADDED,
    FailedLayer,
    Fault,
    count_distinct_lines,
    find_fault,
    find_precise_scale,
    has_halves,
    is_coherent,
    make_precise,
)
from lora_diag.diagnostics.verify_merge.record import CORRECT, Merge, MergeStatus
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.layers.change import COMPUTED_ENTRY_BYTES, load_addend
from lora_diag.layers.task import LayerSettings
from lora_diag.linalg.difference import first_non_finite
from lora_diag.linalg.merge import (
    Addend,
    Block,
    Check,
    Product,
    Rounding,
    Whole,
    check_merge,
    stored_dtype,
    unit_roundoff,
)
from lora_diag.linalg.methods import require_memory
from lora_diag.linalg.rounding import LAYOUT, SHORTER
from lora_diag.records import LeftOut, Results
from lora_diag.running.layers import LayerRun
from lora_diag.running.options import RunOptions, show_options

# Number of changed entries inspected to infer the dtype of MERGED's values.
SAMPLE = 2**16

# Bytes for every entry of a block: both sides, and float64 copies of them while faults are tried. Measured on
# 4096x11008 (bfloat16, float32): 29 and 37 where a merge is right, 47 and 64 where every fault was tried in vain.
BLOCK = 72

# If ΔW should change more than this fraction of the entries and none changed, coarse arithmetic is not the cause: its
# errors have both signs and would change some.
DROPPED = 0.1

# A correct layer must distinguish a scale of 1 from one with this error; otherwise it is inconclusive.
RESOLVED = 0.05

# If the errors of c allow more than this, test entry by entry whether ΔW was computed precisely.
RESOLVED_ENTRIES = 0.005

# If rounding removed or added more than this fraction of ΔW, the standard error of c is not that of the scale.
LOST_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """One layer of a merge, as stored in BASE and MERGED.

    Args:
        layer: Its name in BASE.
        shape: ``(out, in)``; a 1-D tensor of n entries is ``(1, n)``.
        base: Location of W.
        merged: Location of M; None if MERGED has no such layer.
        deltas: The adapter's updates of it; several where tied weights are stored once. None at all: M must be W.
        is_matrix: False for 1-D tensors.
        adapted: Whether the adapter changes it.
        others: The updates of its kind, its own among them: of all experts, or in all blocks. One tuple for all these
            layers: a list for each of 256 experts would be 65,000 entries a block.
        missing: Why MERGED does not have the layer; empty if it does.
        kept: The first blocks, kept once they are read: an incorrect layer is compared with many hypotheses.
        max_kept: Maximum number of blocks to keep.
    """

    layer: str
    shape: tuple[int, int]
    base: Side
    merged: Side | None
    deltas: tuple[Delta, ...] = ()
    is_matrix: bool = True
    adapted: bool = True
    others: tuple[FactoredDelta, ...] = ()
    missing: str = ""
    kept: list[Block] = field(default_factory=list, repr=False, compare=False)
    max_kept: int = 1

    def blocks(self) -> Iterator[Block]:
        """Yield row blocks of W and M, with the spacings of M's format; None for those of a floating-point dtype."""
        assert self.merged is not None
        yield from self.kept
        skip = len(self.kept)
        sides = (row_blocks(side, self.shape, skip) for side in (self.base, self.merged))
        for (first, last), w, m in zip(list(row_spans(self.shape))[skip:], *sides, strict=True):
            step = self.merged.read_steps(first * self.shape[1], last * self.shape[1])
            block = w, m, step.view_as(m) if step is not None else None
            if len(self.kept) < self.max_kept:
                self.kept.append(block)
            yield block

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor, of a 1-D tensor ``(n,)``."""
        return self.shape if self.is_matrix else self.shape[1:]

    def first_change(self) -> Tensor:
        """Return the rows of M − W in the first block, float64."""
        w, m, _ = next(self.blocks())
        return m.double() - w.double()

    @property
    def footprint(self) -> int:
        """Upper bound on the memory of the check in bytes: ``needed``, and both sides as stored, to be kept."""
        if self.merged is None or not self.adapted:  # one pass, or none
            return self.needed
        entry: int = sum(getattr(torch, side.dtype).itemsize for side in (self.base, self.merged))
        return self.needed + (entry + 4 * self.merged.is_quantized) * math.prod(self.shape)

    @property
    def needed(self) -> int:
        """Memory in bytes without which the layer cannot be checked: blocks, thin factors, and whole updates."""
        blocks = BLOCK * min(max(BLOCK_ENTRIES, self.shape[1]), math.prod(self.shape))
        thin = sum(footprint(delta) for delta in self.deltas if isinstance(delta, FactoredDelta))
        return blocks + thin + self.held

    @property
    def held(self) -> int:
        """Upper bound on the memory in bytes of updates without thin factors, which cannot be read by rows."""
        whole_updates = [delta for delta in self.deltas if not isinstance(delta, FactoredDelta)]
        if not whole_updates:
            return 0
        computed = COMPUTED_ENTRY_BYTES if any(isinstance(delta, DenseDelta) for delta in whole_updates) else 0
        summed = 8 if len(self.deltas) > 1 or whole_updates[0].shape != self.shape else 0
        copies = 16 if computed else 28  # a weight that the adapter stores in full is read from two files
        reordered = copies if self.shape[0] == self.shape[1] or has_halves(self.layer, self.shape) else 0
        return (computed + summed + reordered) * math.prod(self.shape)


def verify(task: MergedLayer, memory: int | None = None) -> Merge | LeftOut:
    """Compare one layer of MERGED with BASE and the adapter.

    Args:
        task: The layer.
        memory: Memory limit in bytes; None without limit.

    Returns:
        The record; if BASE or the adapter is not finite or the norm of ΔW overflows, a ``left_out`` record.

    Raises:
        InputError: A file could not be read.
        MemoryLimitError: An update that is not a product of thin factors does not fit.
    """
    if task.merged is None:
        return _make_record(task, None, None, "missing", task.missing)
    if memory is not None and task.held:
        require_memory(task.needed, memory, task.shape, "its update, which is held whole, takes", "--exclude it")
    keeps = task.adapted and (memory is None or task.footprint <= memory)
    return _verify_stored(replace(task, kept=[], max_kept=task.shape[0] if keeps else 1), task.merged)


def _verify_stored(task: MergedLayer, merged: Side) -> Merge | LeftOut:
    """Return the record of a layer as ``verify``, given M."""
    addend, problem = sum_addends(task.deltas, task.shape)
    if problem is not None:
        return _make_left_out(task, problem)
    rounding, ambiguous = _infer_rounding(task)
    check = check_merge(task.blocks(), task.shape, addend, rounding)
    if check.base_non_finite is not None:
        return _make_left_out(task, check.base_non_finite)
    if check.non_finite is not None:
        return _make_record(task, None, rounding, "other", _describe_problem(task, check.non_finite))
    if not math.isfinite(check.expected + abs(check.inner)):
        return _make_left_out(task, "the squares of its entries overflow float64")
    correct = _find_correct_merge(task, addend, rounding, check)
    if correct is None:
        fault = _find_fault_of(task, addend, rounding, check)
        return _make_record(task, check, rounding, fault.status, fault.cause)
    if verdict := _decide_by_entries(task, addend, rounding, check, correct):
        return _make_record(task, check, rounding, verdict.status, verdict.cause)
    ambiguous = ambiguous or merged.is_quantized or isinstance(addend, Whole)
    if ambiguous and check.moved <= MAX_UNEXPLAINED * check.entries and check.expected > 0:
        return _make_record(task, check, rounding, *_distinguish_from_zero(task, addend, rounding))
    if cause := _explain_ambiguity(task, addend, correct):
        return _make_record(task, check, rounding, "inconclusive", cause)
    return _make_record(task, check, rounding, "ok", "")


def _decide_by_entries(
    task: MergedLayer, addend: Addend, rounding: Rounding, check: Check, correct: _CorrectMerge
) -> Fault | None:
    """Return the verdict of single entries where the error of the scale is large; None where they decide nothing.

    The entries are tested for a ΔW that was computed in float32. The verdict is ``wrong scale``, or ``ok`` where M is
    W + ΔW to the last bit and neither 1 − RESOLVED nor 1 + RESOLVED fits.
    """
    if not _has_testable_scale(task, addend, check):
        return None
    coherent = is_coherent(check) and not correct.check.resolves(RESOLVED_ENTRIES)
    unresolved = not correct.check.resolves(RESOLVED)
    if not (coherent or unresolved):
        return None
    precise_rounding = make_precise(rounding)
    precise_check = check_merge(task.blocks(), task.shape, addend, precise_rounding)
    exact_merge = _find_correct_merge(task, addend, precise_rounding, precise_check)
    if exact_merge is None:
        return find_precise_scale(_make_failed_layer(task, addend, rounding, check))
    if not (unresolved and exact_merge.check.moved):
        return None
    for factor in (1 - RESOLVED, 1 + RESOLVED):
        scaled = exact_merge.addend.times(factor)
        if count_distinct_lines(check_merge(task.blocks(), task.shape, scaled, exact_merge.rounding)) < MIN_LINES:
            return None
    return Fault("ok", "")


def _has_testable_scale(task: MergedLayer, addend: Addend, check: Check) -> bool:
    """Return whether the scale of ΔW is tested: where ΔW is not zero, neither exact nor added to a quantized MERGED."""
    assert task.merged is not None
    return not (task.merged.is_quantized or not check.expected or (isinstance(addend, Whole) and addend.exact))


@dataclass(frozen=True, slots=True)
class _CorrectMerge:
    """A correct merge that explains a layer: ΔW with its arithmetic, and the check with it."""

    addend: Addend
    rounding: Rounding
    check: Check


def _find_correct_merge(
    task: MergedLayer, addend: Addend, rounding: Rounding, first_check: Check
) -> _CorrectMerge | None:
    """Return the correct merge that explains every entry and the scale of a layer; None without one.

    Roundings that all entries share are no noise: a W that was rounded first, a sum that was rounded twice, a scaling s
    that was rounded itself. Each is tried as such.
    """
    if first_check.count == 0 and not first_check.drifted:
        return _CorrectMerge(addend, rounding, first_check)
    if not task.deltas or first_check.moved == 0:
        return None
    addends: list[Addend] = [addend, *(addend.times(factor) for factor in list_rounded_scales(task, rounding.dtype))]
    for candidate in addends:
        for order in list_orders(rounding):
            if candidate is addend and order is rounding:
                continue
            check = check_merge(task.blocks(), task.shape, candidate, order, whole=False)
            if check.count == 0 and not check.drifted:
                return _CorrectMerge(candidate, order, check)
    return None


def list_orders(rounding: Rounding) -> Iterator[Rounding]:
    """Yield the possible orders of rounding of W, the sum W + ΔW, and M."""
    finer = [dtype for dtype in LAYOUT if LAYOUT[rounding.dtype][2] < LAYOUT[dtype][2] < LAYOUT[torch.float32][2]]
    for first in (None, *rounding.bases):
        for between in (None, *finer):
            yield rounding if first is between is None else replace(rounding, first=first, between=between)


def list_rounded_scales(task: MergedLayer, *dtypes: torch.dtype) -> list[float]:
    """Return fl(s)/s for the scaling s rounded to each of the dtypes, without 1; empty without one common s."""
    scales = {delta.scale if isinstance(delta, FactoredDelta) else None for delta in task.deltas}
    scale = scales.pop() if len(scales) == 1 else None
    if not scale:
        return []
    factors = {float(torch.tensor(scale, dtype=torch.float64).to(dtype)) / scale for dtype in dtypes}
    return [factor for factor in sorted(factors - {1.0}) if 0 < factor < math.inf]


def _explain_ambiguity(task: MergedLayer, addend: Addend, correct: _CorrectMerge) -> str:
    """Return why this file cannot determine the scale to ``RESOLVED``; empty if it can, or the scale is not tested."""
    check = correct.check
    if not _has_testable_scale(task, addend, check):
        return ""
    is_lost = abs(check.ideal / check.expected - 1) > LOST_FRACTION
    if not is_lost and check.resolves(RESOLVED):
        return ""
    for factor in (1 + RESOLVED, 1 - RESOLVED):
        alternative = check_merge(
            task.blocks(), task.shape, correct.addend.times(factor), correct.rounding, whole=False
        )
        if alternative.count == 0 and not alternative.drifted:
            return f"M is a rounding of W + ΔW and of W + {factor:.4g}·ΔW: this file is too coarse for the scale"
    return ""


def _distinguish_from_zero(task: MergedLayer, addend: Addend, rounding: Rounding) -> tuple[MergeStatus, str]:
    """Return status and cause if the tolerance permits both ΔW and zero, assuming ΔW was computed in float32."""
    sharp = check_merge(task.blocks(), task.shape, addend, replace(rounding, roundoff=2.0**-24))
    if sharp.count == 0 and sharp.moved > 0:
        return "ok", ""
    if sharp.unchanged == sharp.entries and sharp.count > DROPPED * sharp.entries:
        return "dropped", NOT_ADDED
    return "inconclusive", "M is a rounding of W + ΔW and of W alone: this file is too coarse to distinguish them"


def _find_fault_of(task: MergedLayer, addend: Addend, rounding: Rounding, check: Check) -> Fault:
    """Return the fault of a layer that is not W + ΔW."""
    if not task.adapted:
        return Fault("changed", "the adapter does not touch it, but MERGED differs from BASE")
    if not task.deltas:
        return Fault("other", "the rows that the adapter adds are not what it holds")
    return find_fault(_make_failed_layer(task, addend, rounding, check))


def _make_failed_layer(task: MergedLayer, addend: Addend, rounding: Rounding, check: Check) -> FailedLayer:
    """Return a layer with functions to check hypotheses on it."""
    single = task.deltas[0] if len(task.deltas) == 1 else None
    scale = single.scale if isinstance(single, FactoredDelta) else None
    rank = addend.b.shape[1] if isinstance(addend, Product) and scale is not None else None
    others = {d.layer: d for d in task.others if d.layer != task.layer and d.shape == task.shape}
    return FailedLayer(
        layer=task.layer,
        is_matrix=task.is_matrix,
        shape=task.shape,
        addend=addend,
        rounding=rounding,
        check=check,
        recheck=lambda other, other_rounding: check_merge(task.blocks(), task.shape, other, other_rounding),
        recheck_on_top=lambda: check_merge(_merge_twice(task, addend, rounding), task.shape, addend, rounding),
        load_change=task.first_change,
        scale=scale,
        rank=rank,
        rounded=tuple(list_rounded_scales(task, torch.bfloat16, torch.float16)),
        others=tuple(others),
        load_other=lambda name: sum_addends((others[name],), task.shape)[0],
    )


def _merge_twice(task: MergedLayer, addend: Addend, rounding: Rounding) -> Iterator[Block]:
    """Yield the blocks of a merge whose W already includes ΔW, rounded."""
    for span, (w, m, step) in zip(row_spans(task.shape), task.blocks(), strict=True):
        yield (w.double() + addend.rows(*span)).to(rounding.dtype), m, step


def sum_addends(deltas: tuple[Delta, ...], shape: tuple[int, int]) -> tuple[Addend, str | None]:
    """Return the sum of a layer's updates, and None; or an update that is not finite, and a description of its entry.

    Args:
        deltas: The updates; none for ΔW = 0. Where they have fewer rows than the layer (a vocabulary that grew), the
            other rows have none.
        shape: ``(m, n)`` of the layer.
    """
    addends = [load_addend(delta) for delta in deltas]
    for addend in addends:
        if problem := _find_non_finite(addend):
            return addend, problem
    products = [addend for addend in addends if isinstance(addend, Product)]
    if len(products) == len(addends):
        factors = [torch.nn.functional.pad(addend.b, (0, 0, 0, shape[0] - len(addend.b))) for addend in products]
        b = torch.cat(factors or [torch.zeros(shape[0], 0).double()], dim=1)
        a = torch.cat([addend.a for addend in products] or [torch.zeros(0, shape[1]).double()])
        return Product(b, a), None
    if len(addends) == 1 and isinstance(addends[0], Whole) and addends[0].shape == shape:
        return addends[0], None
    total = torch.zeros(shape, dtype=torch.float64)
    for addend, delta in zip(addends, deltas, strict=True):
        rows = min(shape[0], delta.shape[0])
        total[:rows] += addend.rows(0, rows)
    return Whole(shape, lambda first, last: total[first:last]), None


def _find_non_finite(addend: Addend) -> str | None:
    """Return a description of the first entry that is not finite; None without one."""
    if isinstance(addend, Product):
        return first_non_finite("lora_B holds", addend.b) or first_non_finite("lora_A holds", addend.a)
    for span in row_spans(addend.shape):
        if problem := first_non_finite("the adapter's update holds", addend.rows(*span), span[0]):
            return problem
    return None


def _infer_rounding(task: MergedLayer) -> tuple[Rounding, bool]:
    """Return the possible rounding of a correct merge, and whether its dtype is a guess (see ``_find_dtype``)."""
    assert task.merged is not None
    dtype, ambiguous = _find_dtype(task)
    mantissa = LAYOUT[dtype][2]
    update_dtypes = [getattr(torch, delta.dtypes[1], dtype) for delta in task.deltas]
    update_dtypes = [other for other in update_dtypes if other in LAYOUT]
    factored = [delta for delta in task.deltas if isinstance(delta, FactoredDelta)]
    base = getattr(torch, task.base.dtype)
    return Rounding(
        dtype=dtype,
        roundoff=max(map(unit_roundoff, [dtype, *update_dtypes])),
        cast=any(LAYOUT[other][2] > mantissa for other in update_dtypes)
        or not all(_is_power_of_two(delta.scale) for delta in factored),
        scale=max((abs(delta.scale) for delta in factored if delta.scale), default=1.0),
        diagonal=any(delta.diagonal for delta in factored),
        # a quantized base is dequantized in a dtype of the merger's choice
        bases=tuple(other for other in SHORTER[base] if mantissa <= LAYOUT[other][2] or task.base.is_quantized),
        dequantized=task.base.is_quantized,
    ), ambiguous


def _is_power_of_two(scale: float | None) -> bool:
    """Return whether a scale is known and a power of two or its negative, so that scaling by it is exact."""
    return bool(scale) and math.frexp(scale or 0.0)[0] in {0.5, -0.5}


def _find_dtype(task: MergedLayer) -> tuple[torch.dtype, bool]:
    """Return the dtype of MERGED's values, judged by changed entries, and whether it is a guess.

    It is one if no entry changed and the unchanged ones fit into a shorter dtype than the stored one.
    """
    assert task.merged is not None
    stored = getattr(torch, task.merged.dtype)
    if task.merged.is_quantized or stored == torch.bfloat16:
        return stored, False
    unchanged: Tensor | None = None
    for w, m, _ in task.blocks():
        changed = m[m.double() != w.double()]
        if len(changed):
            return stored_dtype(changed[:: max(1, len(changed) // SAMPLE)]), False
        unchanged = m.reshape(-1)[:SAMPLE] if unchanged is None else unchanged
        if not task.adapted:
            return stored, False  # M = W so far, independent of the dtype; a block that differs is inspected separately
    shortest = stored_dtype(unchanged) if unchanged is not None else stored
    return shortest, shortest != stored


def _make_left_out(task: MergedLayer, problem: str) -> LeftOut:
    """Return the ``left_out`` record of a layer with entries that are not finite, or whose squares overflow."""
    detail = _describe_problem(task, problem)
    return LeftOut(layer=task.layer, shape=task.stored_shape, reason="non_finite", detail=detail)


def _describe_problem(task: MergedLayer, problem: str) -> str:
    """Return a description of an entry with its index in the stored tensor: a vector is read as one row."""
    return problem if task.is_matrix else problem.replace("[0, ", "[")


def _make_record(
    task: MergedLayer, check: Check | None, rounding: Rounding | None, status: MergeStatus, cause: str
) -> Merge:
    """Return the record of a layer; its numbers are null without a check."""
    scale = check.inner / check.expected if check is not None and check.expected > 0 else None
    return Merge(
        layer=task.layer,
        shape=task.stored_shape,
        adapted=task.adapted,
        status=status,
        dtype=str(rounding.dtype).removeprefix("torch.") if rounding is not None else None,
        differing=check.count if check else None,
        differing_share=check.count / max(1, check.entries) if check else None,
        max_ulp=check.worst if check else None,
        scale=scale,
        scale_expected=check.ideal / check.expected if check is not None and scale is not None else None,
        scale_error=check.scale_error if check is not None and math.isfinite(check.scale_error) else None,
        retained=scale if status in CORRECT else None,
        residual=math.sqrt(check.residual / check.expected) if check is not None and scale is not None else None,
        unchanged=check.unchanged / max(1, check.entries) if check else None,
        expected_fro=math.sqrt(check.expected) if check else None,
        observed_fro=math.sqrt(check.observed) if check else None,
        base_fro=math.sqrt(check.base) if check else None,
        cause=cause,
    )


# The index of an expert, stacked (``w[3]``) or separate (``experts.3.``); and every number in a name.
_EXPERT = re.compile(r"\[\d+\]$|(?<=experts\.)\d+(?=\.)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

# Reasons for tensors of BASE that MERGED does not have.
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

    A layer is correct if every entry of M is a rounding of W + ΔW that a merge in M's dtype can give:
    |M − (W + ΔW)| ≤ ulp(M)/2 + δ, with δ the rounding inside ΔW. A layer that is not is tried for the usual faults.
    The comparison runs on CPUs only; the tasks of a cluster need no GPUs.

    Args:
        base: The checkpoint that the adapter was trained on.
        adapter: The adapter.
        merged: The merged checkpoint.
        **options: ``RunOptions``.

    Returns:
        One record for every weight of ``base`` that is in ``merged``, adapted or not, for every adapted one that is
        not, and for vocabulary rows that both the adapter and ``merged`` add.
        ``lora_diag.diagnostics.verify_merge.record.outcome`` gives their joint outcome.

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
    everything = {"layers": None, "exclude": None}  # the selection is by names of MERGED's layers
    refused = (Checkpoint, f"not an adapter; the order is: {ORDER}")
    updates = run.compare(base, adapter, refuse=refused, **everything)
    assert updates.base is not None
    refused_merge = (Adapter, f"an adapter, not a merged checkpoint; the order is: {ORDER}")
    written = run.compare(updates.base, merged, "merged", refuse=refused_merge, **everything)
    selected = selector(run.options["layers"], run.options["exclude"])
    tasks, unpaired = _align_layers(updates.pairing, written.pairing, merged, selected)
    return run.over(
        tasks,
        _measure_layer,
        _estimate_bytes,
        LayerSettings(),
        Pairing((), unpaired),
        (*updates.inputs, written.inputs[-1]),
        {},
        recorded=("layers", "exclude", "allow_unmatched"),
    )


def _measure_layer(task: MergedLayer, settings: LayerSettings) -> Sequence[Merge | LeftOut]:
    """Return the record of one layer."""
    return (verify(task, settings.memory),)


def _estimate_bytes(task: MergedLayer, settings: LayerSettings) -> int:
    """Return the memory of the check in bytes, at most the limit."""
    return task.footprint if settings.memory is None else min(settings.memory, task.footprint)


def _align_layers(
    adapter_pairing: Pairing, merged_pairing: Pairing, merged: Path | str, selected: Callable[[str], bool]
) -> tuple[list[MergedLayer], tuple[Unpaired, ...]]:
    """Align the adapter's updates with the layers of MERGED, by the layers of BASE.

    Returns:
        One task for each selected layer, in natural order of their names; and the selected tensors that cannot be
        checked, with the layers of MERGED that are not selected.

    Raises:
        InputError: BASE or MERGED stores an adapted weight as other than plain numbers.
        NothingComparedError: No adapted weight is selected.
    """
    updates, unplaced = _group_by_target(adapter_pairing, merged_pairing)
    siblings = _group_siblings(adapter_pairing)
    stored = [delta for delta in merged_pairing.deltas if isinstance(delta, StoredDelta)]
    tasks = [_make_task(delta, updates.get(delta.layer, ()), siblings) for delta in stored]
    missing_in_merged = {item.layer: item for item in merged_pairing.unpaired if item.reason in _MISSING_REASONS}
    tasks += [_make_missing_task(delta, missing_in_merged, merged) for delta in unplaced if selected(delta.layer)]
    added, unpaired = _make_added_tasks(adapter_pairing, merged_pairing)
    tasks += added
    unavailable = {task.layer for task in tasks if task.missing}
    unpaired = [item for item in unpaired if item.layer not in unavailable]
    chosen = sorted((task for task in tasks if selected(task.layer)), key=lambda task: natural_order(task.layer))
    if not any(task.adapted for task in chosen):
        raise NothingComparedError("nothing was compared: --layers and --exclude select no adapted weight; change them")
    not_selected = [Unpaired.by_selection(task.layer, task.shape) for task in tasks if not selected(task.layer)]
    return chosen, (*(item for item in unpaired if selected(item.layer)), *not_selected)


def _group_by_target(
    adapter_pairing: Pairing, merged_pairing: Pairing
) -> tuple[dict[str, tuple[Delta, ...]], list[Delta]]:
    """Return the updates by layer of MERGED, and those without a layer of their width there.

    Tied weights are stored once: where MERGED has no separate head, the head's update is one of the embedding.
    """
    merged_deltas = {delta.layer: delta for delta in merged_pairing.deltas}
    layers_at = {
        (delta.base.name, delta.base.offset): delta.layer for delta in merged_pairing.deltas if delta.base is not None
    }
    updates: dict[str, tuple[Delta, ...]] = {}
    unplaced: list[Delta] = []
    for delta in adapter_pairing.deltas:
        target: str | None = delta.layer
        if delta.layer not in merged_deltas:
            target = None if delta.base is None else layers_at.get((delta.base.name, delta.base.offset))
        if target is None or merged_deltas[target].shape[1] != delta.shape[1]:
            unplaced.append(delta)
        else:
            updates[target] = (*updates.get(target, ()), delta)
    return updates, unplaced


def _make_task(
    delta: StoredDelta, updates: tuple[Delta, ...], siblings: dict[str, tuple[FactoredDelta, ...]]
) -> MergedLayer:
    """Return the task of a layer that both BASE and MERGED have, with the adapter's updates of it."""
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


def _make_missing_task(delta: Delta, missing_in_merged: Mapping[str, Unpaired], merged: Path | str) -> MergedLayer:
    """Return the task of a layer that the adapter changes and that is missing in MERGED, with the reason.

    Raises:
        InputError: BASE or MERGED stores it as other than plain numbers.
    """
    item = missing_in_merged.get(delta.layer)
    if item is None and delta.base is not None:
        item = missing_in_merged.get(delta.base.name)
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
    """Return the factored updates that could be confused, by kind: experts of a block, or a layer of all blocks."""
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


def _make_added_tasks(adapter_pairing: Pairing, merged_pairing: Pairing) -> tuple[list[MergedLayer], list[Unpaired]]:
    """Return tasks for vocabulary rows that both MERGED and the adapter add, and the remaining unpaired tensors."""
    rows_of = {
        (item.layer, item.shape): item.rows
        for item in adapter_pairing.unpaired
        if item.reason == "added_rows" and item.rows is not None
    }
    tasks, unpaired = [], []
    for item in merged_pairing.unpaired:
        adapter_rows = rows_of.get((item.layer, item.shape)) if item.reason == "added_rows" else None
        if item.rows is not None and adapter_rows is not None:
            rows, columns = item.shape
            tasks.append(MergedLayer(f"{item.layer} (added rows)", (rows, columns), adapter_rows, item.rows))
            del rows_of[item.layer, item.shape]
        else:
            unpaired.append(replace(item, detail=item.detail.replace("TUNED", "MERGED")))
    unpaired += [
        item for item in adapter_pairing.unpaired if item.reason != "added_rows" or (item.layer, item.shape) in rows_of
    ]
    return tasks, unpaired
