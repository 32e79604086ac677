"""``inspect``: show a results file, or list the contents of a checkpoint or an adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from lora_diag.adapters import Adapter, Input, locate, open_input
from lora_diag.adapters.source import StatedAlpha, get_stated_alpha
from lora_diag.catalog import read_results
from lora_diag.deltas import natural_order, why_left_out
from lora_diag.errors import InputError
from lora_diag.records import Results
from lora_diag.records.base import Shown, value_at
from lora_diag.records.names import module_type_of
from lora_diag.records.run import AdaptedWeight, Inventory, ListedTensor
from lora_diag.rendering.tables import Grid, grid_of
from lora_diag.rendering.text import count, safe, to_text
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import MOMENTS
from lora_diag.storage import Checkpoint


def inspect(
    path: Path | str, *, alpha: float | None = None, alpha_is_rank: bool = False
) -> Inventory:
    """Describe a checkpoint or an adapter by its headers.

    No weights are read, except those factors of an adapter that are initialized to zero, to check
    whether they still are.

    Args:
        path: A file, a folder, or a shard index; or a Hub id or an address of one.
        alpha: α of an adapter whose files give none: s = α/r.
        alpha_is_rank: Assume α = r, so s = 1, if an adapter's files give no α.

    Returns:
        The record: the tensors in natural order of their names; for an adapter, also the weights it
            changes.

    Raises:
        InputError: The path cannot be read, or is a results file, which ``read_results`` reads.
        UsageError: ``alpha`` is invalid, or contradicts ``alpha_is_rank``.

    Example:
        >>> inspect("sample_checkpoints/base").kind
        'sharded safetensors, 3 files'
    """
    source = locate(path)
    if source.kind == "results":
        raise InputError(f"{source.path}: is a results file; read it with lora_diag.read_results")
    return _inspect(source, get_stated_alpha({"alpha": alpha, "alpha_is_rank": alpha_is_rank}))


def _inspect(source: Input, stated_alpha: StatedAlpha) -> Inventory:
    """Return the contents of a checkpoint or an adapter; see ``inspect``."""
    opened = open_input(source, stated_alpha)
    notes = list(opened.notes)
    adapted: dict[str, Any] = {}
    if isinstance(opened, Adapter):
        notes += opened.warnings()
        checkpoint = opened.checkpoint
        adapted = {"adapts": opened.weights(), "scaling": legible(opened.reading.scaling)}
    else:
        checkpoint = opened
        if any(file.metadata.get("kind") == MOMENTS for file in opened.files):
            notes.append(f"contains {MOMENTS}, not a checkpoint; pass it with --activations")
    return Inventory(
        path=legible(opened.path),
        kind=legible(opened.kind),
        notes=tuple(map(legible, notes)),
        tensors=_list_tensors(checkpoint),
        **adapted,
    )


def _list_tensors(checkpoint: Checkpoint) -> tuple[ListedTensor, ...]:
    """Return the descriptions of all tensors, in natural order of their names."""
    tensors = []
    for name in sorted(checkpoint, key=natural_order):
        info = checkpoint[name]
        left_out = why_left_out(info)
        tensor = ListedTensor(layer=name, shape=info.shape, dtype=info.dtype, left_out=left_out)
        tensors.append(tensor)
    return tuple(tensors)


def inspect_any(
    path: str, *, alpha: float | None = None, alpha_is_rank: bool = False
) -> Inventory | Results[Any]:
    """Return the records of a results file, or the contents of a checkpoint or an adapter."""
    source = locate(path)
    if source.kind == "results":
        return read_results(source.path)
    return _inspect(source, get_stated_alpha({"alpha": alpha, "alpha_is_rank": alpha_is_rank}))


def inventory_table(inventory: Inventory, width: int = 80, color: bool = False) -> str:
    """Return a headline, and the table of the tensors or of an adapter's weights, by module type
    and equal values.

    Args:
        inventory: The contents of the checkpoint or adapter.
        width: Columns of the terminal.
        color: Whether to use ANSI styles.

    Returns:
        Lines of text, without a trailing newline.
    """
    if inventory.adapts:
        grid = _make_grid(AdaptedWeight.shown, inventory.adapts)
    else:
        grid = _make_grid(ListedTensor.shown, inventory.tensors)
    return to_text(Group(Text(_make_headline(inventory)), *grid.render(width)), width, color)


def _make_grid(shown: Sequence[Shown], records: Sequence[ListedTensor | AdaptedWeight]) -> Grid:
    """Return a table with a row for each module type and each combination of its
    records' values.
    """
    groups: dict[tuple[Any, ...], list[ListedTensor | AdaptedWeight]] = {}
    for record in records:
        values = [str(value_at(record, field.path)) for field in shown]
        groups.setdefault((module_type_of(record.layer), *values), []).append(record)
    rows = [(safe(key[0]), group) for key, group in groups.items()]
    return grid_of(shown, rows, "type")


def _make_headline(inventory: Inventory) -> str:
    """Return path, kind, number of tensors and of entries by dtype; scaling and notes on lines of
    their own.
    """
    entries_by_dtype: Counter[str] = Counter()
    for tensor in inventory.tensors:
        entries_by_dtype[tensor.dtype] += math.prod(tensor.shape)
    totals = entries_by_dtype.most_common()
    dtypes = ", ".join(f"{count(entries)} {dtype}" for dtype, entries in totals)
    name, tensors = safe(inventory.path), f"{len(inventory.tensors)} tensors"
    lines = [f"{name}: {safe(inventory.kind)}, {tensors}, {dtypes}"]
    if inventory.scaling:
        lines.append(f"Scaling: {safe(inventory.scaling)}")
    lines += [f"Note: {safe(note)}" for note in inventory.notes]
    return "\n".join(lines)
