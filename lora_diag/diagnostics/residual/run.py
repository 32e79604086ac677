"""``residual``: the distance of adapters to a full fine-tune."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Unpack

from lora_diag.checkpoints import as_path
from lora_diag.deltas import Delta, Pairing, StoredDelta, Unpaired
from lora_diag.diagnostics.residual.measure import ComparedUpdate, Layer, size
from lora_diag.diagnostics.residual.measure import residual as measure
from lora_diag.diagnostics.residual.options import ResidualOptions
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.errors import UsageError
from lora_diag.layers.task import LayerSettings
from lora_diag.linalg import check_request
from lora_diag.records import LeftOut, Results
from lora_diag.running.activations import second_moments
from lora_diag.running.engines import Layout
from lora_diag.running.inputs import Comparison
from lora_diag.running.layers import LayerRun
from lora_diag.running.measuring import record_unpaired
from lora_diag.running.options import show_options


@show_options
def residual(
    base: Path | str,
    tuned: Path | str,
    adapters: Sequence[Path | str] = (),
    **options: Unpack[ResidualOptions],
) -> Results[Residual]:
    r"""Measure the distance of adapters from a full fine-tune: ε = ‖ΔW_FT − ΔW_adapter‖_F / ‖ΔW_FT‖_F, by layer.

    Both checkpoints are read once, independent of the number of adapters.

    Args:
        base: Base checkpoint.
        tuned: Full fine-tune that gives D; may be an adapter.
        adapters: Adapters, or checkpoints with a merged adapter.
        reference: Another full fine-tune, such as another seed, to show the distance between equally good solutions.
        activations: Second moments C = E[xxᵀ] of the layers' inputs: a safetensors file with one ``(in, in)`` matrix
            under each weight's name and, in its metadata, ``tokens``. Distances are then also given in the norm
            ‖·C^½‖_F.
        recover: Estimate the update before rounding, as ``recover`` does, and give the expected distance to it, too.
        **options: ``ResidualOptions``.

    Returns:
        One record for each layer and adapter, including layers that an adapter does not change, with ε = 1, and norms
        and biases, which have no rank.

    Raises:
        UsageError: An option is invalid, or there is nothing to compare with ``tuned``.
        InputError: An input cannot be read.
        NothingComparedError: The checkpoints have no weight in common, or an adapter none with them.

    Example:
        >>> names = ("base", "full_ft", "lora_r16")
        >>> base, tuned, adapter = (f"sample_checkpoints/{name}" for name in names)
        >>> found = residual(base, tuned, [adapter], layers=r"layers\.0\..*q_proj")
        >>> found.layers[0].rank, found.layers[0].epsilon > found.layers[0].epsilon_min
        (16, True)
    """
    run = LayerRun("residual", options, ResidualOptions)
    reference, activations, recover = (run.options[name] for name in ("reference", "activations", "recover"))
    check_request(run.options["method"], 1, run.options["tol"])
    _refuse_repeated_inputs(tuned, [*adapters, *([reference] if reference is not None else [])])
    base = as_path(base)  # opened once, so that its headers are not read again
    full = run.compare(base, tuned)
    others = [_set_role(run.compare(base, path), "adapter") for path in adapters]
    if reference is not None:
        others.append(_set_role(run.compare(base, reference), "reference"))
    verify = run.options["verify"]
    moments = second_moments(activations, base, full.pairing, verify) if activations is not None else None
    inputs = (*full.inputs, *(other.inputs[-1] for other in others), *((moments.described,) if moments else ()))
    by_layer = [{delta.layer: _drop_base(delta) for delta in other.pairing.deltas} for other in others]
    tasks = [
        Layer(
            delta,
            tuple(
                ComparedUpdate(other.inputs[-1].path, _get_role(other), known.get(delta.layer))
                for other, known in zip(others, by_layer, strict=True)
            ),
            moments.of.get(delta.layer) if moments else None,
            recover,
        )
        for delta in full.pairing.deltas
    ]
    left_out = Pairing((), (*full.pairing.unpaired, *_list_unmatched(full.pairing, others)))
    return run.over(
        tasks,
        measure,
        size,
        run.settings(LayerSettings),
        lambda layout, earlier, limited: _list_left_out(
            left_out, layout, tasks, earlier, replace(limited, device=run.where.here)
        ),
        inputs,
        {"recover": True} if recover else {},
    )


def _list_left_out(
    left_out: Pairing,
    layout: Layout,
    tasks: Sequence[Layer],
    earlier: Results[Residual],
    settings: LayerSettings,
) -> Iterator[LeftOut]:
    """Yield the layers that are left out before measuring, and those that a resumed run left out."""
    yield from record_unpaired(left_out, layout, settings.device)
    done: dict[str, set[str]] = {}
    for record in earlier:
        done.setdefault(record.layer, set()).add(record.adapter)
    for task in tasks:
        unrecorded = tuple(other for other in task.others if other.name not in done.get(task.layer, {other.name}))
        if unrecorded:
            records = measure(replace(task, others=unrecorded), settings)
            yield from (record for record in records if isinstance(record, LeftOut))


def _refuse_repeated_inputs(tuned: Path | str, others: Sequence[Path | str]) -> None:
    """Refuse to compare nothing, or an input with itself or twice.

    Raises:
        UsageError: There are no inputs to compare with TUNED, or one is TUNED itself or given twice.
    """
    if not others:
        raise UsageError(
            "residual: nothing to compare with TUNED; give at least one ADAPTER, or another full fine-tune with "
            "--reference"
        )
    seen = {os.path.realpath(tuned): "TUNED itself; give another input"}
    for path in others:
        if (known := seen.get(os.path.realpath(path))) is not None:
            raise UsageError(f"{path}: is {known}")
        seen[os.path.realpath(path)] = "given twice; give each path once"


def _set_role(comparison: Comparison, role: str) -> Comparison:
    """Return a comparison whose second input has its role in this command."""
    return replace(
        comparison, inputs=(*comparison.inputs[:-1], comparison.inputs[-1].model_copy(update={"role": role}))
    )


def _get_role(comparison: Comparison) -> Literal["adapter", "reference"]:
    return "reference" if comparison.inputs[-1].role == "reference" else "adapter"


def _drop_base(delta: Delta) -> Delta:
    """Return a ΔW without its base: the norm of the base is already known."""
    return delta if isinstance(delta, StoredDelta) else replace(delta, base=None)


def _list_unmatched(full: Pairing, others: Sequence[Comparison]) -> Iterator[Unpaired]:
    """Yield tensors of adapters that the fine-tune cannot be compared with."""
    known = {delta.layer for delta in full.deltas} | {item.layer for item in full.unpaired}
    for other in others:
        path = other.inputs[-1].path
        for delta in other.pairing.deltas:
            if delta.layer not in known:
                detail = f"{path} changes it, but TUNED does not contain it"
                yield Unpaired(delta.layer, delta.shape, "only_in_adapter", detail)
        for item in other.pairing.unpaired:
            if item.layer not in known:
                yield replace(item, detail=f"{path}: {item.detail}")
