"""``loradiag fleet``."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer

from lora_diag.cli import options
from lora_diag.cli.output import exit_unmeasured, rerun_command
from lora_diag.diagnostics.fleet import FleetOptions


@options.spread
def fleet(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER", help="Adapters or patterns such as 'runs/**'; - reads a list from stdin."),
    ],
    *,
    arguments: FleetOptions,
    shown: options.Rows,
) -> None:
    """Ranks, outliers and near-duplicates of many adapters.

    Rows are the adapters with a remark; with --per layer, all adapters. DoRA, PiSSA and IA³ need --base.

    Example: loradiag fleet 'adapters/**' -o fleet.jsonl
    """
    show_fleet(adapters, arguments, shown)


def show_fleet(adapters: list[str], arguments: Any, shown: options.Rows) -> None:
    """Measure many adapters in one pass, and show the results.

    ``-`` among the adapters stands for a list of paths on standard input.

    Raises:
        Exit: An adapter could not be measured.
    """
    # deferred: imports torch
    from lora_diag.diagnostics.fleet.measure import fleet as measure
    from lora_diag.diagnostics.fleet.measure import unreadable

    stdin_paths = [line.rstrip("\n") for line in sys.stdin if line.strip()] if "-" in adapters else []
    with shown.callbacks() as callbacks:
        results = measure(
            [*(pattern for pattern in adapters if pattern != "-"), *stdin_paths], **arguments, **callbacks
        )
    output = arguments["output"]
    hint = f"{rerun_command('-o', 'fleet.jsonl')}   (saves these results)"
    if output is not None:
        command = shlex.join(["loradiag", "inspect", str(output), "--per", "layer"])
        hint = f"{command}   (all adapters, without measuring again)"
    shown.show(results, hint if len(results) else None)
    exit_unmeasured(unreadable(results), "the adapter was left out")
