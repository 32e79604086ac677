"""Tables of any results: ``inspect`` shows them as the command that measured them did."""

from __future__ import annotations

from typing import Any

from lora_diag.catalog import feature_of
from lora_diag.errors import InputError
from lora_diag.records import Results
from lora_diag.rendering.tables import grids_table


def table(
    results: Results[Any], width: int = 80, color: bool = False, per: str = "type", next_command: str | None = None
) -> str:
    """Return the table and the summary of results of any command.

    Args:
        results: The results.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: ``type`` for one row per module type, ``layer`` for one row per layer.
        next_command: The suggested next command, printed last.

    Raises:
        InputError: The results come from a command that is unknown to this version.
    """
    feature = feature_of(results.run.command)
    if feature is not None and feature.table:
        shown: str = feature.load(feature.table)(results, width, color, per=per, next_command=next_command)
        return shown
    if feature is not None and feature.statements:
        statements = feature.load(feature.statements)(results)
        return grids_table(feature.tables(results, per), statements, width, color, next_command)
    raise InputError(
        f"results of loradiag {results.run.command}: this version has no table for them; update loradiag, or install "
        "the package that adds the command"
    )
