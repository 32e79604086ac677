"""The terminal's answer to ``inspect`` on a checkpoint or an adapter."""

from __future__ import annotations

import math
from collections import Counter

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_diag.records.inventory import Inventory, StoredTensor
from lora_diag.records.names import module_type_of
from lora_diag.rendering.columns import shortened
from lora_diag.rendering.text import count, safe, to_text


def inventory_table(inventory: Inventory, width: int = 80, color: bool = False) -> str:
    """Return what a checkpoint holds, or what an adapter changes: one row per module type, shape and dtype.

    Args:
        inventory: What was found.
        width: Columns of the terminal.
        color: Whether to use ANSI styles.

    Returns:
        Lines of text, without a newline at the end.
    """
    table = _adapted(inventory, width) if inventory.adapts else _stored(inventory, width)
    return to_text(Group(Text(_headline(inventory)), table), width, color)


def _columns(width: int, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("module type", no_wrap=True)
    for name in columns:
        words = name in {"dtype", "spectrum", "form"}
        table.add_column(name, justify="left" if words else "right", no_wrap=name not in {"spectrum", "form"})
    return table


def _adapted(inventory: Inventory, width: int) -> Table:
    """Return one row per module type, shape, rank and scaling of what an adapter changes."""
    groups: Counter[tuple[str, str, str, str, str]] = Counter()
    for weight in inventory.adapts:
        shape = "×".join("?" if size is None else str(size) for size in weight.shape)
        rank = "" if weight.rank is None else str(weight.rank)
        scaling = "" if weight.scaling is None else f"{weight.scaling:.4g}"
        form: str = "new value" if weight.form == "value" else weight.form
        form += f", needs BASE ({weight.needs_base})" if weight.needs_base else ""
        groups[module_type_of(weight.layer), shape, rank, scaling, form] += 1
    table = _columns(width, "n", "shape", "rank", "scaling", "form")
    names = shortened([safe(name) for name, *_ in groups], width // 2)
    for name, ((_, *cells), number) in zip(names, groups.items(), strict=True):
        table.add_row(name, str(number), *cells)
    return table


def _stored(inventory: Inventory, width: int) -> Table:
    """Return one row per module type, shape and dtype of the stored tensors."""
    groups: dict[tuple[str, tuple[int, ...], str, str], list[StoredTensor]] = {}
    for tensor in inventory.tensors:
        key = (module_type_of(tensor.layer), tensor.shape, tensor.dtype, tensor.left_out or "")
        groups.setdefault(key, []).append(tensor)
    table = _columns(width, "n", "shape", "dtype", "entries", "spectrum")
    names = shortened([safe(name) for name, *_ in groups], width // 2)
    for name, ((_, shape, dtype, left_out), tensors) in zip(names, groups.items(), strict=True):
        shown = "×".join(map(str, shape)) or "scalar"
        entries = count(len(tensors) * math.prod(shape))
        table.add_row(name, str(len(tensors)), shown, dtype, entries, f"no: {left_out}" if left_out else "yes")
    return table


def _headline(inventory: Inventory) -> str:
    entries: Counter[str] = Counter()
    for tensor in inventory.tensors:
        entries[tensor.dtype] += math.prod(tensor.shape)
    dtypes = ", ".join(f"{count(number)} {dtype}" for dtype, number in entries.most_common())
    notes = "".join(f"\nNote: {safe(note)}" for note in inventory.notes)
    head = f"{safe(inventory.path)}: {safe(inventory.kind)}, {len(inventory.tensors)} tensors, {dtypes}"
    return head + (f"\nScaling: {safe(inventory.scaling)}" if inventory.scaling else "") + notes
