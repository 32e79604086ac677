"""The files of a finished search: configuration, adapter, gate, report, and configurations of trainers."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_diag.catalog import read_results
from lora_diag.decisions import trainers
from lora_diag.decisions.trainers import yaml_of
from lora_diag.diagnostics.spectrum.run import spectrum
from lora_diag.errors import InputError
from lora_diag.files import write_whole
from lora_diag.gating.run import gate_init
from lora_diag.models.training import WARMUP
from lora_diag.running.training_runs import TrainRun
from lora_diag.tuning.planning import short_steps
from lora_diag.tuning.record import Tune, TunePlan
from lora_diag.tuning.trials import RSLORA_ALPHA, Variant, least_rank, save_copy

# Keys of ``adapter_config.json`` that are no arguments of a new ``LoraConfig``.
NOT_ARGUMENTS = ("peft_type", "base_model_name_or_path", "inference_mode")


def write_outputs(
    base: Path | str,
    folder: Path,
    run: TrainRun,
    plan: TunePlan,
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
        plan: The plan.
        variant: The chosen configuration.
        uniform: Content of ``adapter_config.json`` of the shared rank.
        choice: The record of the choice.
        adapter: The folder of its trained adapter.

    Raises:
        InputError: A file cannot be written.
    """
    config = {**variant.config, "base_model_name_or_path": str(base)}
    save_copy(adapter, folder / "adapter", config)
    write_whole(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    spectrum(base, folder / "adapter", output=folder / "spectrum.jsonl", overwrite=True, device=run.options["device"])
    try:
        gate = gate_init(folder / "spectrum.jsonl", name=str(folder / "gate.toml"))
    except InputError as error:  # an update of zero gives no limits
        gate = f"# No limits: {error}\n"
    write_whole(folder / "gate.toml", f"{_describe_significance(choice)}{gate}")
    write_whole(folder / "commands.sh", commands(base, folder, run.options, plan, choice))
    data = (str(run.options["data"]), str(run.options["evaluate"][0]))
    settings = {"batch": run.batch, "length": run.model.length}
    for name, text in configs(str(base), data, variant, uniform, settings).items():
        write_whole(folder / name, text)


def _describe_significance(choice: Tune) -> str:
    """Return a comment for the gate if the choice is not significant; else empty."""
    if choice.significant:
        return ""
    return "# The choice was not significant: these limits are of a candidate that is not shown to be sufficient.\n"


def write_report(folder: Path) -> None:
    """Write ``report.html`` on the records of a run."""
    from lora_diag.reports.run import report

    files = [folder / name for name in ("tune.jsonl", "sweep.jsonl", "spectrum.jsonl")]
    report(*(path for path in files if path.is_file()), output=folder / "report.html", overwrite=True)


def commands(base: Path | str, folder: Path, options: Mapping[str, Any], plan: TunePlan, choice: Tune) -> str:
    """Return a shell script that repeats each step, to be run from the directory of the search."""
    sweep_settings = read_results(folder / "sweep.jsonl").run.settings
    budget = _list_given(options, "params", "memory_budget")
    text_arguments: list[Any] = ["--data", options["data"]]
    for name, flag in (("evaluate", "--eval"), ("shifted", "--shifted")):
        text_arguments += [word for path in options[name] for word in (flag, path)]
    training_arguments = _list_given(options, "batch", "seed", "dtype", "length", "max_sequences", "quantized")
    switches = ("dora", "rslora", "gradient_checkpointing")
    training_arguments += [f"--{name.replace('_', '-')}" for name in switches if options[name]]
    training_arguments += ["--target-modules", ",".join(options["target_modules"])] if options["target_modules"] else []
    train = ["loradiag", "probe", "sweep", base, *text_arguments, *training_arguments]
    lines: list[list[Any]] = [["loradiag", "plan", base, "--data", options["data"], *budget]]
    if plan.halving:
        end_options: list[Any] = [
            "--ranks",
            _list_values({plan.ranks[0], plan.ranks[-1]}),
            "--lr",
            _list_values(plan.rates),
        ]
        lines.append(
            [
                *train,
                *end_options,
                "--steps",
                short_steps(plan.steps),
                "--repeats",
                1,
                *_make_output_option("rates.jsonl"),
            ]
        )
    grid_options: list[Any] = [
        "--ranks",
        _list_values(sweep_settings["ranks"]),
        "--lr",
        _list_values(sweep_settings["rates"]),
    ]
    grid_options += (
        ["--full", "--full-lr", _list_values(sweep_settings["full_rates"])] if sweep_settings["full_rates"] else []
    )
    grid_options += ["--steps", plan.steps, "--repeats", plan.repeats, "--widen", plan.widen]
    lines.append([*train, *grid_options, *_make_output_option("sweep.jsonl")])
    if (folder / "pilot.jsonl").is_file():
        pilot = next(iter(sorted((folder / "trials").glob("pilot-r*"))))
        lines.append(["loradiag", "spectrum", base, pilot, *_make_output_option("pilot.jsonl")])
        minimum = least_rank(choice.rank)
        budget_options = ["--params", choice.rank * plan.per_rank, "--min-rank", minimum, "--layers", "."]
        allocate_command = ["loradiag", "allocate", "$OUT/pilot.jsonl", *budget_options]
        prior_options = ["--layer-weights", folder / "weights.json", "--strategy", "heuristic"]
        scaling_options = [_scaling_arguments(folder / "trials" / name, options) for name in ("marginal", "prior")]
        lines += [
            [*allocate_command, *scaling_options[0], *_make_output_option("marginal.json")],
            [*allocate_command, *prior_options, *scaling_options[1], *_make_output_option("prior.json")],
        ]
    lines += [
        ["loradiag", "spectrum", base, folder / "adapter", *_make_output_option("spectrum.jsonl")],
        ["loradiag", "gate", "init", "$OUT/spectrum.jsonl", *_make_output_option("gate.toml")],
        [
            "loradiag",
            "report",
            folder / "tune.jsonl",
            "$OUT/sweep.jsonl",
            "$OUT/spectrum.jsonl",
            *_make_output_option("report.html"),
        ],
    ]
    script = "\n".join(" ".join(map(_quote, line)) for line in lines)
    return (
        "#!/bin/sh\n"
        "# The steps of this search by hand, into the folder OUT; run it where the search was run. Adapters that are\n"
        "# no uniform LoRA were trained by loradiag tune itself, with PEFT, from the configurations in trials/.\n"
        f"{'# The configurations of allocate lack use_dora: true.' + chr(10) if options['dora'] else ''}"
        f'set -e\nOUT="${{OUT:-by-hand}}"\nmkdir -p "$OUT"\n{script}\n'
        f"# The real training: python {shlex.quote(str(folder / 'config.trl.py'))}\n"
    )


def _scaling_arguments(adapter: Path, options: Mapping[str, Any]) -> list[Any]:
    """Return the arguments by which ``allocate`` gives a candidate its alpha of rsLoRA; none without rsLoRA."""
    if not options["rslora"]:
        return []
    path = adapter / "adapter_config.json"
    rank = json.loads(path.read_text(encoding="utf-8"))["r"] if path.is_file() else None
    return ["--rslora", *(["--scaling", RSLORA_ALPHA / math.sqrt(rank)] if rank else [])]


def _list_given(options: Mapping[str, Any], *names: str) -> list[Any]:
    """Return the given options as arguments."""
    return [
        word for name in names if options[name] is not None for word in (f"--{name.replace('_', '-')}", options[name])
    ]


def _make_output_option(name: str) -> list[str]:
    return ["-o", f"$OUT/{name}"]


def _quote(word: object) -> str:
    """Return a word quoted for a shell, in which ``$OUT`` is expanded."""
    text = str(word)
    return f'"{text}"' if text.startswith("$OUT/") else shlex.quote(text)


def _list_values(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" for value in sorted(values))


def configs(
    base: str, files: Sequence[str], variant: Variant, uniform: Mapping[str, Any], settings: Mapping[str, int]
) -> dict[str, str]:
    """Return configurations of the chosen adapter for other trainers, by file name.

    Args:
        base: The model.
        files: The training file and the held-out one.
        variant: The chosen configuration.
        uniform: Content of ``adapter_config.json`` of the shared rank, for trainers that have no rank of each layer.
        settings: ``batch`` and ``length``.
    """
    note, single_rank = "", variant.config
    if single_rank["rank_pattern"]:
        note = (
            f"# LLaMA-Factory has one rank for all layers: this is the uniform rank {uniform['r']} that the search\n"
            f"# compared with {variant.name}; config.axolotl.yaml and config.trl.py have a rank for each layer.\n"
        )
        single_rank = {**uniform, "lora_dropout": single_rank["lora_dropout"]}
    return {
        "config.axolotl.yaml": yaml_of(_make_axolotl(base, files, variant, settings)),
        "config.llamafactory.yaml": note
        + yaml_of(_make_llamafactory(base, files, replace(variant, config=single_rank), settings)),
        "config.trl.py": _make_trl(base, files, variant, settings),
    }


def _make_axolotl(base: str, files: Sequence[str], variant: Variant, settings: Mapping[str, int]) -> dict[str, Any]:
    return {
        "base_model": base,
        "datasets": [{"path": files[0], "type": "completion"}],
        "test_datasets": [{"path": files[1], "type": "completion", "split": "train"}],
        "sequence_len": settings["length"],
        **trainers.axolotl(variant.config),
        "micro_batch_size": settings["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": variant.steps,
        "optimizer": "adamw_torch",
        "learning_rate": variant.lr,
        "lr_scheduler": "cosine",
        "warmup_ratio": WARMUP,
        "weight_decay": variant.decay,
        "max_grad_norm": 1.0,
        "output_dir": "./out",
    }


def _make_llamafactory(
    base: str, files: Sequence[str], variant: Variant, settings: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "model_name_or_path": base,
        "stage": "sft",
        "do_train": True,
        **trainers.llamafactory(variant.config),
        "dataset": Path(files[0]).stem,
        "dataset_dir": str(Path(files[0]).parent),
        "template": "default",
        "cutoff_len": settings["length"],
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": variant.steps,
        "learning_rate": variant.lr,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": WARMUP,
        "weight_decay": variant.decay,
        "max_grad_norm": 1.0,
        "output_dir": "./out",
    }


def _make_trl(base: str, files: Sequence[str], variant: Variant, settings: Mapping[str, int]) -> str:
    kinds = {".jsonl": "json", ".json": "json"}
    kind = kinds.get(Path(files[0]).suffix.lower(), "text")
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
