"""``checkpoints``: measure the updates of a training run, layer by layer, at all its checkpoints.

Layers whose factors are stored as they are, in safetensors and of a rank up to 64, are measured with NumPy
(``factors``); all others with torch (``stored``), which is imported only then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, Unpack

import numpy as np

from lora_diag.adapters import is_adapter
from lora_diag.checkpoints import locate
from lora_diag.deltas import Delta, FactoredDelta, Pairing, Unpaired, natural_order
from lora_diag.diagnostics.checkpoints import CheckpointsOptions
from lora_diag.diagnostics.checkpoints.factors import (
    CheckpointsSettings,
    Evolution,
    Factors,
    LayerSeries,
    find_problem,
    measure_factors,
)
from lora_diag.diagnostics.checkpoints.record import Checkpoint, CheckpointLayer
from lora_diag.diagnostics.checkpoints.series import Series, Step, find_series, is_run
from lora_diag.errors import InputError, UsageError
from lora_diag.metrics.energy import effective_rank, energy_curve, stable_rank
from lora_diag.records import Results
from lora_diag.rendering.text import middle
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import Comparison, open_base
from lora_diag.running.layers import LayerRun, check_ranks
from lora_diag.running.options import show_options
from lora_diag.running.progress import RunRecords
from lora_diag.thin import MAX_RANK


def is_thin(delta: Delta) -> TypeGuard[FactoredDelta]:
    """Return whether NumPy can read the factors of an update."""
    return isinstance(delta, FactoredDelta) and delta.thin is not None and delta.rank <= MAX_RANK


def measure_layer(task: LayerSeries, settings: CheckpointsSettings) -> tuple[CheckpointLayer, ...]:
    """Measure one layer at all checkpoints.

    Args:
        task: The layer.
        settings: Settings of the measurement.

    Returns:
        One record for each checkpoint, in order.

    Raises:
        InputError: A file could not be read, or a decomposition did not converge.
        MemoryLimitError: The layer does not fit.
    """
    if not all(map(is_thin, task.deltas)):
        from lora_diag.diagnostics.checkpoints.stored import measure_stored  # deferred: imports torch
        from lora_diag.layers.change import append_note, compute_on_device
        from lora_diag.linalg.devices import resolve_device

        measured, note = compute_on_device(partial(measure_stored, task, settings), resolve_device(settings.device))
        return tuple(append_note(record, note) for record in make_records(task, settings, *measured))
    read = [_read_factors(delta) for delta in task.deltas if is_thin(delta)]
    problems = [find_problem(factors) for factors in read]
    finite = [factors for factors, problem in zip(read, problems, strict=True) if problem is None]
    base_fro = None
    if task.deltas[0].base is not None:
        from lora_diag.diagnostics.checkpoints.stored import measure_base  # deferred: imports torch

        base_fro = measure_base(task.deltas[0])
    return make_records(task, settings, problems, measure_factors(finite, settings.directions), base_fro)


def _read_factors(delta: FactoredDelta) -> Factors:
    """Return the stored factors of an update."""
    assert delta.thin is not None
    return Factors(delta.thin.read_b(), delta.thin.read_a(), delta.thin.read_scale())


def make_records(
    task: LayerSeries,
    settings: CheckpointsSettings,
    problems: Sequence[str | None],
    found: Evolution | None,
    base_fro: float | None,
) -> tuple[CheckpointLayer, ...]:
    """Return the records of a layer.

    Args:
        task: The layer.
        settings: Settings of the measurement.
        problems: Why the update of each checkpoint is not finite; None if it is.
        found: Measurements of the finite ones, in order; None without any.
        base_fro: ‖W_base‖_F; None if it is not known.
    """
    finite = [t for t, problem in enumerate(problems) if problem is None]
    position = {t: i for i, t in enumerate(finite)}
    records = []
    for t, (step, problem) in enumerate(zip(settings.steps, problems, strict=True)):
        named: dict[str, Any] = {"layer": task.layer, "step": step, "shape": task.shape, "base_fro": base_fro}
        if problem is not None or found is None:
            records.append(CheckpointLayer(**named, fro=None, non_finite=problem or "its norm overflows"))
            continue
        records.append(CheckpointLayer(**named, **_describe_step(found, position, t, settings, task.shape, base_fro)))
    return tuple(records)


def _describe_step(
    found: Evolution,
    position: dict[int, int],
    t: int,
    settings: CheckpointsSettings,
    shape: tuple[int, int],
    base_fro: float | None,
) -> dict[str, Any]:
    """Return the fields of the record of a finite update; ``position`` is the place of each in ``found``."""
    i, last = position[t], len(settings.steps) - 1
    fro, s, complete, d = float(found.fro[i]), found.s[i], found.complete[i], found.increments
    zero = fro == 0.0
    curve = np.zeros(0) if zero else energy_curve(s, fro, complete)
    beyond = 1.0 if complete and not zero else None
    # With a checkpoint before it that is not finite, there is no increment; the first one starts at BASE.
    known = t == 0 or t - 1 in position
    length = math.sqrt(max(0.0, float(d[i, i]))) if known else None
    cosine = None
    if known and t > 0 and (t == 1 or t - 2 in position) and (norms := float(d[i, i]) * float(d[i - 1, i - 1])) > 0:
        cosine = max(-1.0, min(1.0, float(d[i, i - 1]) / math.sqrt(norms)))

    def overlap(other: int) -> float | None:
        value = float(found.overlaps[i, position[other]]) if other in position and other != t else math.nan
        return None if math.isnan(value) else _round(value)

    return {
        "fro": fro,
        "relative": fro / base_fro if base_fro else None,
        "sigma_1": float(s[0]) if len(s) else 0.0,
        "spectral_share": None if zero else min(1.0, float((s[0] / fro) ** 2)),
        "stable_rank": None if zero else stable_rank(s, fro),
        "effective_rank": effective_rank(s) if complete and not zero else None,
        "energy": {str(r): float(curve[r - 1]) if r <= len(curve) else beyond for r in settings.ranks},
        "directions": int(found.directions[i]),
        "overlap_next": overlap(t + 1),
        "overlap_last": overlap(last),
        "overlap_random": found.directions[i] / shape[0] if found.directions[i] else None,
        "increment": None if length is None else _round(length),
        "cosine": None if cosine is None else _round(cosine),
        "unchanged": found.unchanged[i] if known else None,
        "dead": zero,
        "method": found.method[i],
        "gram": tuple(_round(float(found.gram[i, position[u]])) if u in position else None for u in range(t + 1)),
        "overlaps": tuple(map(overlap, range(t))),
    }


def _round(value: float) -> float:
    """Return a value to 9 significant digits: sums of products differ in the last ones by the number of threads."""
    return float(f"{value:.9g}")


def estimate_bytes(task: LayerSeries, settings: CheckpointsSettings) -> int:
    """Estimate the memory of measuring a layer in bytes."""
    if all(map(is_thin, task.deltas)):
        ranks = sum(delta.rank for delta in task.deltas if is_thin(delta))
        return 24 * (ranks * sum(task.shape) + 8 * ranks**2)
    from lora_diag.diagnostics.checkpoints.stored import estimate_stored_bytes  # deferred: imports torch

    return estimate_stored_bytes(task, settings)


@show_options
def trajectory(
    run: Path | str | Sequence[Path | str], **options: Unpack[CheckpointsOptions]
) -> Results[CheckpointLayer]:
    r"""Measure how the updates of a training run evolve over its checkpoints, layer by layer.

    Args:
        run: The folder of a training run; or its checkpoints, in any order.
        base: Base checkpoint; None for adapters that do not need it.
        ranks: Ranks r of C(r).
        directions: k, the number of largest left singular vectors whose spaces are compared.
        top: Number of largest singular values of weights that are not factored; None for all.
        **options: ``CheckpointsOptions``.

    Returns:
        One record per layer and checkpoint; in ``whole``, one per checkpoint.

    Raises:
        UsageError: An option is invalid, the checkpoints are no adapters and there is no ``base``, or ``output`` may be
            neither replaced nor resumed.
        InputError: A checkpoint cannot be read or does not fit, its step is not known, or the results file cannot be
            written.
        NothingComparedError: The folder contains no checkpoint, or no weight is in all of them.
    """
    called = LayerRun("checkpoints", options, CheckpointsOptions)
    base = called.options["base"]
    series = find_series([run] if isinstance(run, str | Path) else run)
    opened = None if base is None else open_base(base)
    if opened is None and (full := [step.path for step in series.steps if not is_adapter(locate(step.path))]):
        raise UsageError(f"{full[0]}: is not an adapter; give BASE after the run, to compare its checkpoints with")
    if len(series.steps) < 2 and series.final is None:
        raise InputError(
            f"{series.steps[0].path}: is the only checkpoint; give a run with two or more, or use spectrum"
        )
    pair = partial(called.compare, opened) if opened is not None else partial(called.compare, tuned=None)
    compared = [pair(step.path) for step in series.steps]
    steps = list(series.steps)
    if series.final is not None:
        final = pair(series.final.path)
        if final.inputs[-1].fingerprint not in {each.inputs[-1].fingerprint for each in compared}:
            if series.final.step <= steps[-1].step:
                raise InputError(
                    f"{series.final.path}: holds a model unlike all checkpoints, and its step is not known; give the "
                    "checkpoints one by one"
                )
            steps.append(series.final)
            compared.append(final)
    tasks, missing = _align_layers(steps, compared)
    called.torch = not all(is_thin(delta) and delta.base is None for task in tasks for delta in task.deltas)
    if not called.torch:
        called.usual_workers = 1  # products of all checkpoints' factors use all cores
    settings = called.settings(
        CheckpointsSettings,
        ranks=check_ranks(called.options["ranks"]),
        directions=called.options["directions"],
        steps=tuple(step.step for step in steps),
        top=called.options["top"],
    )
    last = compared[-1].pairing
    return called.over(
        tasks,
        measure_layer,
        estimate_bytes,
        settings,
        Pairing(tuple(delta for delta in last.deltas if not delta.is_matrix), (*last.unpaired, *missing)),
        (*compared[0].inputs[:-1], *(each.inputs[-1] for each in compared)),
        {"ranks": list(settings.ranks), "directions": settings.directions, "steps": list(settings.steps)},
        recorded=("layers", "exclude", "method", "top", "tol", "device", "seed"),
        conclude=partial(_put_checkpoints, steps, series),
    )


def measure_run(inputs: Sequence[Path | str], **options: Unpack[CheckpointsOptions]) -> Results[CheckpointLayer]:
    """Measure a run given as its folder and perhaps BASE, or as checkpoints, of which BASE is an option.

    Raises:
        LoradiagError: As ``trajectory``.
    """
    paths = [Path(path) for path in inputs]
    if len(paths) == 2 and options.get("base") is None and is_run(paths[0]):
        options["base"], paths = paths[1], paths[:1]
    return trajectory(paths[0] if len(paths) == 1 else paths, **options)


def _align_layers(
    steps: Sequence[Step], compared: Sequence[Comparison]
) -> tuple[list[LayerSeries], tuple[Unpaired, ...]]:
    """Return the matrices that all checkpoints have, in natural order, and those that some lack.

    Raises:
        InputError: Two checkpoints have different shapes for one name.
    """
    by_layer: dict[str, dict[int, Delta]] = {}
    for step, comparison in zip(steps, compared, strict=True):
        for delta in comparison.matrices:
            by_layer.setdefault(delta.layer, {})[step.step] = delta
    tasks: list[LayerSeries] = []
    missing: list[Unpaired] = []
    for layer in sorted(by_layer, key=natural_order):
        deltas = by_layer[layer]
        shape = next(iter(deltas.values())).shape
        for step in steps:
            if step.step in deltas and deltas[step.step].shape != shape:
                raise InputError(
                    f"{step.path}: {layer} is {list(deltas[step.step].shape)}, but {list(shape)} in {steps[0].path}; "
                    "give the checkpoints of one run"
                )
        lacking = [step for step in steps if step.step not in deltas]
        if lacking:
            detail = f"not in {len(lacking)} of {len(steps)} checkpoints, such as {lacking[0].path}"
            missing.append(Unpaired(layer, shape, "only_in_adapter", legible(detail)))
        else:
            tasks.append(LayerSeries(layer, shape, tuple(deltas[step.step] for step in steps)))
    if not tasks:
        raise InputError(f"{steps[0].path}: no weight is in all checkpoints; give the checkpoints of one run")
    return tasks, tuple(missing)


def _put_checkpoints(steps: Sequence[Step], series: Series, records: RunRecords[CheckpointLayer]) -> None:
    """Write the records of the checkpoints."""
    records.put(*pool_checkpoints(steps, series, records.layers))


def pool_checkpoints(steps: Sequence[Step], series: Series, layers: Sequence[CheckpointLayer]) -> Iterator[Checkpoint]:
    """Yield the record of every checkpoint.

    Args:
        steps: The checkpoints, in order.
        series: The run, with the trainer's log.
        layers: The records of their layers.
    """
    by_step: dict[int, list[CheckpointLayer]] = {step.step: [] for step in steps}
    for record in layers:
        by_step[record.step].append(record)
    before, earlier = 0, list[CheckpointLayer]()
    for step in steps:
        group = by_step[step.step]
        rates = series.logged.rates_between(before, step.step)
        yield Checkpoint(
            step=step.step,
            path=legible(step.path),
            final=step.final,
            train_loss=series.logged.mean_loss(before, step.step),
            eval_loss=series.logged.eval_loss.get(step.step),
            rate=series.logged.rate_at(step.step),
            rate_sum=rates[0] if rates else None,
            rate_norm=rates[1] if rates else None,
            **pool_layers(group, earlier),
        )
        before, earlier = step.step, group


def pool_layers(group: Sequence[CheckpointLayer], earlier: Sequence[CheckpointLayer]) -> dict[str, Any]:
    """Return the fields of a checkpoint that pool its layers.

    Args:
        group: The records of its layers.
        earlier: Those of the checkpoint before, in the same order; empty for the first.
    """
    finite = [record for record in group if record.fro is not None]
    fro = math.hypot(*(record.fro or 0.0 for record in finite))
    base_fro = math.hypot(*(record.base_fro or 0.0 for record in finite))
    increments = [record.increment for record in group if record.increment is not None]
    increment = math.hypot(*increments) if increments else None
    norms_before = {record.layer: record.increment for record in earlier}
    pairs = [  # of layers that are finite at three checkpoints: both increments, and their cosine, 0 if one is zero
        (now, before, record.cosine or 0.0)
        for record in group
        if (now := record.increment) is not None and (before := norms_before.get(record.layer)) is not None
    ]
    length = math.hypot(*(now for now, *_ in pairs)) * math.hypot(*(before for _, before, _ in pairs))
    medians = ("spectral_share", "effective_rank", "overlap_next", "overlap_last", "overlap_random")
    return {
        "fro": fro if finite else None,
        "relative": fro / base_fro if finite and base_fro else None,
        "increment": increment,
        "cosine": _round(math.fsum(now * before * cosine for now, before, cosine in pairs) / length)
        if length
        else None,
        **{name: middle([getattr(record, name) for record in group]) for name in medians},
        "layers": len(group),
        "dead": sum(record.dead for record in group),
        "non_finite": sum(record.non_finite is not None for record in group),
    }
