"""``loradiag tune``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import message, rerun_command, result, silence_matplotlib, terminal
from lora_diag.errors import INCONCLUSIVE, UsageError
from lora_diag.running.options import EXECUTION, OUTPUT, Option
from lora_diag.tuning import TuneOptions

if TYPE_CHECKING:
    from lora_diag.tuning.record import TunePlan

_OUTPUT = Option(..., "Folder of the run.", "DIR", ("--output", "-o"), OUTPUT)
_YES = Option(False, "Start without asking.", flags=("--yes", "-y"), panel=EXECUTION)


@options.spread
def tune(
    base: options.Base,
    *,
    output: Annotated[Path, options.typer_option("output", _OUTPUT)],
    yes: Annotated[bool, options.typer_option("yes", _YES)] = False,
    arguments: TuneOptions,
    shown: options.Shown,
) -> None:
    """Choose an adapter by training within a budget.

    By default, --ranks are up to four powers of 4 within the budget.

    Example: loradiag tune base/ --data train.jsonl --eval held_out.jsonl --params 10M --time 2h -o run/
    """
    dry = arguments["dry_run"]
    # deferred: imports torch
    from lora_diag.tuning.record import Tune
    from lora_diag.tuning.run import tune as choose
    from lora_diag.tuning.show import plan_text, tune_table

    def confirm(plan: TunePlan) -> bool:
        if not shown.json and not shown.quiet:
            result(plan_text(plan, *terminal()))
        if not (yes or sys.stdin.isatty()):
            raise UsageError("tune: cannot ask for confirmation without a terminal; add --yes to start")
        return yes or typer.confirm("Start?", default=True, err=True)

    arguments["on_plan"] = confirm
    silence_matplotlib()
    with shown.callbacks(notes=True) as callbacks:
        results = choose(base, output, **arguments, **callbacks)
    if dry and shown.table:
        result(tune_table(results, *terminal(), next_command=rerun_command("--yes").replace(" --dry-run", "")))
    choice = next(iter(results.whole_of(Tune)), None)
    if choice is None:
        if not dry:
            message(f"stopped before training; nothing was written to {output}")
        return
    if shown.table:
        hint = f"python {shlex.quote(str(output / 'config.trl.py'))}   ({output / 'report.html'} shows all)"
        result(tune_table(results, *terminal(), next_command=hint))
    if not choice.significant:
        message("the choice is not significant: exit code 5; more --repeats or --steps may decide it")
        raise typer.Exit(INCONCLUSIVE)
