"""The table of any records of layers, from what they declare; with it a feature needs no table of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group

from lora_diag.records import LayerRecord, Results
from lora_diag.records.shown import Shown, Value, pooled_value
from lora_diag.rendering.columns import Column, Grid, captioned_once, rows_of, title_of
from lora_diag.rendering.statements import Statement, summary_of
from lora_diag.rendering.text import fraction, number, safe, to_text


def record_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return a table for each kind of record that declares columns: the main ones of these.

    Args:
        results: What was measured.
        per: ``type`` for one row a module type, ``layer`` for one row a layer.
    """
    kinds = dict.fromkeys(type(record) for record in results if isinstance(record, LayerRecord))
    found = []
    for kind in kinds:
        records = [record for record in results if type(record) is kind]
        shown = [one for one in kind.shown_of(results.run.settings, records) if one.main]
        if not shown:
            continue
        rows = rows_of(records, per)
        columns = [Column("n", tuple(str(len(group)) for _, group in rows))] if per == "type" else []
        columns += [_column(one, [group for _, group in rows]) for one in shown]
        dropped = sorted((one for one in shown if one.drop), key=lambda one: -one.drop)
        spared = (*(one.title for one in dropped), "n")
        found.append(Grid("", title_of(per), tuple(name for name, _ in rows), tuple(columns), spared))
    return found


def grids_table(
    grids: Sequence[Grid],
    statements: Sequence[Statement],
    width: int = 80,
    color: bool = False,
    then: str | None = None,
) -> str:
    """Return tables, and a summary below.

    Args:
        grids: The tables.
        statements: The summary.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        then: The command that a user would run next.
    """
    tables = [part for grid in grids for part in grid.shown(width)]
    return to_text(Group(*captioned_once(tables), summary_of(statements, then)), width, color)


def record_table(
    results: Results[Any],
    statements: Sequence[Statement],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    then: str | None = None,
) -> str:
    """Return the tables of the records, and a summary below.

    Args:
        results: What was measured.
        statements: The summary.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: ``type`` for one row a module type, ``layer`` for one row a layer.
        then: The command that a user would run next.
    """
    return grids_table(record_grids(results, per), statements, width, color, then)


def _column(shown: Shown, groups: Sequence[Sequence[Any]]) -> Column:
    values = [pooled_value(shown, group) for group in groups]
    words = any(isinstance(value, str) for value in values)
    return Column(shown.title, tuple(_cell(shown, value) for value in values), "left" if words else "right")


def _cell(shown: Shown, value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return safe(value)
    return fraction(value) if shown.share else number(value)
