"""``loradiag inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import line, result, terminal


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint, an adapter or a results file.")],
    per: options.PerRow = options.Per.type,
    json: options.Json = False,
) -> None:
    """What is in this checkpoint, adapter or results file? Reads headers only, or shows the table again.

    Example: loradiag inspect results.jsonl --per layer
    """
    from lora_diag.results import is_results_file, lines_of, read_results

    if is_results_file(path):
        from lora_diag.reports.tables import table

        results = read_results(path)
        for text in lines_of(results.records()) if json else ():
            line(text)
        if not json:
            result(table(results, *terminal(), per=per))
        return

    from lora_diag.api.inspect import inspect as look
    from lora_diag.reports.inventory import inventory_table

    inventory = look(path)
    if json:
        line(inventory.model_dump_json())
    else:
        result(inventory_table(inventory, *terminal()))
