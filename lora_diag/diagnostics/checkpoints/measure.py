"""``checkpoints``: measure the updates of a training run, layer by layer, at all its checkpoints.

Layers whose factors are stored as they are, in safetensors and of a rank up to 64, are measured
with NumPy (``factors``); all others with torch (``stored``), which is imported only then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, Unpack

from lora_diag.adapters import locate
from lora_diag.deltas import Delta, FactoredDelta, Pairing, Unpaired, natural_order
from lora_diag.diagnostics.checkpoints import CheckpointsOptions, factors
from lora_diag.diagnostics.checkpoints.record import CheckpointLayer
from lora_diag.diagnostics.checkpoints.series import (
    CheckpointSeries,
    Step,
    find_series,
    holds_weights,
    list_checkpoints,
)
from lora_diag.diagnostics.checkpoints.verdict import judge_trajectory, pool_checkpoints
from lora_diag.errors import Given, InputError, UsageError
from lora_diag.metrics.energy import effective_rank, energy_curve, stable_rank
from lora_diag.records import Probe, Results
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import Comparison, open_base
from lora_diag.running.layers import LayerRun, check_ranks
from lora_diag.running.options import show_options
from lora_diag.running.progress import RunRecords
from lora_diag.storage import Checkpoint
from lora_diag.thin import MAX_RANK

if TYPE_CHECKING:
    from lora_diag.diagnostics.checkpoints.judge import CheckpointJudge

# Why an update with finite factors is not finite.
OVERFLOW = "a norm overflows float64"


def is_thin(delta: Delta) -> TypeGuard[FactoredDelta]:
    """Return whether NumPy can read the factors of an update."""
    return isinstance(delta, FactoredDelta) and delta.thin is not None and delta.rank <= MAX_RANK


def measure_layer(
    task: factors.LayerSeries, settings: factors.CheckpointsSettings
) -> tuple[CheckpointLayer, ...]:
    """Measure one layer at all checkpoints.

    Args:
        task: The layer.
        settings: Settings of the measurement.

    Returns:
        One record for each checkpoint, in order.
    """
    if not all(map(is_thin, task.deltas)):
        from lora_diag.diagnostics.checkpoints.stored import (
            measure_stored,
        )  # deferred: imports torch
        from lora_diag.layers.change import append_note, compute_on_device
        from lora_diag.linalg.devices import resolve_device

        measured, note = compute_on_device(
            partial(measure_stored, task, settings), resolve_device(settings.device)
        )
        return tuple(
            append_note(record, note) for record in make_records(task, settings, *measured)
        )
    thin = [delta.thin for delta in task.deltas if is_thin(delta) and delta.thin is not None]
    read = [factors.UpdateFactors(each.read_b(), each.read_a(), each.read_scale()) for each in thin]
    problems = [each.find_problem() for each in read]
    finite = [each for each, problem in zip(read, problems, strict=True) if problem is None]
    base_fro = None
    if task.deltas[0].base is not None:
        from lora_diag.diagnostics.checkpoints.stored import measure_base  # deferred: imports torch

        base_fro = measure_base(task.deltas[0])
    found = factors.measure_factors(finite, settings.directions) if finite else None
    return make_records(task, settings, problems, found, base_fro)


def make_records(
    task: factors.LayerSeries,
    settings: factors.CheckpointsSettings,
    problems: Sequence[str | None],
    found: factors.Evolution | None,
    base_fro: float | None,
) -> tuple[CheckpointLayer, ...]:
    """Return the records of a layer.

    Args:
        task: The layer.
        settings: Settings of the measurement.
        problems: Why the update of each checkpoint is not finite; None if it is.
        found: Measurements of the finite ones, in order; None if there are none, or a norm
            overflows.
        base_fro: ‖W_base‖_F; None if it is not known.
    """
    place = {t: i for i, t in enumerate(t for t, problem in enumerate(problems) if problem is None)}
    records = []
    for t, (step, problem) in enumerate(zip(settings.steps, problems, strict=True)):
        fields: dict[str, Any] = {"fro": None, "non_finite": problem or OVERFLOW}
        if problem is None and found is not None:
            fields = _describe_step(found, place, t, settings)
            fields["relative"] = fields["fro"] / base_fro if base_fro else None
            fields["overlap_random"] = (
                fields["directions"] / task.shape[0] if fields["directions"] else None
            )
        records.append(
            CheckpointLayer(
                layer=task.layer, step=step, shape=task.shape, base_fro=base_fro, **fields
            )
        )
    return tuple(records)


def _describe_step(
    found: factors.Evolution,
    place: Mapping[int, int],
    t: int,
    settings: factors.CheckpointsSettings,
) -> dict[str, Any]:
    """Return the fields of the record of a finite update.

    Args:
        found: Measurements of the finite updates.
        place: Their positions in them, by position among the checkpoints.
        t: Position of this one among the checkpoints.
        settings: Settings of the measurement.
    """
    i, products = place[t], found.increments
    gram, squares = products.cumsum(axis=0).cumsum(axis=1), products.diagonal()
    # After an update that is not finite there is no increment; the first one starts at BASE.
    is_known = t == 0 or t - 1 in place
    before = squares[i - 1] if t > 0 and is_known and (t == 1 or t - 2 in place) else None

    def overlap(other: int) -> float | None:
        known = other in place and other != t
        value = (
            factors.compare_spaces(found.spaces[i], found.spaces[place[other]]) if known else None
        )
        return None if value is None else _round(value)

    return {
        **describe_values(found.s[i], found.fro[i], settings.ranks),
        **describe_increment(squares[i] if is_known else None, before, products[i, i - 1]),
        "directions": found.spaces[i].shape[1],
        "overlap_next": overlap(t + 1),
        "overlap_last": overlap(len(settings.steps) - 1),
        "unchanged": found.unchanged[i] if is_known else None,
        "kinship": found.kinship[i] if is_known and found.kinship else None,
        "method": found.method[i],
        "gram": tuple(_round(gram[i, place[u]]) if u in place else None for u in range(t + 1)),
        "overlaps": tuple(map(overlap, range(t))),
    }


def describe_values(s: factors.Array, fro: float, ranks: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a record that follow from all singular values of a finite update and its
    norm.
    """
    curve = energy_curve(s, fro, complete=True) if fro else None
    return {
        "fro": fro,
        "dead": fro == 0.0,
        "sigma_1": float(s[0]) if len(s) else 0.0,
        "spectral_share": min(1.0, float((s[0] / fro) ** 2)) if fro else None,
        "stable_rank": stable_rank(s, fro) if fro else None,
        "effective_rank": effective_rank(s) if fro else None,
        "energy": {
            str(r): None if curve is None else float(curve[min(r, len(s)) - 1]) for r in ranks
        },
    }


def describe_increment(
    square: float | None, before: float | None, product: float
) -> dict[str, float | None]:
    """Return the fields of an increment from ‖D_t‖_F² and ‖D_{t−1}‖_F², None if not known, and
    ⟨D_t, D_{t−1}⟩.
    """
    length, earlier = (
        None if value is None else math.sqrt(max(0.0, value)) for value in (square, before)
    )
    cosine = (
        max(-1.0, min(1.0, _round(product / (length * earlier)))) if length and earlier else None
    )
    return {"increment": None if length is None else _round(length), "cosine": cosine}


def _round(value: float) -> float:
    """Return a value to 9 significant digits: sums of products differ in the last ones by the
    number of threads.
    """
    return float(f"{value:.9g}")


def _estimate_bytes(task: factors.LayerSeries, settings: factors.CheckpointsSettings) -> int:
    """Estimate the memory of measuring a layer in bytes."""
    if not all(map(is_thin, task.deltas)):
        from lora_diag.diagnostics.checkpoints.stored import (
            estimate_bytes,
        )  # deferred: imports torch

        return estimate_bytes(task, settings)
    ranks = sum(delta.rank for delta in task.deltas if is_thin(delta))
    return 24 * (ranks * sum(task.shape) + 8 * ranks**2)


@show_options
def checkpoints(
    run: Path | str | Sequence[Path | str], **options: Unpack[CheckpointsOptions]
) -> Results[CheckpointLayer]:
    r"""Measure how the updates of a training run evolve over its checkpoints, layer by layer.

    Args:
        run: The folder of a training run; or its checkpoints, in any order.
        base: Base checkpoint; None for adapters that do not need it.
        ranks: Ranks r of C(r).
        directions: k, the number of largest left singular vectors whose spaces are compared.
        **options: ``CheckpointsOptions``.

    Returns:
        One record per layer and checkpoint; in ``whole``, one per checkpoint and one of the run.

    Raises:
        UsageError: An option is invalid, the checkpoints are no adapters and there is no ``base``,
            or ``output`` may be neither replaced nor resumed.
        InputError: A checkpoint cannot be read or does not fit, its step is not known, or the
            results file cannot be written.
        NothingComparedError: The folder contains no checkpoint, or no weight is selected.
    """
    layers = LayerRun("checkpoints", options, CheckpointsOptions)
    options = layers.options
    series = find_series([run] if isinstance(run, str | Path) else run)
    base = None if options["base"] is None else open_base(locate(options["base"]))
    if base is None:
        _require_adapters(series.steps)
    if len(series.steps) < 2 and series.final is None:
        raise InputError(
            f"{series.steps[0].path}: is the only checkpoint; give a run of several, or use "
            "spectrum"
        )
    steps, compared = _compare_steps(layers, base, series)
    tasks, missing = _align_layers(steps, compared)
    judged = None
    if options["eval"]:
        if options["base"] is None:
            raise UsageError(
                Given("eval"), "needs the model", "give BASE before the run, or with $base"
            )
        # Deferred: imports torch.
        from lora_diag.diagnostics.checkpoints.judge import CheckpointJudge

        judged = CheckpointJudge(options, options["base"], steps)
    else:
        _refuse_without_losses(options)
    if all(is_thin(delta) and delta.base is None for task in tasks for delta in task.deltas):
        layers.use_numpy(workers=1)  # products of all checkpoints' factors use all cores
    ranks, k = check_ranks(options["ranks"]), options["directions"]
    numbers = tuple(step.step for step in steps)
    settings = layers.settings(
        factors.CheckpointsSettings, ranks=ranks, directions=k, steps=numbers
    )
    own = {"ranks": list(ranks), "directions": k, "steps": list(numbers)}
    if judged is not None:
        own |= judged.settings
        # Whether an adapter can hold a combination.
        own["factored"] = all(
            isinstance(delta, FactoredDelta) for each in compared for delta in each.pairing.deltas
        )
    last = compared[-1].pairing
    return layers.over(
        tasks,
        measure_layer,
        _estimate_bytes,
        settings,
        Pairing(
            tuple(delta for delta in last.deltas if not delta.is_matrix), (*last.unpaired, *missing)
        ),
        (
            *compared[0].inputs[:-1],
            *(each.inputs[-1] for each in compared),
            *(judged.inputs if judged else ()),
        ),
        own,
        recorded=("layers", "exclude", "device"),
        conclude=partial(_conclude, steps, series, judged),
    )


def _refuse_without_losses(options: CheckpointsOptions) -> None:
    """Refuse the options that need an evaluation set.

    Raises:
        UsageError: One is given.
    """
    for option, value in (
        ("average", options["average"]),
        ("extrapolate", options["extrapolate"]),
        ("shifted", options["shifted"]),
    ):
        if value:
            raise UsageError(Given(option), "needs held-out losses", "give $eval FILE")


def _require_adapters(steps: Sequence[Step]) -> None:
    """Require that all checkpoints are adapters, which need no BASE.

    Raises:
        InputError: One has no weights, as while a trainer writes it.
        UsageError: One has weights of a model.
    """
    for step in steps:
        if locate(step.path).is_adapter:
            continue
        if step.path.is_dir() and not holds_weights(step.path):
            raise InputError(
                f"{step.path}: has no weights; remove it, or wait if a trainer is writing it"
            )
        raise UsageError(
            f"{step.path}: is not an adapter; give BASE before the run, to compare its "
            "checkpoints with"
        )


def _compare_steps(
    layers: LayerRun[CheckpointsOptions], base: Checkpoint | None, series: CheckpointSeries
) -> tuple[list[Step], list[Comparison]]:
    """Compare BASE with every checkpoint, and with the final model unless a checkpoint has its
    bytes.

    Raises:
        InputError: A checkpoint cannot be read or does not fit, or the step of the final model is
            not known.
    """
    steps = list(series.steps)
    if series.final is not None:
        steps.append(series.final)
    compared = [
        layers.compare(step.path, None) if base is None else layers.compare(base, step.path)
        for step in steps
    ]
    *prints, final_print = (each.inputs[-1].fingerprint for each in compared)
    if series.final is not None and final_print in prints:
        del steps[-1], compared[-1]
    elif series.final is not None and series.final.step <= series.steps[-1].step:
        problem = "holds a model unlike all checkpoints, and its step is not known"
        raise InputError(f"{series.final.path}: {problem}; give the checkpoints one by one")
    return steps, compared


def _conclude(
    steps: Sequence[Step],
    series: CheckpointSeries,
    judged: CheckpointJudge | None,
    records: RunRecords[CheckpointLayer],
) -> None:
    """Write the records of the checkpoints, and that of the run."""
    if judged is not None:
        judged.judge(records)
    probes = [record for record in records.records if isinstance(record, Probe)]
    pooled = pool_checkpoints(steps, series, records.layers, probes)
    records.put(*pooled, judge_trajectory(records.layers, pooled))


def measure_run(
    inputs: Sequence[Path | str],
    follow: bool = False,
    on_view: Callable[..., None] | None = None,
    **options: Unpack[CheckpointsOptions],
) -> Results[CheckpointLayer]:
    """Measure a run given as perhaps BASE and its folder, or as checkpoints, of which BASE is an
    option.
    """
    paths = [Path(path) for path in inputs]
    if len(paths) == 2 and options.get("base") is None:
        base, run = paths
        if list_checkpoints(base):
            raise UsageError(
                f"{base}: is a run, not BASE; the order is: loradiag checkpoints [BASE] RUN_DIR"
            )
        if list_checkpoints(run):
            options["base"], paths = base, [run]
    if not follow:
        return checkpoints(paths, **options)
    if len(paths) > 1 or any(options.get(name) for name in ("output", "on_record", "eval")):
        raise UsageError(
            Given("follow"),
            "shows one run, or a monitor's results file",
            "give its path, without $output, $json and $eval",
        )
    from lora_diag.diagnostics.checkpoints.show import follow_run  # deferred: imports rich

    return follow_run(
        paths[0], partial(checkpoints, paths, **options), on_view or (lambda draw, lines: None)
    )


def _align_layers(
    steps: Sequence[Step], compared: Sequence[Comparison]
) -> tuple[list[factors.LayerSeries], tuple[Unpaired, ...]]:
    """Return the matrices that all checkpoints have, in natural order, and those that some lack.

    Raises:
        InputError: Two checkpoints have different shapes for one name, or no weight is in all.
    """
    by_layer: dict[str, dict[Step, Delta]] = {}
    for step, comparison in zip(steps, compared, strict=True):
        for delta in comparison.matrices:
            by_layer.setdefault(delta.layer, {})[step] = delta
    tasks: list[factors.LayerSeries] = []
    missing: list[Unpaired] = []
    for layer in sorted(by_layer, key=natural_order):
        deltas = by_layer[layer]
        shape = next(iter(deltas.values())).shape
        if other := next((step for step, delta in deltas.items() if delta.shape != shape), None):
            problem = (
                f"{layer} is {list(deltas[other].shape)}, but {list(shape)} in other checkpoints"
            )
            raise InputError(f"{other.path}: {problem}; give the checkpoints of one run")
        if lacking := [step for step in steps if step not in deltas]:
            detail = legible(
                f"not in {len(lacking)} of {len(steps)} checkpoints, such as {lacking[0].path}"
            )
            missing.append(Unpaired(layer, shape, "only_in_adapter", detail))
        else:
            tasks.append(factors.LayerSeries(layer, shape, tuple(deltas[step] for step in steps)))
    if not tasks:
        raise InputError(
            f"{steps[0].path}: no matrix is in all checkpoints; give the checkpoints of one run"
        )
    return tasks, tuple(missing)
