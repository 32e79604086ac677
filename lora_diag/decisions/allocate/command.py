"""``loradiag allocate`` and ``loradiag rank-rules``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict, cast

from lora_diag.cli import options
from lora_diag.cli.output import check_outputs, line, rerun_command, result, terminal
from lora_diag.decisions.allocate import AllocateOptions
from lora_diag.errors import UsageError
from lora_diag.running.options import INPUTS, OUTPUT, RSLORA, SWEEP, UNFINISHED, Option

if TYPE_CHECKING:
    from lora_diag.decisions.allocate.record import Allocation
    from lora_diag.records import Results


class ConfigOptions(TypedDict, total=False):
    """Options of the output: its file and format, the check of a config, and the source of a learning rate."""

    output: Annotated[
        Path | None,
        Option(None, "PEFT config (.json) or records (.jsonl) to write.", "FILE", ("--output", "-o"), OUTPUT),
    ]
    format: Annotated[
        str, Option("peft", "Configuration to write.", "peft|axolotl|llamafactory|trl|unsloth", panel=OUTPUT)
    ]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]
    scaling: Annotated[float, Option(2.0, "PEFT config: lora_alpha / r of every layer.", "S", panel=OUTPUT)]
    rslora: Annotated[bool, RSLORA]
    check: Annotated[
        Path | None, Option(None, "PEFT config: compare its ranks with this model; default: off.", "BASE", panel=INPUTS)
    ]
    sweep: Annotated[Path | None, SWEEP]


@options.spread
def allocate(
    results: options.ResultsFile,
    *,
    arguments: AllocateOptions,
    config: ConfigOptions,
    shown: options.Rows,
) -> None:
    """Ranks that keep the most energy within a budget.

    Example: loradiag allocate results.jsonl --params 10M -o adapter_config.json
    """
    from lora_diag.decisions.allocate.run import allocate as choose
    from lora_diag.decisions.allocate.run import kind_of_allocation, write_allocation
    from lora_diag.records import lines_of

    output, check, sweep, overwrite = (config["output"], config["check"], config["sweep"], config["overwrite"])
    format = config["format"]
    if format != "peft" and output is None:
        raise UsageError(f"--format {format}: give a file with -o")
    if check is not None and output is None:
        raise UsageError("--check: needs a PEFT config; write one with -o adapter_config.json")
    if output is not None:
        inputs = (results, cast(Path | None, arguments["layer_weights"]))
        check_outputs(inputs, [(output, kind_of_allocation(output, check, format))], overwrite)
    rate = ""
    if sweep is not None:
        from lora_diag.probes.sweep.verdict import swept_rate

        rate = f"\nlearning rate {swept_rate(sweep)}"
    allocation = choose(results, **arguments)
    if output is not None:
        write_allocation(allocation, output, config["scaling"], config["rslora"], check, overwrite, format)
    if shown.json:
        for text in lines_of(allocation.records()):
            line(text)
    elif not shown.quiet:
        from lora_diag.decisions.allocate.show import allocation_table

        hint = f"{_suggest_next(allocation, output, check)}{rate}"
        result(allocation_table(allocation, *terminal(), per=shown.per, next_command=hint))


@options.spread
def rank_rules(
    results: options.ResultsFile,
    *,
    allow_unfinished: Annotated[bool, options.typer_option("allow_unfinished", UNFINISHED)] = False,
    shown: options.Rows,
) -> None:
    """Ranks of each layer by several rules, without a budget.

    Example: loradiag rank-rules results.jsonl
    """
    from lora_diag.decisions.allocate.run import rank_table
    from lora_diag.decisions.allocate.show import policies_table

    table = rank_table(results, allow_unfinished)
    for row in table if shown.json else ():
        line(row.model_dump_json())
    if shown.table:
        result(policies_table(table, *terminal(), per=shown.per))


def _suggest_next(allocation: Results[Allocation], output: Path | None, check: Path | None) -> str:
    """Return the suggested next step: a command quoted for a shell, or advice on the written file."""
    if output is None:
        return f"{rerun_command('-o', 'adapter_config.json')}   (for training with PEFT; .jsonl for loradiag extract)"
    if output.name == "adapter_config.json":
        advice = f"train with peft.LoraConfig.from_pretrained({str(output.parent)!r})"
        base = next((run_input.path for run_input in allocation.run.inputs if run_input.role == "base"), None)
        check_command = rerun_command("--check", base or "BASE")
        reminder = f"; PEFT ignores names that the model in memory lacks, so check once: {check_command}"
        return advice if check is not None else advice + reminder
    if output.suffix != ".jsonl" and output.suffix != ".json":
        return f"put the lines of {shlex.quote(str(output))} into the configuration of your training"
    if output.suffix == ".json":
        return "rename it to adapter_config.json, the only name that PEFT reads"
    paths = [run_input.path for run_input in allocation.run.inputs if run_input.role in {"base", "tuned", "adapter"}]
    activations = [run_input.path for run_input in allocation.run.inputs if run_input.role == "activations"]
    metric = [word for path in activations for word in ("--activations", path)]
    metric += ["--kfac"] if allocation.run.settings.get("metric") == "kfac" else []
    return shlex.join(["loradiag", "extract", *paths, "--allocation", str(output), *metric, "-o", "adapter"])
