"""The command ``tune``: confirmation of the plan, and the exit code."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from lora_diag.cli.output import print_message, rerun_command
from lora_diag.errors import DONE, INCONCLUSIVE, UsageError
from lora_diag.tuning import TuneOptions

if TYPE_CHECKING:
    from lora_diag.cli.options import OutputChoice
    from lora_diag.tuning.record import TunePlan


def run_tune(
    shown: OutputChoice, base: str, *, output: Path, yes: bool, **options: Unpack[TuneOptions]
) -> int:
    """Print a new plan, train once it is confirmed, print the choice, and return the exit code.

    Raises:
        LoradiagError: As ``tune``; also if confirmation cannot be requested without a terminal.
    """
    dry = options["dry_run"]
    # deferred: imports torch
    from lora_diag.tuning.record import Tune
    from lora_diag.tuning.run import tune as choose
    from lora_diag.tuning.show import plan_text, tune_table

    def confirm(plan: TunePlan) -> bool:
        if shown.table:
            shown.print(plan_text(plan, *shown.terminal))
        if not (yes or sys.stdin.isatty()):
            raise UsageError(
                "tune", "cannot ask for confirmation without a terminal", "add $yes to start"
            )
        return yes or shown.confirm("Start?")

    options["on_plan"] = confirm
    with shown.callbacks() as callbacks:
        results = choose(base, output, **options, **callbacks)
    if dry and shown.table:
        shown.print(
            tune_table(
                results,
                *shown.terminal,
                next_command=rerun_command("--yes").replace(" --dry-run", ""),
            )
        )
    choice = next(iter(results.whole_of(Tune)), None)
    if choice is None:
        if not dry:
            print_message(f"stopped before training; nothing was written to {output}")
        return DONE
    if shown.table:
        hint = (
            f"python {shlex.quote(str(output / 'config.trl.py'))}   ({output / 'report.html'} "
            "shows all)"
        )
        shown.print(tune_table(results, *shown.terminal, next_command=hint))
    if not choice.significant:
        print_message(
            "the choice is not significant: exit code 5; more --repeats or --steps may decide it"
        )
        return INCONCLUSIVE
    return DONE
