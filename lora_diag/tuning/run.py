"""``tune``: from a base model, data and a budget to an adapter configuration."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from lora_diag.catalog import read_results
from lora_diag.checkpoints import open_checkpoint
from lora_diag.errors import UsageError
from lora_diag.files import check_folder_of, write_whole
from lora_diag.models.opening import keep_open
from lora_diag.models.training import RECIPE, Lora
from lora_diag.records import LeftOut, Results, Run
from lora_diag.records.results import to_line
from lora_diag.records.run import AnyRecord
from lora_diag.running.amounts import read_time
from lora_diag.running.fingerprint import legible
from lora_diag.running.options import show_options
from lora_diag.running.probing import check_files
from lora_diag.running.progress import RunRecords
from lora_diag.running.training_runs import TrainRun
from lora_diag.tuning import TuneOptions
from lora_diag.tuning.outputs import write_report
from lora_diag.tuning.planning import Target, extend_plan, plan_of, target_of
from lora_diag.tuning.record import TunePlan, TuneTrial
from lora_diag.tuning.search import Tuner

RECORDS = "tune.jsonl"
FILES = (
    RECORDS,
    *("sweep.jsonl", "rates.jsonl", "pilot.jsonl", "spectrum.jsonl", "weights.json"),
    *("adapter_config.json", "gate.toml", "report.html", "commands.sh"),
    *("config.axolotl.yaml", "config.llamafactory.yaml", "config.trl.py"),
)


@show_options
def tune(base: Path | str, output: Path | str, **options: Unpack[TuneOptions]) -> Results[Any]:
    r"""Choose an adapter configuration by training within a budget, and record every decision.

    The search is coarse to fine: shared ranks with the learning rate tuned at each; the smallest rank within
    tolerance by an equivalence test; non-uniform ranks of the same budget against uniform ones with paired seeds;
    stability only where the curves justify it; then the gain of more parameters. All runs use the same batches in the
    same order.

    Args:
        base: The model: a folder that transformers can open, or a Hub id.
        output: Folder of the run. It gets the records, ``adapter_config.json``, ``adapter/``, a report and configs.
        data: Training data: text or JSONL.
        evaluate: Held-out files of the same kind; the first decides.
        shifted: Files of another kind.
        params: Budget: trainable parameters, such as ``"10M"``.
        memory_budget: Budget: bytes of the adapter, its gradients and AdamW's state.
        time: Time limit, such as ``"2h"``; the plan lists the omissions that keep it. With ``resume``, a larger
            limit than before extends the search: all runs are kept, and the omitted ones are trained.
        ranks: Shared ranks to try; by default up to four powers of 4 below the largest rank within the budget.
        dry_run: Stop after the plan.
        on_plan: Called with the plan before any training; if it returns False, nothing is trained or written.
        **options: ``TuneOptions``.

    Returns:
        The records are in ``whole``: the plan, trials, decisions, and last the choice (``Tune``). Only the plan where
        the run stopped before training; ``end`` is then None.

    Raises:
        UsageError: An option is invalid, the budget is too small for a rank, the time for a search, or ``output`` holds
            other files.
        InputError: An input cannot be read, or the model cannot be opened or adapted.
        InconclusiveError: No rank is trained with a finite loss.

    Example:
        >>> found = tune("sample_checkpoints/base", "run/", data="train.txt",  # doctest: +SKIP
        ...     evaluate=["held_out.txt"], params="10k", time="10min")
        >>> found.whole[-1]  # doctest: +SKIP
    """
    run = TrainRun("tune", options, TuneOptions, ("rates",), ("steps", "repeats"))
    arguments, folder = run.options, Path(output)
    _check_output(folder, arguments)
    limit = None if arguments["time"] is None else read_time(arguments["time"])
    if not 0 < arguments["gain_tolerance"] < 1:
        raise UsageError(f"--gain-tolerance {arguments['gain_tolerance']}: must lie between 0 and 1")
    if (arguments["params"] is None) == (arguments["memory_budget"] is None):
        raise UsageError("tune: needs exactly one budget; give --params or --memory-budget")
    check_files([base], arguments["evaluate"], *arguments["shifted"], arguments["data"])
    earlier, kind = _read_earlier_plan(folder, arguments), Lora(dora=arguments["dora"], rslora=arguments["rslora"])
    with keep_open(), run.joined():
        stored, model = open_checkpoint(base), run.open(base)
        run.read_all(arguments["data"], arguments["evaluate"], arguments["shifted"], arguments["steps"], kind)
        target = target_of(model, stored, arguments["target_modules"], kind)
        workers, plan = run.workers(base, stored), earlier
        slots = 1 if workers is None else workers.slots
        if earlier is None:
            plan = plan_of(base, run, target, limit, slots)
        elif limit is not None and limit != earlier.limit:
            plan = extend_plan(earlier, run, limit, slots)
        assert plan is not None
        record = Run(command="tune", version="", inputs=(), settings=_make_settings(run, target))
        if arguments["dry_run"] or (
            plan is not earlier and arguments["on_plan"] is not None and not arguments["on_plan"](plan)
        ):
            return Results(record, (), (), None, (plan,))
        folder.mkdir(exist_ok=True)
        if earlier is None and arguments["overwrite"]:
            _remove_output(folder)
        elif earlier is not None and plan is not earlier:
            _extend(folder, plan)
        arguments["output"] = folder / RECORDS

        def run_search(kept: RunRecords[Any]) -> list[LeftOut]:
            kept.put(plan)
            Tuner(base, folder, run, target, plan, kept, workers).run()
            return []

        results = run.over(run.inputs(stored), record.settings, run_search)
    write_report(folder)
    return results


def _make_settings(run: TrainRun, target: Target) -> dict[str, Any]:
    arguments = run.options
    return {
        **{name: legible(str(arguments[name])) for name in ("params", "memory_budget") if arguments[name] is not None},
        "rates": sorted(set(arguments["rates"])),
        "ranks": list(arguments["ranks"]),
        **run.training_settings(arguments["repeats"]),
        "tolerance": arguments["gain_tolerance"],
        "targets": list(arguments["target_modules"]) or "all-linear",
        "matrices": len(target.shapes),
        "kind": target.kind.description,
        "quantized": arguments["quantized"],
        "optimizer": RECIPE,
    }


def _check_output(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Refuse an output before any work.

    Raises:
        UsageError: The output is a link, a file, a folder with other files, or one with a run that is not to be
            resumed or replaced.
        InputError: The folder cannot be created.
    """
    records = folder / RECORDS
    for path in (folder, records):
        if os.path.islink(path):  # noqa: PTH114  (unlike Path.is_symlink(), False for names that no file can have)
            raise UsageError(f"{path}: is a symbolic link, which is not followed; give the folder itself")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"-o {folder}: is a file; give a folder")
    check_folder_of(folder)
    if arguments["dry_run"] or not folder.is_dir() or not any(folder.iterdir()):
        return
    if not records.is_file():
        raise UsageError(f"-o {folder}: is not empty and holds no run of tune; choose another name")
    if not (arguments["overwrite"] or arguments["resume"]):
        raise UsageError(f"-o {folder}: holds a run; continue it with --resume, or replace it with --overwrite")


def _latest_file(folder: Path) -> Path:
    """Return the file of a run's records; those of a search that was extended grow in another file until it ends."""
    part = folder / f"{RECORDS}.part"
    return part if part.is_file() else folder / RECORDS


def _read_earlier_plan(folder: Path, arguments: Mapping[str, Any]) -> TunePlan | None:
    """Return the plan of the run that is to be resumed; None for a new run.

    Raises:
        InputError: The folder's records cannot be read.
    """
    if not arguments["resume"] or not _latest_file(folder).is_file():
        return None
    plans = [record for record in read_results(_latest_file(folder)).whole if isinstance(record, TunePlan)]
    return plans[0] if plans else None


def _remove_output(folder: Path) -> None:
    """Remove the output of an earlier search."""
    for name in FILES:
        for path in (folder / name, folder / f"{name}.part"):
            path.unlink(missing_ok=True)
    for name in ("trials", "adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _extend(folder: Path, plan: TunePlan) -> None:
    """Write an unfinished run with another plan and all runs of the earlier one; decisions are made again."""
    results = read_results(_latest_file(folder))
    records: tuple[AnyRecord, ...] = (results.run, plan, *results.whole_of(TuneTrial))
    write_whole(folder / f"{RECORDS}.part", "".join(f"{to_line(record)}\n" for record in records))
