"""``overlap``: measure the fraction of gradients in an update's subspaces; ``subspaces``: compute
these alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from lora_diag.adapters import Adapter
from lora_diag.deltas import Delta, FactoredDelta, Pairing, Unpaired, drop_base, footprint, selector
from lora_diag.diagnostics.overlap import OverlapOptions
from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.errors import NothingComparedError, UsageError
from lora_diag.gradients import GradientStep, History, Snapshot, histories, open_steps
from lora_diag.layers.change import (
    PRODUCT_OVERFLOW,
    Change,
    bytes_of,
    load_change,
    measure_on_device,
)
from lora_diag.layers.resolution import resolution
from lora_diag.layers.task import LayerSettings, LayerTask, leave_out, not_finite
from lora_diag.linalg.devices import resolve_device
from lora_diag.linalg.distance import measure_shares, orthonormalize
from lora_diag.linalg.exact import numerical_rank
from lora_diag.linalg.methods import Allowance, check_request
from lora_diag.metrics.energy import RANKS
from lora_diag.metrics.resolution import Verdict
from lora_diag.metrics.subspaces import overlap_by_chance
from lora_diag.records import LeftOut, Results, RunInput
from lora_diag.running.engines import run_local
from lora_diag.running.inputs import Comparison, describe_steps
from lora_diag.running.layers import LayerRun, check_ranks
from lora_diag.running.options import Matching, Method, Workers, show_options
from lora_diag.storage import Checkpoint

# Bound on energy fractions that ``krylov`` has to reach before its vectors are used; else all of
# them are computed. Measured at 1024² and 2048×1024, r up to 64, spectra i^-1 to i^-3 and planted
# ranks: where it meets this bound, κ and the others are within 1e-6 of those from ``gram``. At i^-4
# they are 1.5e-5 off, but there σ_64 is below the float32 rounding of ΔW.
TOL = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapSettings(LayerSettings):
    """Settings of the measurement of a layer.

    Args:
        ranks: Ranks r of the subspaces. Ranks above that of ΔW or of its factors are skipped; the
            own rank of factors is always measured.
    """

    ranks: tuple[int, ...] = RANKS


@dataclass(frozen=True, slots=True)
class GradientTask(LayerTask):
    """One layer's update and its gradients."""

    snapshots: tuple[Snapshot, ...]


@dataclass(frozen=True, slots=True)
class Subspaces:
    """The top singular subspaces of one layer's update.

    Args:
        layer: The weight's name in BASE.
        u: U, ``(out, R)`` float64, orthonormal columns, the most important direction first.
        v: V, ``(in, R)``, likewise.
        ranks: Ranks of the measured overlaps, ascending; at most R.
        method: Method of the computation.
        verdict: Whether the files resolve the update.
        blocks: Number of row blocks in which ΔW was read, because memory did not hold it; None if
            it did.
    """

    layer: str
    u: Tensor
    v: Tensor
    ranks: tuple[int, ...]
    method: str
    verdict: Verdict
    blocks: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.u.shape[0], self.v.shape[0]


def estimate_bytes(task: GradientTask, settings: OverlapSettings) -> int:
    """Estimate the memory of measuring a layer in bytes: its decomposition; gradients are read in
    blocks.
    """
    return bytes_of(task.delta, _make_allowance(task.delta, settings))


def _make_allowance(delta: Delta, settings: OverlapSettings) -> Allowance | None:
    """Return the allowance for ΔW and the vectors of the largest requested rank; None without a
    memory limit.
    """
    largest_rank = max((rank for rank in settings.ranks if rank <= min(delta.shape)), default=1)
    return (
        None
        if settings.memory is None
        else Allowance(settings.memory, settings.method, largest_rank, vectors=True)
    )


def measure_layer(task: GradientTask, settings: OverlapSettings) -> tuple[Overlap | LeftOut, ...]:
    """Measure the overlap of every gradient of a layer with the subspaces of its update.

    Args:
        task: The layer.
        settings: Settings of the measurement.

    Returns:
        One record for each step and rank. If there are no subspaces, the ``left_out`` record of
            ``layer_subspaces``
        instead; if a gradient or its norm is not finite, one instead of the records of its step.
    """

    def measure(device: torch.device) -> tuple[Overlap | LeftOut, ...]:
        spaces = layer_subspaces(task.delta, settings, device)
        if isinstance(spaces, LeftOut):
            return (spaces,)
        records = (
            overlaps(spaces, snapshot.step, snapshot.blocks(task.shape))
            for snapshot in task.snapshots
        )
        return tuple(chain(*records))

    return measure_on_device(measure, settings.device)


def layer_subspaces(
    delta: Delta, settings: OverlapSettings, device: torch.device
) -> Subspaces | LeftOut:
    """Compute the top singular subspaces of one ΔW.

    Args:
        delta: The layer.
        settings: Settings of the measurement.
        device: Device of the computation and of the result.

    Returns:
        The subspaces; of an update with factors, those that the factors span. A ``left_out`` record
            if ΔW is not finite
        or zero, or without factors has fewer directions than every requested rank.
    """
    delta = drop_base(delta)
    change = load_change(delta, device, allowance=_make_allowance(delta, settings))
    if change.non_finite is not None:
        return not_finite(delta, change.non_finite)
    ranks = _choose_ranks(delta, change, settings.ranks)
    if not ranks:
        return _leave_out_narrow(delta, settings)
    factors = change.decompose(settings.method, ranks[-1], True, TOL, settings.seed)
    if not math.isfinite(factors.fro):
        return not_finite(delta, PRODUCT_OVERFLOW)
    if factors.fro == 0.0:
        return leave_out(delta, "no_reference", "ΔW is zero, so it has no singular subspaces")
    (u, vh), directions = factors.vectors, numerical_rank(factors)
    if directions < ranks[-1]:  # the vectors beyond it are arbitrary
        own_ranks = {directions} if isinstance(delta, FactoredDelta) else set[int]()
        ranks = tuple(sorted({*(rank for rank in ranks if rank <= directions), *own_ranks}))
        u, vh = u[:, :directions], vh[:directions]
    if not ranks:
        return _leave_out_narrow(delta, settings)
    verdict = resolution(change.rounding, factors).verdict
    u, v = orthonormalize(u), orthonormalize(vh.T)
    return Subspaces(delta.layer, u, v, ranks, factors.method, verdict, change.row_blocks)


def _leave_out_narrow(delta: Delta, settings: OverlapSettings) -> LeftOut:
    """Return the record of a layer whose update has fewer directions than any requested rank."""
    detail = f"has fewer directions than {min(settings.ranks)}, the smallest of the ranks asked for"
    return leave_out(delta, "no_reference", detail)


def _choose_ranks(delta: Delta, change: Change, requested: tuple[int, ...]) -> tuple[int, ...]:
    """Return the requested ranks that ΔW can have; with factors, those below their own rank, and
    that.
    """
    if not isinstance(delta, FactoredDelta) or change.factors is None:
        return tuple(rank for rank in requested if rank <= min(delta.shape))
    own_rank = min(change.factors[0].shape[1], *delta.shape)
    return tuple(sorted({*(rank for rank in requested if rank < own_rank), own_rank}))


def overlaps(
    spaces: Subspaces, step: int, blocks: Iterable[Tensor]
) -> tuple[Overlap | LeftOut, ...]:
    """Measure the overlap of one gradient with the subspaces of an update.

    Args:
        spaces: The subspaces.
        step: t.
        blocks: The rows of G_t, ``(rows, in)`` each, from the first row to the last.

    Returns:
        One record for each rank, with null fractions if G_t is zero; if G_t is not finite or its
            norm overflows, one
        ``left_out`` record.
    """
    fractions = measure_shares(blocks, spaces.u, spaces.v, spaces.ranks)
    if isinstance(fractions, str):
        detail = f"step {step}: {fractions}"
        return (
            LeftOut(layer=spaces.layer, shape=spaces.shape, reason="non_finite", detail=detail),
        )
    records = []
    for rank, *by_field in zip(
        spaces.ranks,
        fractions.both,
        fractions.tangent,
        fractions.left,
        fractions.right,
        strict=True,
    ):
        random = overlap_by_chance(spaces.shape, rank)._asdict()
        shares: dict[str, Any] = dict(
            zip(random, by_field if fractions.fro else (None,) * 4, strict=True)
        )
        shares |= {f"{name}_random": share for name, share in random.items()}
        records.append(
            Overlap(
                layer=spaces.layer,
                shape=spaces.shape,
                step=step,
                rank=rank,
                gradient_fro=fractions.fro,
                method=spaces.method,
                blocks=spaces.blocks,
                verdict=spaces.verdict,
                **shares,
            )
        )
    return tuple(records)


@dataclass(frozen=True)
class Reference:
    """The top singular subspaces of an update, layer by layer; made by ``lora_diag.subspaces``.

    Args:
        base: Checkpoint that gives the layer names.
        layers: The subspaces, by layer; 8·r·(out + in) bytes each.
        inputs: Inputs of the update, for the run record.
        settings: Settings of the computation, for the run record.
        left_out: Layers without subspaces, with the reason.
    """

    base: Checkpoint
    layers: Mapping[str, Subspaces]
    inputs: tuple[RunInput, ...]
    settings: Mapping[str, Any]
    left_out: tuple[LeftOut, ...] = ()


@show_options
def overlap(
    base: Path | str,
    tuned: Path | str,
    gradients: Sequence[Path | str],
    **options: Unpack[OverlapOptions],
) -> Results[Overlap]:
    r"""Measure κ_t = ‖U_rᵀ G_t V_r‖_F / ‖G_t‖_F and the reach of an adapter, for every layer, step
    and rank.

    U_r and V_r are the top singular vectors of ΔW = W_tuned − W_base. Gradients are read in row
    blocks, one layer of one step at a time per worker.

    Args:
        base: Base checkpoint.
        tuned: Fine-tuned checkpoint, of a pilot run; or an adapter, whose own subspaces are then
            the reference.
        gradients: Snapshots of ∂L/∂W: folders with one safetensors file (or one folder of shards)
            per step, or such files.
        ranks: Ranks r. Ranks larger than a layer or an adapter are skipped there; the own rank of
            an adapter with factors is always measured.
        show_rank: A further rank to measure, which the command shows; None for no further rank.
        **options: ``OverlapOptions``.

    Returns:
        One record for each layer, step and rank. Layers without a gradient or without subspaces,
            gradients without a
        layer and gradients that are not finite are in ``left_out``.

    Raises:
        UsageError: An option is invalid, no gradients are given, ``tuned`` contains gradients, an
            input is in the wrong place, or ``output`` may be neither replaced nor resumed.
        InputError: An input cannot be read or does not fit ``base``; a snapshot has no valid step,
            or its step or shapes contradict those of another; or the results file cannot be
            written.
        NothingComparedError: The sides have no weight in common, none is selected, or no compared
            layer has a gradient.

    Example:
        >>> samples = "sample_checkpoints"
        >>> inputs = (f"{samples}/base", f"{samples}/full_ft", [f"{samples}/gradients"])
        >>> found = overlap(*inputs, layers=r"layers\.0.*q_proj")
        >>> [(record.step, record.rank) for record in found][:6]
        [(0, 4), (0, 8), (0, 16), (0, 32), (0, 64), (40, 4)]
    """
    run = LayerRun("overlap", options, OverlapOptions)
    ranks = [*run.options["ranks"]]
    if run.options["show_rank"] is not None:
        ranks.append(run.options["show_rank"])
    settings = run.settings(OverlapSettings, ranks=check_ranks(ranks))
    check_request(settings.method, settings.ranks[-1], 0.5)
    if not gradients:
        raise UsageError(
            "overlap: no gradients are given; give a folder with one safetensors file per step"
        )
    compared = run.compare(base, tuned)
    _refuse_gradient(compared.update)
    steps = open_steps(gradients)
    gradient_histories, unmatched = histories(steps, compared.base)
    tasks, without_gradient = _join_gradients(compared, gradient_histories, unmatched, steps)
    if not tasks:
        raise NothingComparedError(_explain_no_overlap(compared, gradient_histories, unmatched))
    is_selected = selector(run.options["layers"], run.options["exclude"])
    unpaired = [
        *without_gradient,
        *_list_unmatched(compared.pairing, gradient_histories, unmatched, is_selected),
    ]
    return run.over(
        tasks,
        measure_layer,
        estimate_bytes,
        settings,
        Pairing(compared.pairing.deltas, (*compared.pairing.unpaired, *unpaired)),
        (*compared.inputs, describe_steps(gradients, steps, run.options["verify"])),
        {"ranks": list(settings.ranks), "steps": [step.step for step in steps]},
        recorded=("layers", "exclude", "svd", "device", "seed"),
        rest=_find_rest,
    )


def _find_rest(task: GradientTask, records: Sequence[Overlap]) -> GradientTask | None:
    """Return a task with those of its gradients that have no record; None if all have one."""
    done = {record.step for record in records}
    snapshots = tuple(snapshot for snapshot in task.snapshots if snapshot.step not in done)
    return replace(task, snapshots=snapshots) if snapshots else None


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

    They stay on ``device``; the recorder copies them to the gradients' device, if that has float64.

    Args:
        base: Base checkpoint.
        tuned: Fine-tuned checkpoint of a pilot run; or an adapter, whose own subspaces are taken.
        ranks: Ranks of the overlaps to measure.
        **options: ``SubspaceOptions``.

    Returns:
        The subspaces, 8·r·(out + in) bytes per layer, where r is the largest rank measured there.

    Raises:
        UsageError: An option is invalid, or an input is in the wrong place.
        InputError: An input cannot be read or does not fit ``base``, or a decomposition did not
            converge.
        NothingComparedError: The sides have no weight in common, or none is selected.

    Example:
        >>> found = subspaces("sample_checkpoints/base", "sample_checkpoints/lora_r4")
        >>> len(found.layers), found.layers["model.layers.0.mlp.up_proj.weight"].u.shape
        (28, torch.Size([384, 4]))
    """
    run = LayerRun("subspaces", options, SubspaceOptions)
    settings = run.settings(OverlapSettings, ranks=check_ranks(ranks))
    check_request(settings.method, settings.ranks[-1], 0.5)
    compared = run.compare(base, tuned)
    measure = partial(layer_subspaces, settings=settings, device=resolve_device(settings.device))
    found = list(run_local(measure, compared.matrices, run.layout(compared.matrices), footprint))
    assert compared.base is not None
    return Reference(
        base=compared.base,
        layers={spaces.layer: spaces for spaces in found if isinstance(spaces, Subspaces)},
        inputs=compared.inputs,
        settings={"ranks": list(settings.ranks), "svd": settings.method, "seed": settings.seed},
        left_out=tuple(record for record in found if isinstance(record, LeftOut)),
    )


def _refuse_gradient(tuned: Checkpoint | Adapter) -> None:
    """Refuse gradients that are given as TUNED; they would be measured like weights.

    Raises:
        UsageError: Its metadata mark it as gradients.
    """
    if isinstance(tuned, Checkpoint) and any(
        file.metadata.get("kind") == "gradient" for file in tuned.files
    ):
        raise UsageError(
            f"{tuned.path}: contains gradients; give BASE, then TUNED or an adapter, then the "
            "gradients"
        )


def _join_gradients(
    compared: Comparison,
    gradient_histories: Sequence[History],
    unmatched: Sequence[Unpaired],
    steps: Sequence[GradientStep],
) -> tuple[list[GradientTask], list[Unpaired]]:
    """Return the updates joined with their gradients, and the layers without a fitting gradient at
    a step.

    Args:
        compared: BASE and TUNED.
        gradient_histories: The gradients of each layer.
        unmatched: The other tensors of the snapshots, with the reason.
        steps: The steps of the gradients.
    """
    by_layer = {history.layer: history for history in gradient_histories}
    detail_by_layer = {tensor.layer: tensor.detail for tensor in unmatched}
    tasks: list[GradientTask] = []
    without_gradient: list[Unpaired] = []
    for delta in compared.matrices:
        history = by_layer.get(delta.layer)
        if history is None:
            where = f"any of the {len(steps)} steps" if len(steps) > 1 else f"step {steps[0].step}"
            detail = detail_by_layer.get(delta.layer, f"no gradient of it at {where}")
            without_gradient.append(Unpaired(delta.layer, delta.shape, "no_gradient", detail))
        # Gradients may have more rows: those of an extended vocabulary were not compared.
        elif history.shape[1] != delta.shape[1] or history.shape[0] < delta.shape[0]:
            detail = f"its gradients are {list(history.shape)}, its update is {list(delta.shape)}"
            without_gradient.append(Unpaired(delta.layer, delta.shape, "shape_differs", detail))
        else:
            tasks.append(GradientTask(delta, history.snapshots))
            snapshot_steps = {snapshot.step for snapshot in history.snapshots}
            if missing_steps := [
                str(step.step) for step in steps if step.step not in snapshot_steps
            ]:
                steps_text = (
                    f"step{'s' if len(missing_steps) > 1 else ''} {', '.join(missing_steps[:8])}"
                )
                suffix = f" and {len(missing_steps) - 8} more" if len(missing_steps) > 8 else ""
                detail = f"no gradient of it at {steps_text}{suffix}; the other steps are measured"
                without_gradient.append(Unpaired(delta.layer, delta.shape, "no_gradient", detail))
    return tasks, without_gradient


def _list_unmatched(
    pairing: Pairing,
    gradient_histories: Sequence[History],
    unmatched: Sequence[Unpaired],
    is_selected: Callable[[str], bool],
) -> Iterator[Unpaired]:
    """Yield the selected gradients that belong to no compared or skipped tensor of TUNED."""
    layers_of_pairing = {each.layer for each in (*pairing.deltas, *pairing.unpaired)}
    detail = "has gradients, and TUNED does not change it"
    without_update = [
        Unpaired(history.layer, history.shape, "no_reference", detail)
        for history in gradient_histories
    ]
    for tensor in (*without_update, *unmatched):
        if tensor.layer not in layers_of_pairing and is_selected(tensor.layer):
            yield tensor


def _explain_no_overlap(
    compared: Comparison, gradient_histories: Sequence[History], unmatched: Sequence[Unpaired]
) -> str:
    """Return why no layer has both an update and a gradient; with names of both sides if there are
    updates.
    """
    if not compared.matrices:
        return (
            "nothing was compared: no matrix of BASE is in TUNED or selected, so there are no "
            "subspaces"
        )
    names = [history.layer for history in gradient_histories] + [
        tensor.layer for tensor in unmatched
    ]
    gradient_names = (
        f"gradients have names like {names[0]}" if names else "the gradients hold no tensor"
    )
    return (
        f"no layer that changed has a gradient, so nothing was compared. Layers have names like "
        f"{compared.matrices[0].layer}; {gradient_names}"
    )
