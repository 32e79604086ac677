"""Records of ``inspect``, which are printed and not kept in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from lora_diag.records.base import Record
from lora_diag.records.shown import Shown


def _sizes(rows: Sequence[Any]) -> str:
    """Return the shape that all records have."""
    return "×".join("?" if size is None else str(size) for size in rows[0].shape) or "scalar"


def _entries(record: StoredTensor) -> int:
    return math.prod(record.shape)


class StoredTensor(Record):
    """One tensor of a checkpoint, as its header describes it.

    Args:
        layer: Its name.
        shape: Its shape.
        dtype: Stored dtype.
        left_out: Why ``spectrum`` would not measure it; null if it would.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown("shape", "shape", "of each", main=True, pool=_sizes),
        Shown("dtype", "dtype", "as it is stored", main=True),
        Shown("shape", "entries", "of all", main=True, form="count", pool=lambda rows: sum(map(_entries, rows))),
        Shown("spectrum", "spectrum", "whether it would be measured", main=True),
    )
    layer: str
    shape: tuple[int, ...]
    dtype: str
    left_out: str | None = None

    @property
    def spectrum(self) -> str:
        """Whether ``spectrum`` would measure it, and why not."""
        return f"no: {self.left_out}" if self.left_out else "yes"


class AdaptedWeight(Record):
    """One weight that an adapter changes.

    Args:
        layer: The adapter's name for it; of stacked experts, one of them.
        shape: ``(out, in)`` in the adapter's orientation; null where only the base tells.
        form: ``factored`` (B·A), ``dense`` (computed in full) or ``value`` (the weight's new value).
        dtype: Stored dtype.
        rank: r of its factors; null where it has none.
        scaling: s by which they are multiplied; null where it has none or it lies in the file as a number.
        needs_base: What makes ΔW depend on the base weight, such as ``DoRA``; empty if nothing does.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown("shape", "shape", "of ΔW", main=True, pool=_sizes),
        Shown("rank", "rank", "r of its factors", main=True),
        Shown("scaling", "scaling", "s", main=True, form=".4g"),
        Shown("about", "form", "how it is stored, and what it needs", main=True),
    )
    layer: str
    shape: tuple[int | None, ...]
    form: Literal["factored", "dense", "value"]
    dtype: str
    rank: int | None = None
    scaling: float | None = None
    needs_base: str = ""

    @property
    def about(self) -> str:
        """How it is stored, and whether it needs BASE."""
        form = "new value" if self.form == "value" else self.form
        return f"{form}, needs BASE ({self.needs_base})" if self.needs_base else form


class Inventory(Record):
    """What is in a checkpoint or an adapter, from headers alone.

    Args:
        path: Where it is.
        kind: What it is, in words.
        notes: What a careful reader should know.
        tensors: The tensors of its files.
        adapts: Of an adapter: the weights it changes; else empty.
        scaling: Of an adapter: how its updates are scaled and where that is said.
    """

    record: Literal["inventory"] = "inventory"
    path: str
    kind: str
    notes: tuple[str, ...]
    tensors: tuple[StoredTensor, ...]
    adapts: tuple[AdaptedWeight, ...] = ()
    scaling: str = ""
