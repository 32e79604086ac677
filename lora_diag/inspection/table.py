"""The table of ``inspect`` for a checkpoint or an adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from lora_diag.records.inventory import AdaptedWeight, Inventory, StoredTensor
from lora_diag.records.names import module_type_of
from lora_diag.records.shown import Shown, value_at
from lora_diag.rendering.columns import Grid
from lora_diag.rendering.tables import grid_of
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
    """Return one row for each module type and all that its records differ in."""
    groups: dict[tuple[Any, ...], list[StoredTensor | AdaptedWeight]] = {}
    for record in records:
        key = (module_type_of(record.layer), *(str(value_at(record, field.path)) for field in shown))
        groups.setdefault(key, []).append(record)
    return grid_of(shown, [(safe(name), group) for (name, *_), group in groups.items()], "type")


def _make_headline(inventory: Inventory) -> str:
    entries: Counter[str] = Counter()
    for tensor in inventory.tensors:
        entries[tensor.dtype] += math.prod(tensor.shape)
    dtypes = ", ".join(f"{count(number)} {dtype}" for dtype, number in entries.most_common())
    notes = "".join(f"\nNote: {safe(note)}" for note in inventory.notes)
    head = f"{safe(inventory.path)}: {safe(inventory.kind)}, {len(inventory.tensors)} tensors, {dtypes}"
    return head + (f"\nScaling: {safe(inventory.scaling)}" if inventory.scaling else "") + notes
