"""``recover``: the update that 16-bit storage rounded away."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from lora_diag.adapters import is_adapter
from lora_diag.checkpoints import as_path, check_exists, locate, open_checkpoint
from lora_diag.checkpoints.hub import loadable
from lora_diag.decisions.extract.folder import OutputFolder
from lora_diag.decisions.extract.layout import Plan, plan
from lora_diag.decisions.recover.folder import AdapterFolder, CheckpointFolder, load, store, write_checkpoint
from lora_diag.decisions.recover.measure import OutputRequest, RecoveryTask, estimate_bytes, measure
from lora_diag.decisions.recover.options import RecoverOptions
from lora_diag.decisions.recover.ranks import ranks_within
from lora_diag.decisions.recover.record import Recovery
from lora_diag.decisions.recover.summary import model_card
from lora_diag.deltas import StoredDelta
from lora_diag.errors import InconclusiveError, InputError, LoradiagError, UsageError
from lora_diag.layers.recovery import DEFAULT_RANKS, hidden_energy
from lora_diag.layers.task import LayerSettings
from lora_diag.linalg import check_request
from lora_diag.records import LeftOut, Results
from lora_diag.running.amounts import read_count, read_time
from lora_diag.running.engines import Layout
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import Comparison
from lora_diag.running.layers import RECORDED, LayerRun
from lora_diag.running.measuring import without_rank
from lora_diag.running.options import FolderOptions, fill_options, list_options, show_options

OUTPUT_OPTIONS = "--rank R, --energy FRACTION or --params N for an adapter, --checkpoint for a checkpoint"


@show_options
def recover(
    base: Path | str,
    tuned: Path | str,
    output: Path | str | None = None,
    **options: Unpack[RecoverOptions],
) -> Results[Recovery]:
    r"""Estimate the update before rounding, X, from the cells that the stored weights lie in.

    For a fine-tune with float32 master weights whose checkpoint was stored in bfloat16, float16 or 8 bits, TUNED =
    round(BASE + X). Where X is small most entries do not change, and D = TUNED − BASE looks full-rank. Each stored
    entry still bounds X from both sides; a low-rank model with optimal shrinkage is fitted to these bounds. The
    status of a layer states where the model does not fit, or hidden entries confirm no direction.

    Args:
        base: The checkpoint before.
        tuned: The checkpoint after; not an adapter, whose factors are the update.
        output: Without ``rank``, ``energy`` and ``full`` the results file to write. Else the folder of the adapter or
            of the checkpoint; it grows as ``NAME.part`` and takes its place when it is whole.
        rank: Write a PEFT adapter, the rank-r SVD of E[X | cells], of this rank in every layer.
        energy: Write an adapter with the smallest rank of each layer that has this fraction of its estimated energy.
        params: Write an adapter with at most this number of parameters, such as ``"10M"``, allocated as by ``allocate``
            with the estimated singular values.
        time: Time limit, such as ``"20min"``: layers are measured in the order of the hidden energy per entry that a
            sample of their rows suggests, and none is started after this time. With ``resume`` those that were not
            reached are measured, within a new limit or without.
        full: Write a checkpoint in float32, W_base + E[X | cells].
        leave_out_refused: Write no factors for refused layers; by default they get the truncated SVD of D.
        nearest: Write E[X | cells] itself, nearest to X and shorter than X. By default the estimate of each layer is
            scaled to its estimated norm, which has a larger distance to X and, where it was measured, the lower loss.
        base_name: The base model's name for config and model card; by default ``base`` as it was given.
        overwrite: Replace the output of an earlier run.
        **options: ``RecoverOptions``.

    Returns:
        One record for each matrix; also in ``recovery.jsonl`` of the folder.

    Raises:
        UsageError: An option is invalid, or ``output`` holds something that would be lost.
        InputError: An input cannot be read, or the output cannot be written.
        NothingComparedError: The sides have no weight in common.
        InconclusiveError: There is nothing to write.

    Example:
        >>> base, tuned = "sample_checkpoints/base", "sample_checkpoints/full_ft"
        >>> found = recover(base, tuned, layers=r"layers\.0\..*q_proj")
        >>> found[0].status
        'not_hidden'
    """
    resolved = fill_options(RecoverOptions, options)
    begun = time.time()
    rank, energy, full = (resolved[name] for name in ("rank", "energy", "full"))
    limit = None if resolved["time"] is None else read_time(resolved["time"])
    if limit is not None and resolved["params"] is not None:
        raise UsageError("--time: a budget of --params needs the estimates of all layers; give --rank or --energy")
    params = None if resolved["params"] is None else read_count(str(resolved["params"]), "--params")
    leave_out_refused, base_name = resolved["leave_out_refused"], resolved["base_name"]
    nearest, overwrite = resolved["nearest"], resolved["overwrite"]
    _check_options(rank, energy, params, full, leave_out_refused, output)
    base, tuned = as_path(base), as_path(tuned)
    check_exists(base)
    if is_adapter(locate(tuned)):
        raise UsageError(f"{tuned}: is an adapter, whose factors are the update; nothing is rounded away")
    factors = rank is not None or energy is not None or params is not None
    writes = factors or full
    if nearest and not writes:
        raise UsageError(f"--nearest: applies to written estimates; give one of {OUTPUT_OPTIONS}")
    folder: OutputFolder | None = None
    if writes:
        assert output is not None
        kind = CheckpointFolder if full else AdapterFolder
        folder = kind(Path(output), (base, tuned), overwrite, resolved["resume"])
    destination: dict[str, Any] = {"output": output, "overwrite": overwrite}
    if folder is not None:
        destination = {"output": folder.records}
    common = {name: resolved[name] for name in list_options(FolderOptions)}
    run = LayerRun("recover", {**common, **destination})
    method, tol, seed = (run.options[name] for name in ("method", "tol", "seed"))
    check_request(method, None if method != "krylov" else 1, tol)
    compared = run.compare(base, tuned)
    planned = plan(open_checkpoint(base), tuned, compared.pairing, save=False) if factors else None
    tasks = [
        RecoveryTask(
            delta,
            OutputRequest(
                rank, energy, full, params is not None, leave_out_refused, _is_transposed(delta, planned), not nearest
            ),
        )
        for delta in compared.pairing.deltas
        if isinstance(delta, StoredDelta)
        and delta.is_matrix
        and (planned is None or delta.layer in planned.targets)
        and not (folder is not None and folder.whole)
    ]
    files: dict[str, Path] = {}
    if folder is not None:
        files = {task.layer: folder.factors(index) for index, task in enumerate(tasks)}
        run.layout(tasks)  # refuses a memory limit before the folder is made
        folder.open()
    settings = LayerSettings(method, tol, seed, run.where.tasks)
    deadline = None
    if limit is not None:
        energies = {task.layer: hidden_energy(task.delta) for task in tasks}
        tasks.sort(key=lambda task: energies[task.layer] / math.prod(task.shape), reverse=True)
        deadline = Deadline(begun + limit, resolved["time"], energies)
    if params is not None and tasks:
        assert folder is not None
        tasks = _spend_budget(tasks, params, folder, files, run, settings, compared)

    def left_out_of(layout: Layout, _: Results[Recovery], __: LayerSettings) -> Iterable[LeftOut]:
        if planned is not None:
            return planned.left_out(layout, run.where.here)
        return without_rank(compared.pairing, layout, run.where.here)

    def finish(results: Results[Recovery]) -> None:
        assert folder is not None
        out_of_time = any(item.reason == "time" for item in results.left_out)
        if not any(record.written != "nothing" and (full or record.rank) for record in results) or (
            full and not any(record.written == "posterior" for record in results)
        ):
            if not out_of_time:
                folder.discard()
            raise _make_nothing_to_write_error(tuned, results, leave_out_refused)
        name = base_name or loadable(legible(base.parent if base.is_file() else base))
        if not folder.whole and planned is not None:
            planned.write(folder.work, results, files, name)
        elif not folder.whole:
            replaced = {record.layer for record in results if record.written == "posterior"}
            write_checkpoint(
                folder.work, open_checkpoint(tuned), [task.delta for task in tasks if task.layer in replaced], files
            )
        size_options = {"--rank": rank, "--energy": energy, "--params": params}
        flags = ["--checkpoint"] if full else []
        flags += [str(part) for pair in size_options.items() if pair[1] is not None for part in pair]
        flags += ["--leave-out-refused"] if leave_out_refused else []
        flags += ["--nearest"] if nearest else []
        command = ["loradiag", "recover", *map(legible, (str(base), str(tuned))), *flags, "-o", legible(str(output))]
        folder.finish(model_card(results, name, shlex.join(command), not nearest), complete=not out_of_time)

    requested = {
        "rank": rank,
        "energy": energy,
        "params": params,
        "full": full,
        "leave_out_refused": leave_out_refused,
        "nearest": nearest,
        "curve": list(DEFAULT_RANKS),
    }
    return run.over(
        tasks,
        partial(_measure_layer, files=files, deadline=deadline),
        estimate_bytes,
        settings,
        left_out_of,
        compared.inputs,
        requested,
        recorded=RECORDED,
        finish=finish if folder is not None else None,
    )


def _spend_budget(
    tasks: Sequence[RecoveryTask],
    params: int,
    folder: OutputFolder,
    files: Mapping[str, Path],
    run: LayerRun,
    settings: LayerSettings,
    compared: Comparison,
) -> list[RecoveryTask]:
    """Estimate every layer, store the factors of all its directions, and allocate a budget to them.

    Raises:
        UsageError: The budget is too small for rank 1.
    """
    options = {**run.options, "output": folder.spectra, "resume": folder.spectra.exists(), "overwrite": False}
    records = LayerRun("recover", options).over(
        tasks,
        partial(_measure_layer, files=files),
        estimate_bytes,
        settings,
        lambda *_: (),
        compared.inputs,
        {"curve": list(DEFAULT_RANKS)},
    )
    known = {record.layer: record for record in records}
    try:
        ranks = ranks_within(records, params) if any(record.values_estimate for record in records) else {}
    except UsageError as error:
        raise UsageError(f"{error}; estimates are kept in {folder.work}: --resume with another budget") from error
    return [
        replace(task, request=replace(task.request, rank=ranks.get(task.layer, 0)), known=known.get(task.layer))
        for task in tasks
    ]


def _check_options(
    rank: int | None, energy: float | None, params: int | None, full: bool, leave_out_refused: bool, output: object
) -> None:
    """Refuse invalid options.

    Raises:
        UsageError: Several ways to write are given, a number is out of range, or there is nowhere to write to.
    """
    count = sum(value is not None for value in (rank, energy, params)) + full
    if count > 1:
        raise UsageError(f"recover: give one of {OUTPUT_OPTIONS}")
    if count and output is None:
        raise UsageError("recover: no output folder; give it with -o")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank}: must be a positive integer")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy {energy}: must be a fraction above 0 and up to 1")
    if leave_out_refused and (full or not count):
        raise UsageError("--leave-out-refused: applies to adapters; give --rank, --energy or --params with it")


def _is_transposed(delta: StoredDelta, planned: Plan | None) -> bool:
    """Return whether PEFT's B·A is the transpose of the update."""
    target = planned.targets.get(delta.layer) if planned is not None else None
    return target is not None and target.transposed


@dataclass(frozen=True, slots=True)
class Deadline:
    """The time limit of a run.

    Args:
        end: Seconds since the epoch, which all machines of a cluster share.
        words: As the user gave the limit.
        energies: Hidden energy of every layer, estimated from a sample.
    """

    end: float
    words: str
    energies: Mapping[str, float]

    def left_out(self, task: RecoveryTask) -> LeftOut:
        """Return the record of a layer that was not reached."""
        share = self.energies[task.layer] / (sum(self.energies.values()) or 1.0)
        detail = f"not started within --time {self.words}; by a sample {share:.1%} of the hidden energy of all layers"
        return LeftOut(layer=task.layer, shape=task.shape, reason="time", detail=detail)


def _measure_layer(
    task: RecoveryTask, files: Mapping[str, Path], settings: LayerSettings, deadline: Deadline | None = None
) -> tuple[Recovery | LeftOut]:
    if deadline is not None and time.time() > deadline.end:
        return (deadline.left_out(task),)
    file = files.get(task.layer, Path())
    return (measure(task, settings, partial(store, file), partial(load, file)),)


def _make_nothing_to_write_error(
    tuned: Path | str, results: Results[Recovery], leave_out_refused: bool
) -> LoradiagError:
    """Return the error of a run that has nothing to write."""
    if results.unmeasured and not results.layers:
        bad = results.unmeasured[0]
        return InputError(f"{tuned}: {bad.layer}: {bad.detail}; nothing else is left, so nothing was written")
    late = sum(item.reason == "time" for item in results.left_out)
    if late:
        return InconclusiveError(
            f"{tuned}: --time ended before {late} of {late + len(results.layers)} layers, and no other has an update "
            "that can be recovered; nothing was written; continue with --resume"
        )
    reasons = sorted({record.reason for record in results})
    why = f": {reasons[0]}" if len(reasons) == 1 else f": such as {reasons[0]}" if reasons else ""
    hint = "; without --leave-out-refused the SVD of the files' difference is written" if leave_out_refused else ""
    return InconclusiveError(f"{tuned}: no layer has an update that can be recovered{why}{hint}; nothing was written")
