"""``overlap``: measure the fraction of gradients in an update's subspaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

from lora_diag.adapters.user_alpha import alpha_option
from lora_diag.checkpoints import Checkpoint, open_checkpoint
from lora_diag.deltas import Delta, Pairing, StoredDelta, Unpaired, footprint, selector
from lora_diag.diagnostics.overlap.measure import GradientTask, OverlapSettings, size
from lora_diag.diagnostics.overlap.measure import overlap as measure
from lora_diag.diagnostics.overlap.measure import subspaces as spaces_of
from lora_diag.diagnostics.overlap.options import OverlapOptions
from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.overlap.reference import Reference
from lora_diag.errors import NothingComparedError, UsageError
from lora_diag.gradients import History, Step, histories, open_steps
from lora_diag.linalg import check_request, resolve_device
from lora_diag.records import LeftOut, Results
from lora_diag.running.engines import Layout, run_local
from lora_diag.running.gradients import describe_steps
from lora_diag.running.inputs import Comparison, compare
from lora_diag.running.layers import LayerRun
from lora_diag.running.measuring import (
    check_ranks,
    check_running,
    layout_of,
    record_unpaired,
    without_rank,
)
from lora_diag.running.options import Matching, Method, Workers, fill_options, show_options


@show_options
def overlap(
    base: Path | str,
    tuned: Path | str,
    gradients: Sequence[Path | str],
    **options: Unpack[OverlapOptions],
) -> Results[Overlap]:
    r"""Measure κ_t = ‖U_rᵀ G_t V_r‖_F / ‖G_t‖_F and the reach of an adapter, for every layer, step and rank.

    U_r and V_r are the top singular vectors of ΔW = W_tuned − W_base. Gradients are read in row blocks, one layer of
    one step at a time per worker.

    Args:
        base: Base checkpoint.
        tuned: Fine-tuned checkpoint, of a pilot run; or an adapter, whose own subspaces are then the reference.
        gradients: Snapshots of ∂L/∂W: folders with one safetensors file (or one folder of shards) per step, or such
            files.
        ranks: Ranks r. Ranks larger than a layer or an adapter are skipped there; an adapter's own rank is always
            measured.
        **options: ``OverlapOptions``.

    Returns:
        One record for each layer, step and rank. Layers without a gradient, gradients without a layer and gradients
        that are not finite are in ``left_out``.

    Raises:
        UsageError: An option is invalid.
        InputError: An input cannot be read, or two snapshots are of one step.
        NothingComparedError: No layer that changed has a gradient.

    Example:
        >>> samples = "sample_checkpoints"
        >>> inputs = (f"{samples}/base", f"{samples}/full_ft", [f"{samples}/gradients"])
        >>> found = overlap(*inputs, layers=r"layers\.0.*q_proj")
        >>> [(record.step, record.rank) for record in found][:6]
        [(0, 4), (0, 8), (0, 16), (0, 32), (0, 64), (40, 4)]
    """
    run = LayerRun("overlap", options, OverlapOptions)
    settings = run.settings(OverlapSettings, ranks=check_ranks(run.options["ranks"]))
    check_request(settings.method, settings.ranks[-1], 0.5)
    if not gradients:
        raise UsageError("overlap: no gradients are given; give a folder with one safetensors file per step")
    compared = run.compare(base, tuned)
    _refuse_gradient(compared.pairing, tuned)
    steps = open_steps(gradients)
    # Layers of a compared BASE have the names of its files, and gradients are matched to these.
    checkpoint = _find_base(compared.pairing) or open_checkpoint(base)
    followed, unmatched = histories(steps, checkpoint)
    tasks, missing = _follow(compared.pairing, followed, unmatched, steps)
    if not tasks:
        raise NothingComparedError(_explain_no_overlap(compared, followed, unmatched))
    chosen = selector(run.options["layers"], run.options["exclude"])
    rest = [*missing, *_list_unmatched(compared.pairing, followed, unmatched, chosen)]
    return run.over(
        tasks,
        measure,
        size,
        settings,
        lambda layout, earlier, limited: _list_left_out(
            compared.pairing, rest, layout, tasks, earlier, replace(limited, device=run.where.here)
        ),
        (*compared.inputs, describe_steps(gradients, steps, run.options["verify"])),
        {"ranks": list(settings.ranks), "steps": [step.step for step in steps]},
        recorded=("layers", "exclude", "method", "device", "seed"),
    )


class SubspaceOptions(Matching, Method, Workers, total=False):
    """Options of ``subspaces``."""


@show_options
def subspaces(
    base: Path | str,
    tuned: Path | str,
    *,
    ranks: Sequence[int] = (16,),
    **options: Unpack[SubspaceOptions],
) -> Reference:
    """Compute the top singular subspaces of ΔW, as a reference for a ``GradientRecorder``.

    They stay on ``device`` and are moved to the gradients' device when compared.

    Args:
        base: Base checkpoint.
        tuned: Fine-tuned checkpoint of a pilot run; or an adapter, whose own subspaces are taken.
        ranks: Ranks of the overlaps to measure.
        **options: ``SubspaceOptions``.

    Returns:
        The subspaces, 8·r·(out + in) bytes per layer, where r is the largest rank.

    Raises:
        UsageError: An option is invalid.
        InputError: An input cannot be read.
        NothingComparedError: The checkpoints have no weight in common.

    Example:
        >>> found = subspaces("sample_checkpoints/base", "sample_checkpoints/lora_r4")
        >>> len(found.layers), found.layers["model.layers.0.mlp.up_proj.weight"].u.shape
        (28, torch.Size([384, 4]))
    """
    arguments = fill_options(SubspaceOptions, options)
    settings = OverlapSettings(
        ranks=check_ranks(ranks), method=arguments["method"], seed=arguments["seed"], device=arguments["device"]
    )
    check_running(arguments["workers"], settings.seed)
    check_request(settings.method, settings.ranks[-1], 0.5)
    device = resolve_device(settings.device)
    compared = compare(
        base,
        tuned,
        arguments["layers"],
        arguments["exclude"],
        arguments["allow_unmatched"],
        stated_alpha=alpha_option(arguments),
    )
    matrices = [delta for delta in compared.pairing.deltas if delta.is_matrix]
    layout = layout_of(matrices, arguments["workers"], device.type)
    results = list(run_local(partial(spaces_of, settings=settings, device=device), matrices, layout, footprint))
    return Reference(
        base=_find_base(compared.pairing) or open_checkpoint(base),
        layers={item.layer: item for item in results if not isinstance(item, LeftOut)},
        inputs=compared.inputs,
        settings={"ranks": list(settings.ranks), "method": settings.method, "seed": settings.seed},
        left_out=tuple(item for item in results if isinstance(item, LeftOut)),
    )


def _refuse_gradient(pairing: Pairing, tuned: Path | str) -> None:
    """Refuse gradients given as TUNED, which would be measured without an error.

    Raises:
        UsageError: Its metadata mark it as gradients.
    """
    stored = next((delta.tuned.checkpoint for delta in pairing.deltas if isinstance(delta, StoredDelta)), None)
    if stored is not None and any(file.metadata.get("kind") == "gradient" for file in stored.files):
        raise UsageError(f"{tuned}: contains gradients; give BASE, then TUNED or an adapter, then the gradients")


def _find_base(pairing: Pairing) -> Checkpoint | None:
    return next((delta.base.checkpoint for delta in pairing.deltas if delta.base is not None), None)


def _follow(
    pairing: Pairing, followed: Sequence[History], unmatched: Sequence[Unpaired], steps: Sequence[Step]
) -> tuple[list[GradientTask], list[Unpaired]]:
    """Join updates and gradients; also return layers without a gradient at some or all steps."""
    by_layer = {history.layer: history for history in followed}
    why = {item.layer: item.detail for item in unmatched}
    tasks: list[GradientTask] = []
    absent: list[Unpaired] = []
    for delta in (delta for delta in pairing.deltas if delta.is_matrix):
        history = by_layer.get(delta.layer)
        if history is None:
            every = f"at any of the {len(steps)} steps" if len(steps) > 1 else f"at step {steps[0].step}"
            detail = why.get(delta.layer, f"no gradient of it {every}")
            absent.append(Unpaired(delta.layer, delta.shape, "no_gradient", detail))
        elif not _covers_all_rows(history, delta):
            detail = f"its gradients are {list(history.shape)}, its update is {list(delta.shape)}"
            absent.append(Unpaired(delta.layer, delta.shape, "shape_differs", detail))
        else:
            tasks.append(GradientTask(delta, history.snapshots))
            have = {snapshot.step for snapshot in history.snapshots}
            if missing := [str(step.step) for step in steps if step.step not in have]:
                steps_text = f"step{'s' if len(missing) > 1 else ''} {', '.join(missing[:8])}"
                suffix = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
                detail = f"no gradient of it at {steps_text}{suffix}; the other steps are measured"
                absent.append(Unpaired(delta.layer, delta.shape, "no_gradient", detail))
    return tasks, absent


def _covers_all_rows(history: History, delta: Delta) -> bool:
    """Return whether gradients cover all rows of an update; an extended vocabulary has rows that were not compared."""
    return history.shape[1] == delta.shape[1] and history.shape[0] >= delta.shape[0]


def _list_unmatched(
    pairing: Pairing, followed: Sequence[History], unmatched: Sequence[Unpaired], chosen: Callable[[str], bool]
) -> Iterator[Unpaired]:
    """Yield the gradients that belong to no update."""
    known = {delta.layer for delta in pairing.deltas} | {item.layer for item in pairing.unpaired}
    for history in followed:
        if history.layer not in known and chosen(history.layer):
            detail = "has gradients, and TUNED does not change it"
            yield Unpaired(history.layer, history.shape, "no_reference", detail)
    yield from (item for item in unmatched if item.layer not in known and chosen(item.layer))


def _list_left_out(
    pairing: Pairing,
    rest: Sequence[Unpaired],
    layout: Layout,
    tasks: Sequence[GradientTask],
    earlier: Results[Overlap],
    settings: OverlapSettings,
) -> Iterator[LeftOut]:
    """Yield the layers that are left out before measuring, and those that a resumed run left out."""
    yield from without_rank(pairing, layout, settings.device)
    yield from record_unpaired(Pairing((), tuple(rest)), layout, settings.device)
    done: dict[str, set[int]] = {}
    for record in earlier:
        done.setdefault(record.layer, set()).add(record.step)
    for task in tasks:
        incomplete = [item for item in task.snapshots if item.step not in done.get(task.layer, {item.step})]
        if incomplete:
            unmeasured = measure(GradientTask(task.delta, tuple(incomplete)), settings)
            yield from (record for record in unmeasured if isinstance(record, LeftOut))


def _explain_no_overlap(compared: Comparison, followed: Sequence[History], unmatched: Sequence[Unpaired]) -> str:
    changed = next((delta.layer for delta in compared.pairing.deltas if delta.is_matrix), None)
    if changed is None:
        return "nothing was compared: no matrix of BASE is in TUNED or selected, so there are no subspaces"
    example = followed[0].layer if followed else unmatched[0].layer if unmatched else None
    names = f"gradients have names like {example}" if example else "the gradients hold no tensor"
    return f"no layer that changed has a gradient, so nothing was compared. Layers have names like {changed}; {names}"
