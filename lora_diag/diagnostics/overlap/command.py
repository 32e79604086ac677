"""``loradiag overlap``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, TypedDict

import typer

from lora_diag.cli import options
from lora_diag.cli.output import exit_unmeasured, message, rerun_command, result, terminal
from lora_diag.diagnostics.overlap import OverlapOptions
from lora_diag.running.options import SHOW_RANK


class TableOptions(TypedDict, total=False):
    """Options of the table."""

    show_rank: Annotated[int | None, SHOW_RANK]


@options.spread
def overlap(
    base: options.Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Checkpoint after a pilot run, or an adapter.")],
    gradients: Annotated[
        list[str],
        typer.Argument(metavar="GRADIENTS", help="Gradient snapshots: a folder of them, or one file per step."),
    ],
    *,
    arguments: OverlapOptions,
    table_options: TableOptions,
    shown: options.Rows,
) -> None:
    """Overlap of gradients with the subspaces of an update.

    Example: loradiag overlap base/ full_ft/ gradients/ --ranks 8,16 -o overlap.jsonl
    """
    # deferred: imports torch
    from lora_diag.diagnostics.overlap.measure import overlap as measure
    from lora_diag.diagnostics.overlap.show import overlap_table

    rank = table_options["show_rank"]
    with shown.callbacks() as callbacks:
        if rank is not None:
            arguments["ranks"] = [*arguments["ranks"], rank]
        results = measure(base, tuned, gradients, **arguments, **callbacks)
    if shown.table:
        if rank is not None and results.layers and all(record.rank != rank for record in results.layers):
            message(f"--show-rank {rank}: larger than all layers and adapters; another rank is shown")
        hint = _suggest_next(arguments["output"], shown.per) if results.layers else None
        result(overlap_table(results, *terminal(), per=shown.per, rank=rank, next_command=hint))
    exit_unmeasured(results.unmeasured, "left out")


def _suggest_next(output: Path | str | None, per: str) -> str:
    """Return a command to run next, quoted for a shell, with its purpose."""
    if per == "type":
        return f"{rerun_command('--per', 'layer')}   (layer by layer)"
    if output is None:
        return f"{rerun_command('-o', 'overlap.jsonl')}   (saves these results)"
    return f"loradiag inspect {shlex.quote(str(output))}   (this table, without measuring again)"
