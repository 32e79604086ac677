"""``loradiag inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import line, result, terminal
from lora_diag.running.options import MissingAlpha


@options.spread
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint, adapter or results file.")],
    *,
    arguments: MissingAlpha,
    shown: options.Rows,
) -> None:
    """Show a results file, or list a checkpoint.

    Example: loradiag inspect results.jsonl --per layer
    """
    from lora_diag.catalog import read_results
    from lora_diag.records import is_results_file, lines_of

    if is_results_file(path):
        results = read_results(path)
        for record_line in lines_of(results.records()) if shown.json else ():
            line(record_line)
        shown.show(results)
        return

    from lora_diag.inspection.run import inspect as take_inventory
    from lora_diag.inspection.table import inventory_table

    inventory = take_inventory(path, **arguments)
    if shown.json:
        line(inventory.model_dump_json())
    elif not shown.quiet:
        result(inventory_table(inventory, *terminal()))
