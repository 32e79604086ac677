"""Tables of ``inspect``: a checkpoint or an adapter, and results of any command for terminals and notebooks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from rich.console import Group
from rich.text import Text

from lora_diag.catalog import feature_of
from lora_diag.errors import InputError
from lora_diag.records import Results
from lora_diag.records.base import Shown, value_at
from lora_diag.records.names import module_type_of
from lora_diag.records.run import AdaptedWeight, Inventory, StoredTensor
from lora_diag.rendering.html import grid_html, statement_html
from lora_diag.rendering.statements import Statement
from lora_diag.rendering.tables import Grid, grid_of, grids_table
from lora_diag.rendering.text import count, safe, to_text


def inventory_table(inventory: Inventory, width: int = 80, color: bool = False) -> str:
    """Return the table of a checkpoint or an adapter: one row per module type, shape and dtype.

    Args:
        inventory: The contents of the checkpoint or adapter.
        width: Columns of the terminal.
        color: Whether to use ANSI styles.

    Returns:
        Lines of text, without a trailing newline.
    """
    grid = (
        _make_grid(AdaptedWeight.shown, inventory.adapts)
        if inventory.adapts
        else _make_grid(StoredTensor.shown, inventory.tensors)
    )
    return to_text(Group(Text(_make_headline(inventory)), *grid.shown(width)), width, color)


def _make_grid(shown: Sequence[Shown], records: Sequence[StoredTensor | AdaptedWeight]) -> Grid:
    """Return a table with a row for each module type and each combination of its records' values."""
    groups: dict[tuple[Any, ...], list[StoredTensor | AdaptedWeight]] = {}
    for record in records:
        key = (module_type_of(record.layer), *(str(value_at(record, field.path)) for field in shown))
        groups.setdefault(key, []).append(record)
    return grid_of(shown, [(safe(name), group) for (name, *_), group in groups.items()], "type")


def _make_headline(inventory: Inventory) -> str:
    """Return path, kind and numbers of entries by dtype; scaling and notes on lines of their own."""
    entries_by_dtype: Counter[str] = Counter()
    for tensor in inventory.tensors:
        entries_by_dtype[tensor.dtype] += math.prod(tensor.shape)
    dtypes = ", ".join(f"{count(entry_count)} {dtype}" for dtype, entry_count in entries_by_dtype.most_common())
    notes = "".join(f"\nNote: {safe(note)}" for note in inventory.notes)
    headline = f"{safe(inventory.path)}: {safe(inventory.kind)}, {len(inventory.tensors)} tensors, {dtypes}"
    return headline + (f"\nScaling: {safe(inventory.scaling)}" if inventory.scaling else "") + notes


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
        text: str = feature.load(feature.table)(results, width, color, per=per, next_command=next_command)
        return text
    if feature is not None and feature.statements:
        statements = feature.load(feature.statements)(results)
        return grids_table(feature.tables(results, per), statements, width, color, next_command)
    raise InputError(
        f"results of loradiag {results.run.command}: this version has no table for them; update loradiag, or install "
        "the package that adds the command"
    )


# Columns of the preformatted text in a notebook, of a command without a section of a report.
_WIDTH = 100


def html_of(results: Results[Any]) -> str:
    """Return tables and summary of results as HTML for a notebook; preformatted text if the command has no section.

    Names are escaped, and nothing is loaded from elsewhere.
    """
    feature = feature_of(results.run.command)
    if feature is None or not feature.statements or (feature.table and not feature.section):
        text = feature.load(feature.table)(results, _WIDTH) if feature and feature.table else repr(results)
        return f"<pre>{escape(text)}</pre>"
    tables = "".join(grid_html(grid) for grid in feature.tables(results, "type"))
    statements: list[Statement] = feature.load(feature.statements)(results)
    ordered = sorted(statements, key=lambda statement: statement.key != "unfinished")
    return f"<div>{tables}<table><tbody>{''.join(map(statement_html, ordered))}</tbody></table></div>"
