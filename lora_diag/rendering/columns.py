"""Tables that fit a terminal: what there is no room for goes, the names of the rows last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lora_diag.records.names import module_type_of, place_of
from lora_diag.rendering.text import crop, short

# From this many columns of the terminal on, the wide table is shown.
WIDE = 120

# The length of a name that columns have to make room for, in the narrow and in the wide table.
_NAME, _WIDE_NAME = 12, 32


class OfLayer(Protocol):
    """What is known of one layer."""

    @property
    def layer(self) -> str:
        """The weight's name in BASE."""
        ...


R = TypeVar("R", bound=OfLayer)


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its title, its cells from the first row to the last, and their side."""

    title: str
    cells: tuple[str | Text, ...]
    justify: Literal["left", "right"] = "right"

    @property
    def width(self) -> int:
        """Characters of its longest cell or its title."""
        return max(len(self.title), *map(len, self.cells), 0)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table before it is shown anywhere.

    Args:
        caption: What it is of; empty where that needs no words.
        title: Of the column of names.
        names: One a row.
        columns: The others.
        spared: Ends of the titles of columns that a narrow terminal may leave out, the first to go first.
        about: What one reads from it, for a page; a terminal's summary says that.
    """

    caption: str
    title: str
    names: tuple[str, ...]
    columns: tuple[Column, ...]
    spared: tuple[str, ...] = ()
    about: str = ""

    def shown(self, width: int) -> list[RenderableType]:
        """Return what a terminal of so many characters shows."""
        table = table_of(self.title, self.names, self.columns, width, self.spared)
        return [*([Text(self.caption, style="bold")] if self.caption else []), table]

    def rows(self) -> list[tuple[str, list[str]]]:
        """Return the name and the cells of each row."""
        cells = zip(*(column.cells for column in self.columns), strict=True)
        return [(name, [str(cell) for cell in row]) for name, row in zip(self.names, cells, strict=True)]


def rows_of(records: Iterable[R], per: str) -> list[tuple[str, tuple[R, ...]]]:
    """Return the rows of a table: a name as it is shown, and its records in the order of the file.

    Args:
        records: Records of layers.
        per: ``layer`` for one row a layer; ``type`` for one row a module type, attention before MLP before vocabulary
            tables.
    """
    groups: dict[str, list[R]] = {}
    for record in records:
        groups.setdefault(module_type_of(record.layer) if per == "type" else record.layer, []).append(record)
    found = [(short(name), tuple(group)) for name, group in groups.items()]
    return sorted(found, key=lambda row: place_of(row[1][0].layer)) if per == "type" else found


def title_of(per: str) -> str:
    """Return what the column of names is called."""
    return "module type" if per == "type" else "layer"


def table_of(
    title: str, names: Sequence[str], columns: Sequence[Column], width: int, spared: Sequence[str] = ()
) -> Table:
    """Return a table of named rows.

    Args:
        title: Of the column of names.
        names: One a row; cut at their beginning where there is no room.
        columns: The others.
        width: Characters of the terminal.
        spared: Ends of the titles of columns that may be left out, the first to go first.
    """
    longest = max(len(title), *map(len, names), 0)
    fitting = _fitting(columns, width, min(longest, _WIDE_NAME if width >= WIDE else _NAME), spared)
    room = min(longest, _room(fitting, width))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, header_style="bold")
    table.add_column(title, no_wrap=True, width=room)
    for column in fitting:
        table.add_column(column.title, justify=column.justify, no_wrap=True, width=column.width)
    for name, *cells in zip(names, *(column.cells for column in fitting), strict=True):
        table.add_row(crop(name, room), *cells)
    return table


def _room(columns: Sequence[Column], width: int) -> int:
    """Return what a terminal's width leaves to the names: a blank before each column and at both edges."""
    return max(1, width - sum(column.width + 1 for column in columns) - 2)


def _fitting(columns: Sequence[Column], width: int, name: int, spared: Sequence[str]) -> list[Column]:
    """Leave out as many columns as it takes for names to keep ``name`` characters."""
    fitting = list(columns)
    for title in spared:
        if _room(fitting, width) >= name:
            break
        fitting = [column for column in fitting if not column.title.endswith(title)]
    return fitting
