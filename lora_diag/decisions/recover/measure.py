"""``recover``: estimate the update that 16-bit storage rounded away, and write an adapter or a
checkpoint from it.

Of each layer: its update in the files, the estimate of the update before rounding, and the
requested output. A budget of parameters is allocated by the estimated singular values of all
layers, as in ``allocate``.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_diag.adapters import Adapter
from lora_diag.adapters.source import CONFIG
from lora_diag.adapters.writing import WEIGHTS
from lora_diag.decisions.allocate.measure import Budget, allocate
from lora_diag.decisions.extract.measure import NUMERICALLY_ZERO, split_factors
from lora_diag.decisions.extract.tensor_plan import TensorPlan, plan_tensors
from lora_diag.decisions.recover import RecoverOptions
from lora_diag.decisions.recover.record import Recovery
from lora_diag.decisions.recover.show import recovery_card
from lora_diag.deltas import Pairing, StoredDelta, row_blocks
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import Given, InconclusiveError, InputError, LoradiagError, UsageError
from lora_diag.layers.change import Change, bytes_of, load_change, measure_on_device
from lora_diag.layers.lineage import make_unrelated_error
from lora_diag.layers.recovery import (
    DEFAULT_RANKS,
    RecoveryEstimate,
    check_cell_memory,
    estimate_hidden_energy,
    recover_layer,
    recovery_bytes,
)
from lora_diag.layers.resolution import make_resolution
from lora_diag.layers.task import LayerSettings, LayerTask, leave_out, not_finite
from lora_diag.linalg.methods import Allowance, check_request, require_memory
from lora_diag.metrics.energy import THRESHOLDS, energy_curve, rank_at
from lora_diag.records import LeftOut, Results
from lora_diag.records.file import check_results_file
from lora_diag.rendering.statements import is_unrelated
from lora_diag.running.amounts import read_count, read_share, read_time
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import Comparison
from lora_diag.running.layers import RECORDED, LayerRun
from lora_diag.running.options import (
    FolderOptions,
    LayerOptions,
    fill_options,
    select_options,
    show_options,
)
from lora_diag.running.output_folder import CARD, OutputFolder, list_words
from lora_diag.storage import Checkpoint, as_path, open_checkpoint
from lora_diag.storage.hub import loadable
from lora_diag.storage.rewriting import (
    MODEL,
    MODEL_CONFIG,
    Replacement,
    write_changed,
    write_tensors,
)

# Source of what is written for a layer.
Written = Literal["posterior", "file", "nothing"]


def allocate_ranks(records: Iterable[Recovery], params: int) -> dict[str, int]:
    """Return the rank that a budget gives to each usual target with ``values_estimate``; no other
    layer.

    Args:
        records: Records of layers.
        params: Budget: parameters of all factors, r·(out + in).
    """
    spectra = [make_spectrum(record) for record in records if record.values_estimate]
    allocation = allocate(
        spectra, Budget("params", params, Given("params", params)), save_heads=False
    )
    return {record.layer: record.rank for record in allocation.layers}


def make_spectrum(record: Recovery) -> Spectrum:
    """Return ``values_estimate`` of a layer as a spectrum for ``allocate``; those of D where
    nothing was estimated.
    """
    values, fro = record.values_estimate or (), record.fro_estimate or record.fro
    return Spectrum(
        layer=record.layer,
        shape=record.shape,
        dtypes=record.dtypes,
        fro=fro,
        base_fro=record.base_fro,
        s=values,
        complete=False,
        method=record.method,
        energy_error=0.0,
        energy={},
        rank_at={},
        tail={},
        stable_rank=None,
        effective_rank=None,
        resolution=make_resolution(np.array(values), fro, complete=False),
    )


RECORDS = "recovery.jsonl"


class AdapterFolder(OutputFolder):
    """The folder of an adapter made by ``recover``."""

    records_name: ClassVar[str] = RECORDS
    own_files: ClassVar[frozenset[str]] = frozenset({WEIGHTS, CONFIG, CARD, RECORDS})
    description: ClassVar[str] = "an adapter written by recover"


class CheckpointFolder(OutputFolder):
    """The folder of a checkpoint made by ``recover``."""

    records_name: ClassVar[str] = RECORDS
    own_files: ClassVar[frozenset[str]] = frozenset({MODEL, MODEL_CONFIG, CARD, RECORDS})
    description: ClassVar[str] = "a checkpoint written by recover"


@dataclass(frozen=True, slots=True)
class OutputRequest:
    """The output for a layer; none if ``rank``, ``energy``, ``full`` and ``all_directions`` are
    unset.

    Args:
        rank: Rank of the factors.
        energy: Fraction of the estimated energy: factors of the smallest rank that carries it, or
            of all directions that were found if they carry less.
        full: Whether to write the weight itself, W_base + E[X | cells], in float32.
        all_directions: Whether to write factors of all directions that were found, of which
            ``truncate_stored`` keeps some.
        leave_out_refused: Whether a refused layer has no factors; else it gets the truncated SVD of
            D.
        transposed: Whether PEFT's B·A is the update's transpose.
        keep_length: Whether E[X | cells] is scaled to the estimated ‖X‖_F.
    """

    rank: int | None = None
    energy: float | None = None
    full: bool = False
    all_directions: bool = False
    leave_out_refused: bool = False
    transposed: bool = False
    keep_length: bool = False

    @property
    def factors(self) -> bool:
        """Whether factors are written."""
        return self.rank is not None or self.energy is not None or self.all_directions


@dataclass(frozen=True, slots=True)
class RecoveryTask(LayerTask):
    """One layer, and the output to write for it.

    Args:
        delta: Its ΔW, from two stored sides.
        request: The requested output.
        earlier: An earlier estimate, with the factors of all directions in its file, of which those
            of ``request.rank`` are to be kept; None to estimate.
    """

    delta: StoredDelta
    request: OutputRequest
    earlier: Recovery | None = None


def estimate_bytes(layer: RecoveryTask, settings: LayerSettings) -> int:
    """Estimate the memory of a layer in bytes: D with its decomposition, then the cells."""
    return bytes_of(layer.delta, None) + recovery_bytes(layer.shape)


def truncate_stored(earlier: Recovery, request: OutputRequest, file: Path) -> Recovery:
    """Keep the first ``request.rank`` directions of the factors in a file; a repetition changes
    nothing.

    Returns:
        The earlier record with the new rank.
    """
    assert request.rank is not None
    rank = min(request.rank, earlier.rank)
    written: Written = earlier.written if rank else "nothing"
    if 0 < rank < earlier.rank:
        stored = open_checkpoint(file)
        b, a = (stored.read(name).view(stored[name].shape) for name in "BA")
        write_tensors(file, {"B": b[:, :rank].contiguous(), "A": a[:rank].contiguous()})
    return earlier.model_copy(
        update={"rank": rank, "params": rank * sum(earlier.shape), "written": written}
    )


def measure(layer: RecoveryTask, settings: LayerSettings, file: Path) -> Recovery | LeftOut:
    """Measure one layer and write the requested output.

    Args:
        layer: The layer.
        settings: Settings of the measurement.
        file: The file for ``B`` and ``A``, or for ``W``.

    Returns:
        The record; for entries that are not finite, that of the left-out layer.
    """
    if layer.earlier is not None:
        return truncate_stored(layer.earlier, layer.request, file)
    if settings.memory is not None:
        check_cell_memory(layer.shape, settings.memory)
        if layer.request.full:
            needed, fix = 4 * math.prod(layer.shape), "write an adapter with $rank"
            require_memory(needed, settings.memory, layer.shape, "its float32 weight takes", fix)
    return measure_on_device(partial(_measure, layer, settings, file), settings.device)


def _measure(
    layer: RecoveryTask, settings: LayerSettings, file: Path, device: torch.device
) -> Recovery | LeftOut:
    delta, request = layer.delta, layer.request
    fits = settings.memory is None or estimate_bytes(layer, settings) <= settings.memory
    limit = None if fits else settings.memory
    allowance = None if limit is None else Allowance(limit, settings.method)
    change = load_change(delta, device, allowance=allowance)
    if change.non_finite is not None:
        return not_finite(delta, change.non_finite)
    fro, base_fro = change.fro, change.base_fro
    assert fro is not None
    assert base_fro is not None
    if change.is_unrelated(layer.shape):
        return _refuse_unrelated(layer, fro, base_fro, change)
    factors = change.decompose(settings.method, seed=settings.seed, tol=settings.tol)
    curve = energy_curve(factors.s.numpy(), fro, factors.complete) if fro else np.zeros(0)
    if limit is not None:
        change = replace(change, matrix=None)  # read again if it is to be written
    estimate = recover_layer(delta, fro, DEFAULT_RANKS, settings.seed, device, limit)
    written, rank, values = _write(
        request, delta, change, estimate, curve, replace(settings, memory=limit), file
    )
    hidden = estimate.hidden.model_dump()
    if estimate.hidden.status == "not_hidden":
        values = factors.s
    if hidden["values_estimate"] is None and values is not None:
        hidden["values_estimate"] = tuple(float(f"{value:.9g}") for value in values.tolist())
    return Recovery(
        **hidden,
        cosine_to_base=change.cosine_to_base,
        layer=layer.layer,
        shape=layer.shape,
        dtypes=delta.dtypes,
        fro=fro,
        base_fro=base_fro,
        energy={
            str(r): float(curve[min(r, len(curve)) - 1]) if len(curve) else None
            for r in DEFAULT_RANKS
        },
        rank_at={
            str(threshold): rank_at(curve, threshold) if len(curve) else 0
            for threshold in THRESHOLDS
        },
        energy_error=factors.energy_error,
        method=factors.method,
        written=written,
        rank=rank,
        params=rank * sum(layer.shape),
    )


def _refuse_unrelated(layer: RecoveryTask, fro: float, base_fro: float, change: Change) -> Recovery:
    """Return the record of a weight of TUNED that does not descend from that of BASE."""
    return Recovery(
        status="refused",
        reason="TUNED is unrelated to BASE here, so that their difference is no update",
        unchanged=change.rounding.unchanged if change.rounding is not None else 0.0,
        cosine_to_base=change.cosine_to_base,
        layer=layer.layer,
        shape=layer.shape,
        dtypes=layer.delta.dtypes,
        fro=fro,
        base_fro=base_fro,
        energy=dict.fromkeys(map(str, DEFAULT_RANKS)),
        rank_at=dict.fromkeys(map(str, THRESHOLDS)),
        energy_error=0.0,
        method="none",
    )


def _write(
    request: OutputRequest,
    delta: StoredDelta,
    change: Change,
    estimate: RecoveryEstimate,
    curve: NDArray[np.float64],
    settings: LayerSettings,
    file: Path,
) -> tuple[Written, int, Tensor | None]:
    """Write the requested output.

    Returns:
        Its source, the rank of factors, and for a budget their singular values, else None. They are
            without the scaling
        to ‖X‖: their squares are the energies that the directions of E[X | cells] are expected to
            have in X.
    """
    is_estimated = estimate.cells is not None
    is_refused = estimate.hidden.status == "refused" and request.leave_out_refused
    if not request.full and (not request.factors or not change.fro or is_refused):
        return "nothing", 0, None
    factor = _compute_length_factor(estimate) if is_estimated and request.keep_length else 1.0
    if request.full:
        if not is_estimated:
            return "file", 0, None  # TUNED's own weights
        _write_weight(delta, estimate, factor, file)
        return "posterior", 0, None
    rank = min(request.rank or _choose_rank(request, delta.shape, estimate, curve), *delta.shape)
    if is_estimated:
        change = estimate.change(settings.memory, factor)
    elif settings.memory is not None:
        allowance = Allowance(settings.memory, settings.method, rank, vectors=True)
        change = load_change(delta, torch.device("cpu"), allowance=allowance)
    best = change.decompose(settings.method, rank, True, settings.tol, settings.seed)
    rank = int((best.s > NUMERICALLY_ZERO * best.s[:1]).sum())
    b, a = (part.float().cpu() for part in split_factors(best, rank, request.transposed, "both"))
    write_tensors(file, {"B": b.contiguous(), "A": a.contiguous()})
    values = best.s[:rank] / factor if request.all_directions else None
    return "posterior" if is_estimated else "file", rank, values


def _choose_rank(
    request: OutputRequest,
    shape: tuple[int, int],
    estimate: RecoveryEstimate,
    curve: NDArray[np.float64],
) -> int:
    """Return the smallest rank with the requested fraction of the energy; without one, the largest
    useful rank.

    It is the length of the curve if that does not reach the fraction. The curve is that of the
    estimate if directions were recovered, else ``curve`` of D.
    """
    if estimate.hidden.status == "recovered":
        curve = np.array(estimate.curve)
    if request.energy is None:
        return max(
            1, min(len(curve), math.prod(shape) // sum(shape))
        )  # beyond, factors are larger than the matrix
    return rank_at(curve, request.energy) or len(curve)


def _compute_length_factor(estimate: RecoveryEstimate) -> float:
    """Return ‖X‖_F as estimated over ‖E[X | cells]‖_F, at least 1."""
    length = math.hypot(
        *(float(torch.linalg.vector_norm(block, dtype=torch.float64)) for block in estimate.mean())
    )
    return max(1.0, (estimate.hidden.fro_estimate or 0.0) / length) if length else 1.0


def _write_weight(
    delta: StoredDelta, estimate: RecoveryEstimate, factor: float, file: Path
) -> None:
    """Write W_base + factor·E[X | cells] in float32."""
    weight, row = torch.empty(delta.shape), 0
    for part in row_blocks(delta.base, delta.shape):
        weight[row : row + len(part)] = part
        row += len(part)
    row = 0
    for block in estimate.mean():
        weight[row : row + len(block)] += factor * block.cpu()
        row += len(block)
    write_tensors(file, {"W": weight})


OUTPUT_OPTIONS = (
    "$rank R, $energy FRACTION or $params N for an adapter, $checkpoint for a checkpoint"
)


@show_options
def recover(
    base: Path | str,
    tuned: Path | str,
    output: Path | str | None = None,
    **options: Unpack[RecoverOptions],
) -> Results[Recovery]:
    r"""Estimate the update before rounding, X, from the cells that the stored weights lie in.

    For a fine-tune with float32 master weights whose checkpoint was stored in bfloat16, float16 or
    8 bits, TUNED = round(BASE + X). Where X is small most entries do not change, and D = TUNED −
    BASE looks full-rank. Each stored entry still bounds X from both sides; a low-rank model with
    optimal shrinkage is fitted to these bounds. The status of a layer states where the model does
    not fit, or hidden entries confirm no direction.

    Args:
        base: The checkpoint before.
        tuned: The checkpoint after; not an adapter, whose factors are the update.
        output: Without ``rank``, ``energy``, ``params`` and ``checkpoint``, of which at most one is
            given, the results file to write; None for none. Else the folder of the adapter or of
            the checkpoint; it is written as ``NAME.part`` and renamed when complete.
        rank: Write a PEFT adapter, the rank-r SVD of E[X | cells], of this rank in every layer.
        energy: Write an adapter with the smallest rank of each layer that has this fraction of its
            estimated energy.
        params: Write an adapter with at most this number of parameters, such as ``"10M"``,
            allocated as by ``allocate`` with the estimated singular values, or those of D where
            nothing was estimated.
        time: Time limit, such as ``"20min"``: layers are measured in the order of the hidden energy
            per entry that a sample of their rows suggests, and none is started after this time.
            With ``resume`` those that were not reached are measured, within a new limit or without.
        checkpoint: Write a checkpoint in float32, W_base + E[X | cells].
        leave_out_refused: Write no factors for refused layers; by default they get the truncated
            SVD of D.
        nearest: Write E[X | cells] itself, nearest to X and shorter than X. By default the estimate
            of each layer is scaled to its estimated norm, which has a larger distance to X and,
            where it was measured, the lower loss.
        base_name: The base model's name for config and model card; default ``base`` as given.
        overwrite: Replace the output of an earlier run.
        **options: ``RecoverOptions``.

    Returns:
        One record for each matrix, for an adapter each that PEFT can adapt; also in
            ``recovery.jsonl`` of the folder.

    Raises:
        UsageError: An option is invalid, ``base`` or ``tuned`` is an adapter, ``params`` is too
            small for any rank, or ``output`` is an input or exists and may not be replaced.
        InputError: An input cannot be read, no layer can be measured for an output, or it cannot be
            written.
        NothingComparedError: The sides have no weight in common, or none is selected.
        InconclusiveError: There is nothing to write.

    Example:
        >>> base, tuned = "sample_checkpoints/base", "sample_checkpoints/full_ft"
        >>> found = recover(base, tuned, layers=r"layers\.0\..*q_proj")
        >>> found[0].status
        'not_hidden'
    """
    options = fill_options(RecoverOptions, options)
    limit, full, nearest = options["time"], options["checkpoint"], options["nearest"]
    end = time.time() + (math.inf if limit is None else read_time(limit))
    params = None if options["params"] is None else read_count(str(options["params"]), "params")
    _check_options(options, output)
    request = _make_request(options)
    base, tuned = as_path(base), as_path(tuned)
    folder = _make_folder(base, tuned, output, options) if request.factors or full else None
    records_file = {"output": output, "overwrite": options["overwrite"]}
    if folder is not None:
        records_file = {"output": folder.records}
    elif output is not None:
        check_results_file(Path(output), options["resume"], options["overwrite"])
    common = select_options(FolderOptions, options)
    run = LayerRun("recover", {**common, **records_file}, LayerOptions)
    method, tol = options["svd"], options["tol"]
    check_request(method, None if method != "krylov" else 1, tol)
    refused = (Adapter, "is an adapter, whose factors are the update; nothing is rounded away")
    compared = run.compare(base, tuned, refuse=refused)
    planned = plan_tensors(compared, save=False) if request.factors else None
    tasks = [] if folder is not None and folder.whole else _make_tasks(compared, planned, request)
    files: dict[str, Path] = {}
    if folder is not None:
        files = {task.layer: folder.factors(index) for index, task in enumerate(tasks)}
        run.layout(tasks)  # refuses a memory limit before the folder is made
        folder.open()
    settings = LayerSettings(method, tol, options["seed"], run.where.tasks)
    deadline = None
    if limit is not None:
        energies = {task.layer: estimate_hidden_energy(task.delta) for task in tasks}
        tasks.sort(key=lambda task: energies[task.layer] / math.prod(task.shape), reverse=True)
        deadline = RecoverDeadline(end, limit, energies)
    if params is not None and tasks:
        assert folder is not None
        tasks = _spend_budget(tasks, params, folder, files, run, settings, compared)

    def finish(results: Results[Recovery]) -> None:
        assert folder is not None
        complete = not any(item.reason == "time" for item in results.left_out)
        _require_output(results, folder, base, tuned, options, complete)
        name = options["base_name"] or loadable(legible(base.parent if base.is_file() else base))
        if not folder.whole and planned is not None:
            planned.write(folder.work, results, results.left_out, files, name)
        elif not folder.whole:
            _write_checkpoint(results, compared, tasks, files, folder)
        words = ["loradiag", "recover", legible(base), legible(tuned)]
        words += [*list_words(RecoverOptions, results.run), "-o", legible(str(output))]
        folder.finish(recovery_card(results, name, shlex.join(words), not nearest), complete)

    return run.over(
        tasks,
        partial(_measure_layer, files=files, deadline=deadline),
        estimate_bytes,
        settings,
        compared.pairing if planned is None else planned.measure_left_out,
        compared.inputs,
        _make_settings(options, params),
        recorded=RECORDED,
        finish=finish if folder is not None else None,
    )


def _make_request(options: RecoverOptions) -> OutputRequest:
    return OutputRequest(
        options["rank"],
        options["energy"],
        options["checkpoint"],
        all_directions=options["params"] is not None,
        leave_out_refused=options["leave_out_refused"],
        keep_length=not options["nearest"],
    )


def _make_folder(
    base: Path, tuned: Path, output: Path | str | None, options: RecoverOptions
) -> OutputFolder:
    """Return the folder of the requested adapter or checkpoint."""
    assert output is not None
    folder_class = CheckpointFolder if options["checkpoint"] else AdapterFolder
    return folder_class(Path(output), (base, tuned), options["overwrite"], options["resume"])


def _make_settings(options: RecoverOptions, params: int | None) -> dict[str, Any]:
    """Return the requested output for the run record."""
    return {
        "rank": options["rank"],
        "energy": options["energy"],
        "params": params,
        "checkpoint": options["checkpoint"],
        "leave_out_refused": options["leave_out_refused"],
        "nearest": options["nearest"],
        "curve": list(DEFAULT_RANKS),
    }


def _require_output(
    results: Results[Recovery],
    folder: OutputFolder,
    base: Path,
    tuned: Path,
    options: RecoverOptions,
    complete: bool,
) -> None:
    """Require that a run has something to write; else its folder is discarded, unless its time
    ended and it can be continued.

    Raises:
        LoradiagError: It has nothing, or the checkpoints are unrelated.
    """
    if is_unrelated(results):
        folder.discard()
        raise make_unrelated_error(
            base, tuned, [item.layer for item in results if item.lineage == "unrelated"]
        )
    if options["checkpoint"]:
        has_output = any(record.written == "posterior" for record in results)
    else:
        has_output = any(record.written != "nothing" and record.rank for record in results)
    if not has_output:
        if complete:
            folder.discard()
        raise _make_nothing_to_write_error(tuned, results, options["leave_out_refused"])


def _write_checkpoint(
    results: Results[Recovery],
    compared: Comparison,
    tasks: Sequence[RecoveryTask],
    files: Mapping[str, Path],
    folder: OutputFolder,
) -> None:
    """Write TUNED in float32, with the weights that were estimated."""
    stored = compared.update
    assert isinstance(stored, Checkpoint)
    estimated = {record.layer for record in results if record.written == "posterior"}
    replaced = []
    for task in tasks:
        if task.layer in estimated:
            side = task.delta.tuned
            replaced.append(Replacement(side.name, side.offset, task.shape, files[task.layer]))
    write_changed(folder.work, stored, replaced, "float32")


def _spend_budget(
    tasks: Sequence[RecoveryTask],
    params: int,
    folder: OutputFolder,
    files: Mapping[str, Path],
    run: LayerRun[LayerOptions],
    settings: LayerSettings,
    compared: Comparison,
) -> list[RecoveryTask]:
    """Estimate every layer, write the factors of all its directions, and allocate a budget to them.

    Returns:
        The tasks, each with its rank and, if it could be measured, its estimate.

    Raises:
        UsageError: The budget is too small for any rank, or no layer can get one.
    """
    options = {
        **run.options,
        "output": folder.spectra,
        "resume": folder.spectra.exists(),
        "overwrite": False,
    }
    records = LayerRun("recover", options, LayerOptions).over(
        tasks,
        partial(_measure_layer, files=files),
        estimate_bytes,
        settings,
        Pairing((), ()),
        compared.inputs,
        {"curve": list(DEFAULT_RANKS)},
    )
    earlier = {record.layer: record for record in records}
    try:
        ranks = (
            allocate_ranks(records, params)
            if any(record.values_estimate for record in records)
            else {}
        )
    except UsageError as error:
        kept = f"estimates are kept in {folder.work}: $resume with another budget"
        raise UsageError(*error.args, kept) from error
    requests = {task.layer: replace(task.request, rank=ranks.get(task.layer, 0)) for task in tasks}
    return [
        replace(task, request=requests[task.layer], earlier=earlier.get(task.layer))
        for task in tasks
    ]


def _check_options(options: RecoverOptions, output: object) -> None:
    """Refuse invalid options.

    Raises:
        UsageError: Several outputs are requested, a number is out of range, there is no path to
            write to, or an option is given without the output that it applies to.
    """
    rank, energy, params = options["rank"], options["energy"], options["params"]
    if options["time"] is not None and params is not None:
        raise UsageError(
            Given("time"),
            "a budget of $params needs the estimates of all layers",
            "give $rank or $energy",
        )
    count = sum(value is not None for value in (rank, energy, params)) + options["checkpoint"]
    if count > 1:
        raise UsageError("recover", f"give one of {OUTPUT_OPTIONS}")
    if count and output is None:
        raise UsageError("recover", "no output folder", "give it with $output")
    if rank is not None and rank < 1:
        raise UsageError(Given("rank", rank), "must be a positive integer")
    if energy is not None:
        read_share(energy, "energy")
    if options["leave_out_refused"] and (options["checkpoint"] or not count):
        raise UsageError(
            Given("leave_out_refused"),
            "applies to adapters",
            "give $rank, $energy or $params with it",
        )
    if options["resume"] and output is None:
        raise UsageError(Given("resume"), "give the output of the interrupted run with $output")
    if options["nearest"] and not count:
        raise UsageError(
            Given("nearest"), "applies to written estimates", f"give one of {OUTPUT_OPTIONS}"
        )


def _make_tasks(
    compared: Comparison, planned: TensorPlan | None, request: OutputRequest
) -> list[RecoveryTask]:
    """Return the tasks of all matrices; with a plan, of those that PEFT can adapt."""
    deltas = [
        delta
        for delta in compared.pairing.deltas
        if isinstance(delta, StoredDelta) and delta.is_matrix
    ]
    if planned is None:
        return [RecoveryTask(delta, request) for delta in deltas]
    targets = [
        (delta, planned.targets[delta.layer]) for delta in deltas if delta.layer in planned.targets
    ]
    return [
        RecoveryTask(delta, replace(request, transposed=target.transposed))
        for delta, target in targets
    ]


@dataclass(frozen=True, slots=True)
class RecoverDeadline:
    """The time limit of a run.

    Args:
        end: Time of the last start in seconds since the epoch, which all machines of a cluster
            share.
        limit_text: The limit as the user gave it.
        energy_by_layer: Hidden energy of every layer, estimated from a sample.
    """

    end: float
    limit_text: str
    energy_by_layer: Mapping[str, float]

    def make_left_out(self, task: RecoveryTask) -> LeftOut:
        """Return the record of a layer that was not reached."""
        share = self.energy_by_layer[task.layer] / (sum(self.energy_by_layer.values()) or 1.0)
        detail = (
            f"not started within --time {self.limit_text}; by a sample {share:.1%} of all "
            "layers' hidden energy"
        )
        return leave_out(task.delta, "time", detail)


def _measure_layer(
    task: RecoveryTask,
    files: Mapping[str, Path],
    settings: LayerSettings,
    deadline: RecoverDeadline | None = None,
) -> tuple[Recovery | LeftOut]:
    if deadline is not None and time.time() > deadline.end:
        return (deadline.make_left_out(task),)
    return (measure(task, settings, files.get(task.layer, Path())),)


def _make_nothing_to_write_error(
    tuned: Path | str, results: Results[Recovery], leave_out_refused: bool
) -> LoradiagError:
    """Return the error of a run that has nothing to write."""
    if results.unmeasured and not results.layers:
        bad = results.unmeasured[0]
        return InputError(
            f"{tuned}: {bad.layer}: {bad.detail}; nothing else is left, so nothing was written"
        )
    if late := sum(item.reason == "time" for item in results.left_out):
        return InconclusiveError(
            tuned,
            f"$time ended before {late} of {late + len(results.layers)} layers, and no "
            "other has an update that can be recovered; nothing was written",
            "continue with $resume",
        )
    reasons = sorted({record.reason for record in results})
    why = f": {reasons[0]}" if len(reasons) == 1 else f": such as {reasons[0]}" if reasons else ""
    hint = (
        "; without $leave_out_refused the SVD of the files' difference is written"
        if leave_out_refused
        else ""
    )
    return InconclusiveError(
        tuned, f"no layer has an update that can be recovered{why}{hint}", "nothing was written"
    )
