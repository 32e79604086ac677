"""``plan-merge``: fraction of an update that a merge keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from lora_diag.adapters import is_adapter
from lora_diag.adapters.experts import TRANSPOSED_MODELS
from lora_diag.adapters.orientation import Orientation
from lora_diag.checkpoints import as_path, check_exists, locate
from lora_diag.decisions.plan_merge.formats import GROUPS, Target
from lora_diag.decisions.plan_merge.measure import MergeTask, PlanSettings, measure, size
from lora_diag.decisions.plan_merge.options import PlanMergeOptions
from lora_diag.decisions.plan_merge.record import PlannedMerge
from lora_diag.deltas import EXPERTS, Delta
from lora_diag.errors import UsageError
from lora_diag.records import Results
from lora_diag.running.layers import LayerRun
from lora_diag.running.measuring import without_rank
from lora_diag.running.options import show_options


@show_options
def plan_merge(
    base: Path | str,
    adapter: Path | str,
    **options: Unpack[PlanMergeOptions],
) -> Results[PlannedMerge]:
    r"""Measure how much of an adapter's update survives a merge into a storage format, without merging.

    W + ΔW is computed in float64, rounded to float32 and then to the format, entry by entry, as a merge in float32
    does. Nothing is written but the records.

    Args:
        base: The checkpoint that the adapter was trained on.
        adapter: The adapter.
        to: ``bf16``, ``fp16``, ``fp8`` (e4m3), ``mxfp4``, ``nvfp4`` or ``int4``: format of the merged weights.
        group_size: Number of inputs that share a scale of ``int4``; default 128.
        scale: Scales of ``fp8``: ``row`` for one per output (default), ``tensor`` for one per matrix.
        **options: ``PlanMergeOptions``.

    Returns:
        One record for each matrix that the adapter changes.

    Raises:
        UsageError: An option is invalid, or ``adapter`` is not an adapter.
        InputError: An input cannot be read, or the adapter does not fit ``base``.
        NothingComparedError: The two have no weight in common.

    Example:
        >>> found = plan_merge("sample_checkpoints/base", "sample_checkpoints/lora_r4", to="bf16",
        ...     layers=r"layers\.0\..*q_proj")
        >>> found[0].conclusion
        'merge'
    """
    engine = options.get("engine")
    if engine is not None and engine.gpus_per_task:
        raise UsageError("--gpus-per-task: plan-merge runs on CPUs only; remove the option")
    run = LayerRun("plan-merge", options, PlanMergeOptions)
    target = _target(*(run.options[name] for name in ("to", "group_size", "scale")))
    base, adapter = as_path(base), as_path(adapter)
    check_exists(base)
    if not is_adapter(locate(adapter)):
        raise UsageError(f"{adapter}: not an adapter; the order is: loradiag plan-merge BASE ADAPTER --to FORMAT")
    compared = run.compare(base, adapter)
    matrices = [delta for delta in compared.pairing.deltas if delta.is_matrix]
    orientation = next((Orientation(d.base.checkpoint, {}, flag=False) for d in matrices if d.base is not None), None)
    return run.over(
        [MergeTask(delta, orientation is not None and _is_in_out(delta, orientation)) for delta in matrices],
        measure,
        size,
        PlanSettings(target),
        lambda layout, _, __: without_rank(compared.pairing, layout, run.where.here),
        compared.inputs,
        run.own,
        recorded=("layers", "exclude", "allow_unmatched"),
    )


def _target(to: str, group_size: int | None, scale: str | None) -> Target:
    """Return the format.

    Raises:
        UsageError: An option does not apply to the format, or a group has no inputs.
    """
    if group_size is not None and to != "int4":
        raise UsageError(f"--group-size: applies to int4 only; remove it with --to {to}")
    if scale is not None and to != "fp8":
        raise UsageError(f"--scale: applies to fp8 only; remove it with --to {to}")
    if group_size is not None and group_size < 1:
        raise UsageError(f"--group-size {group_size}: must be a positive integer")
    return Target(to, group_size or GROUPS.get(to, 0), scale == "tensor")


def _is_in_out(delta: Delta, orientation: Orientation) -> bool:
    """Return whether a matrix is stored ``(in, out)``: GPT-2's Conv1D, and stacks of experts of some models."""
    if delta.base is None:
        return False
    stored = delta.base.info.shape
    if len(stored) == 3 and EXPERTS.search(delta.base.name):
        return delta.base.checkpoint.config.get("model_type") in TRANSPOSED_MODELS
    return orientation.in_out(delta.base.name, (None, None), stored)
