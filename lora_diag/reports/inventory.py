"""The terminal's answer to ``inspect`` on a checkpoint."""

from __future__ import annotations

import math
from collections import Counter

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_diag.reports.text import count, safe, to_text
from lora_diag.results import Inventory, StoredTensor
from lora_diag.results.names import module_type_of


def inventory_table(inventory: Inventory, width: int = 80, color: bool = False) -> str:
    """Return what a checkpoint holds: one row per module type, shape and dtype, then the totals.

    Args:
        inventory: What was found.
        width: Columns of the terminal.
        color: Whether to use ANSI styles.

    Returns:
        Lines of text, without a newline at the end.
    """
    groups: dict[tuple[str, tuple[int, ...], str, str], list[StoredTensor]] = {}
    for tensor in inventory.tensors:
        key = (module_type_of(tensor.layer), tensor.shape, tensor.dtype, tensor.left_out or "")
        groups.setdefault(key, []).append(tensor)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("module type", overflow="ellipsis", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("entries", justify="right", no_wrap=True)
    table.add_column("spectrum")
    for (name, shape, dtype, left_out), tensors in groups.items():
        shown = "×".join(map(str, shape)) or "scalar"
        entries = count(len(tensors) * math.prod(shape))
        table.add_row(safe(name), str(len(tensors)), shown, dtype, entries, f"no: {left_out}" if left_out else "yes")
    return to_text(Group(Text(_headline(inventory)), table), width, color)


def _headline(inventory: Inventory) -> str:
    entries: Counter[str] = Counter()
    for tensor in inventory.tensors:
        entries[tensor.dtype] += math.prod(tensor.shape)
    dtypes = ", ".join(f"{count(number)} {dtype}" for dtype, number in entries.most_common())
    notes = "".join(f"\nNote: {safe(note)}" for note in inventory.notes)
    head = f"{safe(inventory.path)}: {inventory.kind}, {len(inventory.tensors)} tensors, {dtypes}"
    return head + notes
