"""The table of any records of layers, derived from their declarations, so that a feature needs no table of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from rich.console import Group
from rich.text import Text

from lora_diag.records import LayerRecord, Results
from lora_diag.records.shown import Shown, pooled_value, value_at
from lora_diag.rendering.columns import Column, Grid, drop_repeated_captions, rows_of, title_of
from lora_diag.rendering.statements import Statement, summary_of
from lora_diag.rendering.text import ends, plus_minus, safe, to_text, written

Rows = Sequence[tuple[str, Sequence[Any]]]


def columns_of(shown: Iterable[Shown], rows: Rows) -> list[Column]:
    """Return the columns for a terminal, without empty ones that are not main.

    Args:
        shown: Columns as declared by the records.
        rows: Rows with name and records.
    """
    groups = [group for _, group in rows]
    columns = ((field.main, _make_column(field, groups)) for field in shown if field.in_terminal)
    return [column for main, column in columns if main or any(str(cell) != "-" for cell in column.cells)]


def record_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return a table for each kind of record that declares columns, for a terminal.

    Args:
        results: The results.
        per: ``type`` for one row per module type, ``layer`` for one row per layer.
    """
    kinds = dict.fromkeys(type(record) for record in results if isinstance(record, LayerRecord))
    grids = []
    for kind in kinds:
        records = [record for record in results if type(record) is kind]
        shown = kind.shown_of(results.run.settings, records)
        if any(field.in_terminal for field in shown):
            grids.append(grid_of(shown, rows_of(records, per), per))
    return grids


def grid_of(
    shown: Iterable[Shown], rows: Rows, per: str, caption: str = "", about: str = "", extra: Sequence[Column] = ()
) -> Grid:
    """Return the table of named rows: how many records each has where it is a module type, and the declared columns.

    Args:
        shown: Columns as declared by the records.
        rows: Rows with name and records.
        per: Content of a row: ``type``, ``layer``, or the title of the column of names.
        caption: Subject of the table; empty where that needs no words.
        about: What one reads from it.
        extra: Columns after the declared ones.
    """
    sizes = [Column("n", tuple(str(len(group)) for _, group in rows), drop=1)] if per == "type" else []
    columns = (*sizes, *columns_of(shown, rows), *extra)
    return Grid(caption, title_of(per), tuple(name for name, _ in rows), columns, about)


def grids_table(
    grids: Sequence[Grid],
    statements: Sequence[Statement],
    width: int = 80,
    color: bool = False,
    next_command: str | None = None,
) -> str:
    """Return tables with a summary below.

    Args:
        grids: The tables.
        statements: The summary.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        next_command: The suggested next command, printed last.
    """
    tables = [part for grid in grids for part in grid.shown(width)]
    return to_text(Group(*drop_repeated_captions(tables), summary_of(statements, next_command)), width, color)


def _make_column(shown: Shown, groups: Sequence[Sequence[Any]]) -> Column:
    words = any(isinstance(value_at(record, shown.path), str) for group in groups for record in group)
    cells = tuple(_make_cell(shown, group) for group in groups)
    return Column(shown.head or shown.title, cells, "left" if words else "right", shown.drop, shown.wide)


def _make_cell(shown: Shown, group: Sequence[Any]) -> str | Text:
    """Return the cell of several records, with error, random baseline and mark."""
    if shown.pool == "ends":
        return ends([item for record in group for item in value_at(record, shown.path) or ()], shown.form)
    value = pooled_value(shown, group)
    if value is None:
        return "-"
    text = safe(value) if isinstance(value, str) else written(value, shown.form, shown.share)
    known = [record for record in group if shown.value(record) is not None]
    if shown.error and (error := _median_value(known, shown.error)) is not None:
        text += plus_minus(error)
    if shown.chance and (chance := _median_value(known, shown.chance)) is not None:
        text += f" ({written(chance, shown.form, shown.share)})"
    text += shown.mark(group) if shown.mark else ""
    return Text(text, style=shown.style(value)) if shown.style else text


def _median_value(records: Sequence[Any], path: str) -> float | None:
    values = [value for record in records if (value := value_at(record, path)) is not None]
    return median(values) if values else None
