"""``tune``: from a base model, data and a budget to an adapter configuration."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, Unpack

from lora_diag.catalog import read_results
from lora_diag.decisions.trainers import format_yaml, settings_of
from lora_diag.diagnostics.spectrum.run import spectrum
from lora_diag.errors import Given, InputError, UsageError
from lora_diag.files import check_folder_of, write_whole
from lora_diag.gating.run import gate_init
from lora_diag.models.opening import keep_open
from lora_diag.models.training import WARMUP, Lora
from lora_diag.records import LeftOut, Results, Run
from lora_diag.records.results import to_line
from lora_diag.records.run import AnyRecord
from lora_diag.reports.run import report
from lora_diag.running.amounts import read_time
from lora_diag.running.fingerprint import legible
from lora_diag.running.options import show_options
from lora_diag.running.progress import RunRecords
from lora_diag.running.training_runs import TrainRun
from lora_diag.storage import open_checkpoint
from lora_diag.tuning import TuneOptions
from lora_diag.tuning.planning import (
    EVALUATIONS,
    SearchDeadline,
    TuneTarget,
    extend_plan,
    plan_of,
    target_of,
)
from lora_diag.tuning.record import Tune, TunePlan, TuneTrial
from lora_diag.tuning.search import Tuner
from lora_diag.tuning.trials import ADAPTER, Variant, replace_folder

RECORDS = "tune.jsonl"
# Keys of ``adapter_config.json`` that are no arguments of a new ``LoraConfig``.
NOT_ARGUMENTS = ("peft_type", "base_model_name_or_path", "inference_mode")
FILES = (
    RECORDS,
    *("sweep.jsonl", "rates.jsonl", "pilot.jsonl", "spectrum.jsonl"),
    *("adapter_config.json", "gate.toml", "report.html"),
    *("config.axolotl.yaml", "config.llamafactory.yaml", "config.trl.py"),
)


@show_options
def tune(base: Path | str, output: Path | str, **options: Unpack[TuneOptions]) -> Results[Any]:
    r"""Choose an adapter configuration by training within a budget, and record every decision.

    The search is coarse to fine: shared ranks with the learning rate tuned at each; the smallest
    rank within tolerance by an equivalence test; non-uniform ranks of the same budget against
    uniform ones with paired seeds; stability only where the curves justify it; then the gain of
    more parameters. All runs use the same batches in the same order.

    Args:
        base: The model: a folder that transformers can open, or a Hub id.
        output: Folder of the run. It gets the records, ``adapter_config.json``, ``adapter/``, a
            report and configs.
        data: Training data: text, JSONL or a data set.
        eval: Held-out files of the same kind; the first decides.
        shifted: Files of another kind.
        params: Budget: trainable parameters, such as ``"10M"``.
        memory_budget: Budget: bytes of the adapter, its gradients and AdamW's state.
        time: Time limit, such as ``"2h"``; the plan lists the omissions that keep it. With
            ``resume``, a larger limit than before extends the search: all runs are kept, and
            omitted ones that now fit are trained.
        ranks: Shared ranks to try; by default up to four, each a fourth of the next: up to the
            largest power of two within the budget; 1 and 2 if the largest rank within it is 2 or 3.
        dry_run: Stop after the plan.
        on_plan: Called with a new or extended plan before the search, unless ``dry_run``; if it
            returns False, nothing is trained or written.
        **options: ``TuneOptions``.

    Returns:
        The records are in ``whole``: the plan, then trials and decisions, and last the choice
            (``Tune``). Only the plan
        where the run stopped before the search; ``end`` is then None.

    Raises:
        UsageError: An option is invalid, BASE is an adapter, the extra ``train``, or a package for
            the engine or the data set, is not installed, the training text is also an evaluation
            set, the budget is too small for a rank, the time for a search, or ``output`` is a link
            or a file, holds other files, or holds a run that is not replaced, and not resumed with
            the same inputs and settings.
        InputError: An input cannot be read, the model cannot be opened or adapted, its loss on
            training sequences is not finite, a file cannot be written, or the cluster cannot be
            reached.
        InconclusiveError: No rank is trained with a finite loss, or BASE has none.

    Example:
        >>> found = tune(
        ...     "sample_checkpoints/base",
        ...     "run/",
        ...     data="train.txt",  # doctest: +SKIP
        ...     eval=["held_out.txt"],
        ...     params="10k",
        ...     time="10min",
        ... )
        >>> found.whole[-1]  # doctest: +SKIP
    """
    run = TrainRun("tune", options, TuneOptions)
    options, folder = run.options, Path(output)
    _check_output(folder, options)
    limit = None if options["time"] is None else read_time(options["time"])
    deadline = SearchDeadline(limit)  # counts from here
    if (options["params"] is None) == (options["memory_budget"] is None):
        raise UsageError("tune", "needs exactly one budget", "give $params or $memory_budget")
    run.check_files(base)
    earlier = _read_earlier_plan(folder, options)
    kind = Lora(dora=options["dora"], rslora=options["rslora"])
    with keep_open(), run.joined():
        stored, model = open_checkpoint(base), run.open(base)
        run.read_all(kind)
        if limit is not None or (earlier is not None and earlier.limit is not None):
            run.sets = run.fit(run.sets, lambda: EVALUATIONS * run.count_tokens(run.sets))
        target = target_of(model, stored, options["target_modules"], kind)
        workers = run.workers(base, stored)
        slots = 1 if workers is None else workers.slots
        plan = _plan_search(base, run, target, earlier, limit, slots)
        deadline.limit = plan.limit
        record = Run(command="tune", version="", inputs=(), settings=_make_settings(run, target))
        is_confirmed = not options["dry_run"]
        on_plan = options["on_plan"]
        if is_confirmed and plan is not earlier and on_plan is not None:
            asked = monotonic()
            is_confirmed = on_plan(plan)
            deadline.began += monotonic() - asked
        if not is_confirmed:
            return Results(record, (), (), None, (plan,))
        folder.mkdir(parents=True, exist_ok=True)
        if earlier is None and options["overwrite"]:
            _remove_output(folder)
        elif earlier is not None and plan is not earlier:
            _extend(folder, plan)
        run.values["output"] = folder / RECORDS

        def run_search(kept: RunRecords[Any]) -> list[LeftOut]:
            kept.put(plan)
            tuner = Tuner(base, folder, run, target, plan, kept, deadline, workers)
            variant, choice = tuner.run()
            write_outputs(
                base,
                folder,
                run,
                variant,
                target.config(choice.rank),
                choice,
                tuner.adapter_folder(variant),
            )
            return []

        results = run.over(run.inputs(stored), record.settings, run_search)
    files = [folder / name for name in (RECORDS, "sweep.jsonl", "spectrum.jsonl")]
    report(
        *(path for path in files if path.is_file()), output=folder / "report.html", overwrite=True
    )
    return results


def _plan_search(
    base: Path | str,
    run: TrainRun[TuneOptions],
    target: TuneTarget,
    earlier: TunePlan | None,
    limit: float | None,
    slots: int,
) -> TunePlan:
    """Return a new plan, or the earlier one, extended if the limit is another."""
    if earlier is None:
        plan = plan_of(base, run, target, limit, slots)
    elif limit is not None and limit != earlier.limit:
        plan = extend_plan(earlier, run.options, limit, slots)
    else:
        return earlier
    if not run.options["shifted"]:
        run.watch.note(
            "--shifted FILE, a text of another kind, would measure what the adapter makes BASE "
            "forget"
        )
    return plan


def _make_settings(run: TrainRun[TuneOptions], target: TuneTarget) -> dict[str, Any]:
    options = run.options
    budgets = {"params": options["params"], "memory_budget": options["memory_budget"]}
    given = {name: legible(str(value)) for name, value in budgets.items() if value is not None}
    return {
        **given,
        "lr": sorted(set(options["lr"])),
        "ranks": list(options["ranks"]),
        **run.training_settings(),
        "gain_tolerance": options["gain_tolerance"],
        "target_modules": list(options["target_modules"]) or "all-linear",
        "matrices": len(target.shapes),
        "kind": target.kind.description,
        "quantized": options["quantized"],
    }


def _check_output(folder: Path, options: TuneOptions) -> None:
    """Refuse a folder that cannot hold the run, before any work.

    Raises:
        UsageError: The output is a link, a file, a folder with other files, or one with a run that
            is not to be resumed or replaced.
    """
    records = folder / RECORDS
    for path in (folder, records):
        if os.path.islink(path):  # noqa: PTH114  (unlike Path.is_symlink(), False for names that no file can have)
            raise UsageError(
                f"{path}: is a symbolic link, which is not followed; give the folder itself"
            )
    if folder.exists() and not folder.is_dir():
        raise UsageError(Given("output", folder), "is a file", "give a folder")
    check_folder_of(folder)
    if options["dry_run"] or not folder.is_dir() or not any(folder.iterdir()):
        return
    if not records.is_file():
        raise UsageError(
            Given("output", folder), "is not empty and holds no run of tune", "choose another name"
        )
    if not (options["overwrite"] or options["resume"]):
        raise UsageError(
            Given("output", folder),
            "holds a run",
            "continue it with $resume, or replace it with $overwrite",
        )


def _latest_file(folder: Path) -> Path:
    """Return the file of a run's records: ``tune.jsonl.part`` while a search is extended, else
    ``tune.jsonl``.
    """
    part = folder / f"{RECORDS}.part"
    return part if part.is_file() else folder / RECORDS


def _read_earlier_plan(folder: Path, options: TuneOptions) -> TunePlan | None:
    """Return the plan of the run to resume; None for a new run, or if that run has no plan yet.

    Raises:
        UsageError: ``no_full`` is given, but that run has full fine-tuning.
    """
    if not options["resume"] or not _latest_file(folder).is_file():
        return None
    plan = next(iter(read_results(_latest_file(folder)).whole_of(TunePlan)), None)
    if plan is not None and plan.full and options["no_full"]:
        raise UsageError(
            Given("no_full"),
            "the search to resume has full fine-tuning as a baseline",
            "remove $no_full",
        )
    return plan


def _remove_output(folder: Path) -> None:
    """Remove the output of an earlier search."""
    for name in FILES:
        for path in (folder / name, folder / f"{name}.part"):
            path.unlink(missing_ok=True)
    for name in ("trials", "adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _extend(folder: Path, plan: TunePlan) -> None:
    """Write an unfinished run with another plan and all runs of the earlier one; decisions are made
    again.
    """
    results = read_results(_latest_file(folder))
    records: tuple[AnyRecord, ...] = (results.run, plan, *results.whole_of(TuneTrial))
    write_whole(folder / f"{RECORDS}.part", "".join(f"{to_line(record)}\n" for record in records))


def write_outputs(
    base: Path | str,
    folder: Path,
    run: TrainRun[TuneOptions],
    variant: Variant,
    uniform: Mapping[str, Any],
    choice: Tune,
    adapter: Path,
) -> None:
    """Write all but the report, which reads the finished records; an earlier adapter is replaced.

    Args:
        base: The model.
        folder: Folder of the run.
        run: Options, model and texts of the search.
        variant: The chosen configuration.
        uniform: Content of ``adapter_config.json`` of the shared rank.
        choice: The record of the choice.
        adapter: The folder of its trained adapter.
    """
    config = {**variant.config, "base_model_name_or_path": str(base)}
    config_text = json.dumps(config, indent=2) + "\n"
    with replace_folder(folder / "adapter") as part:
        part.mkdir()
        shutil.copyfile(adapter / ADAPTER, part / ADAPTER)
        (part / "adapter_config.json").write_text(config_text, encoding="utf-8")
    write_whole(folder / "adapter_config.json", config_text)
    spectrum(
        base,
        folder / "adapter",
        output=folder / "spectrum.jsonl",
        overwrite=True,
        device=run.options["device"],
    )
    try:
        gate = gate_init(folder / "spectrum.jsonl", name=str(folder / "gate.toml"))
    except InputError as error:  # an update of zero gives no limits
        gate = f"# No limits: {error}\n"
    if not choice.significant:
        note = (
            "# The choice was not significant: these limits are of a candidate that is not "
            "shown to be sufficient.\n"
        )
        gate = f"{note}{gate}"
    write_whole(folder / "gate.toml", gate)
    data = (str(run.options["data"]), str(run.options["eval"][0]))
    settings = {"batch": run.batch, "length": run.model.length}
    for name, text in configs(str(base), data, variant, uniform, settings).items():
        write_whole(folder / name, text)


def configs(
    base: str,
    files: Sequence[str],
    variant: Variant,
    uniform: Mapping[str, Any],
    settings: Mapping[str, int],
) -> dict[str, str]:
    """Return configurations of the chosen adapter for other trainers, by file name.

    Args:
        base: The model.
        files: The training file and the held-out one.
        variant: The chosen configuration.
        uniform: Content of ``adapter_config.json`` of the shared rank, for trainers that have no
            rank of each layer.
        settings: ``batch`` and ``length``.
    """
    note, single_rank = "", variant.config
    if single_rank["rank_pattern"]:
        note = (
            f"# LLaMA-Factory has one rank for all layers: this is the uniform rank {uniform['r']} "
            "that the search\n"
            f"# compared with {variant.name}; config.axolotl.yaml and config.trl.py have a rank "
            "for each layer.\n"
        )
        single_rank = {**uniform, "lora_dropout": single_rank["lora_dropout"]}
    return {
        "config.axolotl.yaml": format_yaml(_make_axolotl(base, files, variant, settings)),
        "config.llamafactory.yaml": note
        + format_yaml(
            _make_llamafactory(base, files, replace(variant, config=single_rank), settings)
        ),
        "config.trl.py": _make_trl(base, files, variant, settings),
    }


def _make_shared(variant: Variant) -> dict[str, Any]:
    """Return the settings that have one name in axolotl and LLaMA-Factory."""
    return {
        "gradient_accumulation_steps": 1,
        "max_steps": variant.steps,
        "learning_rate": variant.lr,
        "warmup_ratio": WARMUP,
        "weight_decay": variant.decay,
        "max_grad_norm": 1.0,
        "output_dir": "./out",
    }


def _make_axolotl(
    base: str, files: Sequence[str], variant: Variant, settings: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "base_model": base,
        "datasets": [{"path": files[0], "type": "completion"}],
        "test_datasets": [{"path": files[1], "type": "completion", "split": "train"}],
        "sequence_len": settings["length"],
        **settings_of("axolotl", variant.config),
        "micro_batch_size": settings["batch"],
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        **_make_shared(variant),
    }


def _make_llamafactory(
    base: str, files: Sequence[str], variant: Variant, settings: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "model_name_or_path": base,
        "stage": "sft",
        "do_train": True,
        **settings_of("llamafactory", variant.config),
        "dataset": Path(files[0]).stem,
        "dataset_dir": str(Path(files[0]).parent),
        "template": "default",
        "cutoff_len": settings["length"],
        "per_device_train_batch_size": settings["batch"],
        "lr_scheduler_type": "cosine",
        **_make_shared(variant),
    }


def _make_trl(
    base: str, files: Sequence[str], variant: Variant, settings: Mapping[str, int]
) -> str:
    kind = "json" if Path(files[0]).suffix.lower() in {".jsonl", ".json"} else "text"
    values = {key: value for key, value in variant.config.items() if key not in NOT_ARGUMENTS}
    arguments = "".join(f"        {key}={value!r},\n" for key, value in values.items())
    return f'''"""Train the chosen adapter with TRL: pip install trl peft datasets."""

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

data = load_dataset({kind!r}, data_files={{"train": {files[0]!r}, "test": {files[1]!r}}})
trainer = SFTTrainer(
    model={base!r},
    train_dataset=data["train"],
    eval_dataset=data["test"],
    peft_config=LoraConfig(
{arguments}    ),
    args=SFTConfig(
        output_dir="out",
        max_steps={variant.steps},
        per_device_train_batch_size={settings["batch"]},
        max_length={settings["length"]},
        learning_rate={variant.lr!r},
        lr_scheduler_type="cosine",
        warmup_ratio={WARMUP!r},
        weight_decay={variant.decay!r},
        max_grad_norm=1.0,
        optim="adamw_torch",
        eval_strategy="epoch",
    ),
)
trainer.train()
trainer.save_model()
'''
