"""Tables of records, derived from their declared columns, so that a feature needs no table of its
own.

In a narrow terminal, columns are dropped first, then row names are shortened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, TypeVar

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_diag.records import LayerRecord, Results
from lora_diag.records.base import Shown, pooled_value, value_at
from lora_diag.records.names import module_type_of, type_order
from lora_diag.rendering.statements import Statement, is_verbose, summary_of
from lora_diag.rendering.text import (
    HasLayer,
    crop,
    ends,
    plus_minus,
    safe,
    safe_lines,
    short,
    to_text,
    written,
)

# Terminal width from which tables show longer names and more details.
WIDE = 120

# Length of a name that columns must leave room for, in the narrow and in the wide table.
_NAME, _WIDE_NAME = 12, 32


R = TypeVar("R", bound=HasLayer)


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Args:
        title: Its heading.
        cells: Cells from the first row to the last. Unprintable characters are escaped; only a
            ``Text`` has line ends.
        justify: Alignment of the cells.
        drop: Priority of dropping in a narrow terminal: the largest value first, of equal ones the
            last column; 0 for never.
        detail: Whether it is shown only with ``-v``.
    """

    title: str
    cells: tuple[str | Text, ...]
    justify: Literal["left", "right"] = "right"
    drop: int = 0
    detail: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", safe(self.title))
        object.__setattr__(self, "cells", tuple(map(_make_printable, self.cells)))

    @property
    def width(self) -> int:
        """Width of its longest line or its title."""
        lines = (line for cell in self.cells for line in str(cell).split("\n"))
        return max(len(self.title), *map(len, lines), 0)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table, independent of the output format.

    Args:
        caption: Caption; may be empty. In all texts, unprintable characters are escaped.
        title: Title of the column of names.
        names: One per row.
        columns: The others.
        about: Explanation for pages; a terminal has a summary instead.
        most: Number of first rows that a terminal shows, dropping columns before it shortens a
            name; None for all.
        detail: Whether a terminal shows it only with ``-v``.
    """

    caption: str
    title: str
    names: tuple[str, ...]
    columns: tuple[Column, ...]
    about: str = ""
    most: int | None = None
    detail: bool = False

    def __post_init__(self) -> None:
        for name in ("caption", "title", "about"):
            object.__setattr__(self, name, safe(getattr(self, name)))
        object.__setattr__(self, "names", tuple(map(safe, self.names)))

    def render(self, width: int) -> list[RenderableType]:
        """Return caption, table and number of other rows for a terminal of a given width; details
        only with ``-v``.
        """
        if self.detail and not is_verbose():
            return []
        names = self.names[: self.most]
        columns = [replace(column, cells=column.cells[: self.most]) for column in self.columns]
        longest = max(map(len, names), default=0)
        table = table_of(self.title, names, columns, width, longest if self.most else None)
        parts: list[RenderableType] = [table]
        if self.caption:
            parts.insert(0, Text(self.caption, style="bold"))
        hidden = len(self.names) - len(names)
        if hidden:
            parts.append(Text(f"and {hidden} more"))
        return parts

    def rows(self) -> list[tuple[str, list[str]]]:
        """Return the name and the cells of each row."""
        rows = zip(self.names, *(column.cells for column in self.columns), strict=True)
        return [(name, list(map(str, cells))) for name, *cells in rows]


def rows_of(records: Iterable[R], per: str) -> list[tuple[str, tuple[R, ...]]]:
    """Return the rows of a table: names, each with its records in the order of the file.

    Args:
        records: Records of layers.
        per: ``layer`` for one row a layer; ``type`` for one row per module type, attention before
            MLP before vocabulary tables.
    """
    groups: dict[str, list[R]] = {}
    for record in records:
        name = module_type_of(record.layer) if per == "type" else record.layer
        groups.setdefault(name, []).append(record)
    rows = [(short(name), tuple(group)) for name, group in groups.items()]
    return sorted(rows, key=lambda row: type_order(row[1][0].layer)) if per == "type" else rows


def title_of(per: str) -> str:
    """Return the title of the column of names: of module types, or unchanged."""
    return "module type" if per == "type" else per


def table_of(
    title: str, names: Sequence[str], columns: Sequence[Column], width: int, keep: int | None = None
) -> Table:
    """Return a table of named rows; the caption names the columns that do not fit.

    Args:
        title: Title of the column of names.
        names: One per row; shortened to fit, but kept distinct.
        columns: The others.
        width: Width of the terminal.
        keep: Characters of a name that columns must leave room for; default 12, in a wide terminal
            32.
    """
    longest = max(len(title), *map(len, names), 0)
    at_most = [column for column in columns if is_verbose() or not column.detail]
    keep = keep or (_WIDE_NAME if width >= WIDE else _NAME)
    fitting = _drop_columns(at_most, width, min(longest, keep))
    room = min(longest, _room_for_names(fitting, width))
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=0, header_style="bold", caption_justify="left"
    )
    hidden = [column.title for column in at_most if column not in fitting]
    if hidden:
        table.caption = f"not shown at {width} columns: {', '.join(hidden)}\n"
    table.add_column(title, no_wrap=True, width=room)
    for column in fitting:
        table.add_column(column.title, justify=column.justify, no_wrap=True, width=column.width)
    shortened = shorten_names(names, room)
    for row in zip(shortened, *(column.cells for column in fitting), strict=True):
        table.add_row(*row)
    return table


def drop_repeated_captions(parts: Sequence[RenderableType]) -> Sequence[RenderableType]:
    """Remove a caption from all but the last of the tables that have it, in place, and return the
    parts.
    """
    last = {part.caption: part for part in parts if isinstance(part, Table)}
    for part in parts:
        if isinstance(part, Table) and last[part.caption] is not part:
            part.caption = None
    return parts


def shorten_names(names: Sequence[str], width: int) -> list[str]:
    """Return names shortened to a width: at the beginning, and also after the differing part if two
    would be equal.

    Names that differ stay different, if need be by a number at the end.

    >>> shorten_names(
    ...     ["layer.0.attention.output.dense", "layer.1.attention.output.dense", "pooler.dense"], 16
    ... )
    ['…0.…output.dense', '…1.…output.dense', 'pooler.dense']
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(crop(name, width), []).append(name)
    shortened_names = {name: short_name for short_name, (name, *_) in groups.items()}
    used = {short_name for short_name, group in groups.items() if len(group) == 1}
    for group in groups.values():
        if len(group) > 1:
            cuts = _disambiguate(group, width, used)
            shortened_names |= dict(zip(group, cuts, strict=True))
            used |= set(cuts)
    return [shortened_names[name] for name in names]


def _disambiguate(names: Sequence[str], width: int, used: Set[str]) -> list[str]:
    """Shorten names with equal endings: keep the first parts in which they differ, and the end.

    Without room for these, the names end in a number.
    """
    differ = next(
        (i for i, chars in enumerate(zip(*names, strict=False)) if len(set(chars)) > 1), 0
    )
    start = names[0].rfind(".", 0, differ) + 1
    lead = "…" if start else ""
    room = width - len(lead) - 1

    def cut(head: str, name: str) -> str:
        return f"{lead}{head}…{name[len(name) - room + len(head) :]}"

    tails = [name[start:] for name in names]
    head_parts = [[".".join([*tail.split(".")[:n], ""]) for tail in tails] for n in range(1, 4)]
    head_characters = [[tail[:n] for tail in tails] for n in range(1, room)]
    for heads in (*head_parts, *head_characters):
        result = [cut(head, name) for head, name in zip(heads, names, strict=True)]
        is_distinct = len(set(result)) == len(names) and used.isdisjoint(result)
        if is_distinct and max(map(len, heads)) < room:
            return result
    # No room for the differing part: use a number.
    return [
        crop(name, max(1, width - len(f"#{i}"))) + f"#{i}"
        for i, name in enumerate(names, len(used) + 1)
    ]


def _room_for_names(columns: Sequence[Column], width: int) -> int:
    """Return the width left for names: each column takes a blank, and both edges one."""
    return max(1, width - sum(column.width + 1 for column in columns) - 2)


def _drop_columns(columns: Sequence[Column], width: int, name_width: int) -> list[Column]:
    """Return the columns, less those dropped so that names keep ``name_width`` characters, as far
    as columns may be.
    """
    fitting = list(columns)
    order = sorted(enumerate(columns), key=lambda item: (-item[1].drop, -item[0]))
    for _, dropped in order:
        if dropped.drop and _room_for_names(fitting, width) < name_width:
            fitting = [column for column in fitting if column is not dropped]
    return fitting


Rows = Sequence[tuple[str, Sequence[Any]]]


def columns_of(shown: Iterable[Shown], rows: Rows) -> list[Column]:
    """Return the columns for a terminal, without empty ones that are not main.

    Args:
        shown: Columns as declared by the records.
        rows: Rows with name and records.
    """
    groups = [group for _, group in rows]
    columns = []
    for field in shown:
        if not field.in_terminal:
            continue
        column = _make_column(field, groups)
        if field.main or any(str(cell) != "-" for cell in column.cells):
            columns.append(column)
    return columns


def record_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return a table for each kind of record that declares columns, for a terminal.

    Args:
        results: The results.
        per: ``type`` for one row per module type, ``layer`` for one row per layer.
    """
    by_kind: dict[type[LayerRecord], list[Any]] = {}
    for record in results:
        if isinstance(record, LayerRecord):
            by_kind.setdefault(type(record), []).append(record)
    grids = []
    for kind, records in by_kind.items():
        shown = kind.shown_of(results.run.settings, records)
        if any(field.in_terminal for field in shown):
            grids.append(grid_of(shown, rows_of(records, per), per))
    return grids


def grid_of(
    shown: Iterable[Shown],
    rows: Rows,
    per: str,
    caption: str = "",
    about: str = "",
    extra: Sequence[Column] = (),
) -> Grid:
    """Return the table of named rows: how many records each has where it is a module type, and the
    declared columns.

    Args:
        shown: Columns as declared by the records.
        rows: Rows with name and records.
        per: Content of a row: ``type``, ``layer``, or the title of the column of names.
        caption: Subject of the table; empty where that needs no words.
        about: What one reads from it.
        extra: Columns after the declared ones.
    """
    columns = [*columns_of(shown, rows), *extra]
    if per == "type":
        sizes = tuple(str(len(group)) for _, group in rows)
        columns.insert(0, Column("n", sizes, drop=1))
    return Grid(caption, title_of(per), tuple(name for name, _ in rows), tuple(columns), about)


def grids_table(
    grids: Sequence[Grid],
    statements: Sequence[Statement],
    width: int = 80,
    color: bool = False,
    next_command: str | None = None,
) -> str:
    """Return tables as text, with a summary below.

    Args:
        grids: The tables.
        statements: The summary.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        next_command: The suggested next command, printed last; None without one.
    """
    tables = [part for grid in grids for part in grid.render(width)]
    summary = summary_of(statements, next_command)
    return to_text(Group(*drop_repeated_captions(tables), summary), width, color)


def _make_printable(cell: str | Text) -> str | Text:
    """Return a cell with its unprintable characters escaped."""
    if isinstance(cell, str):
        return safe(cell)
    return Text(safe_lines(cell.plain), style=cell.style)


def _make_column(shown: Shown, groups: Sequence[Sequence[Any]]) -> Column:
    values = [value_at(record, shown.path) for group in groups for record in group]
    is_text = any(isinstance(value, str) for value in values)
    cells = tuple(_make_cell(shown, group) for group in groups)
    justify: Literal["left", "right"] = "left" if is_text else "right"
    return Column(shown.head or shown.title, cells, justify, shown.drop, shown.detail)


def _make_cell(shown: Shown, group: Sequence[Any]) -> str | Text:
    """Return the cell of several records, with error, random baseline and mark."""
    if shown.pool == "ends":
        values: list[Any] = []
        for record in group:
            values += value_at(record, shown.path) or ()
        return ends(values, shown.form)
    value = pooled_value(shown, group)
    if value is None:
        return "-"
    text = safe(value) if isinstance(value, str) else written(value, shown.form, shown.share)
    known = [record for record in group if shown.value(record) is not None]
    error = _median_value(known, shown.error)
    if error is not None:
        text += plus_minus(error)
    chance = _median_value(known, shown.chance)
    if chance is not None:
        text += f" ({written(chance, shown.form, shown.share)})"
    if shown.mark:
        text += shown.mark(group)
    return Text(text, style=shown.style(value)) if shown.style else text


def _median_value(records: Sequence[Any], path: str) -> float | None:
    """Return the median of the known values of a field; None without any or without a path."""
    if not path:
        return None
    values = [value_at(record, path) for record in records]
    known = [value for value in values if value is not None]
    return median(known) if known else None
