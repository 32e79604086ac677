"""Records of ``inspect``, which are printed and not written to a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from lora_diag.records.base import Record, Shown


def _common_shape(rows: Sequence[Any]) -> str:
    """Return the shape that all records have."""
    return "×".join("?" if size is None else str(size) for size in rows[0].shape) or "scalar"


def _count_entries(record: StoredTensor) -> int:
    return math.prod(record.shape)


class StoredTensor(Record):
    """One tensor of a checkpoint, as its header describes it.

    Args:
        layer: Its name.
        shape: Its shape.
        dtype: Stored dtype.
        left_out: Reason why ``spectrum`` would skip it; null if it would not.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown("shape", "shape", "of each", main=True, pool=_common_shape),
        Shown("dtype", "dtype", "as it is stored", main=True),
        Shown("shape", "entries", "of all", main=True, form="count", pool=lambda rows: sum(map(_count_entries, rows))),
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
        layer: Its name in the adapter; for stacked experts, one of them.
        shape: ``(out, in)`` in the adapter's orientation; a size that depends on the base is null.
        form: ``factored`` (B·A), ``dense`` (computed in full) or ``value`` (the weight's new value).
        dtype: Stored dtype.
        rank: r of its factors; null without factors.
        scaling: Their scaling s; null without one, or if it is stored as a tensor.
        needs_base: Reason why ΔW depends on the base weight, such as ``DoRA``; empty if it does not.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown("shape", "shape", "of ΔW", main=True, pool=_common_shape),
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
    """The contents of a checkpoint or an adapter, from headers alone.

    Args:
        path: Its path.
        kind: Its kind, as text.
        notes: Notes on the input.
        tensors: The tensors of its files.
        adapts: For an adapter: the adapted weights; else empty.
        scaling: For an adapter: the scaling of its updates and its source.
    """

    record: Literal["inventory"] = "inventory"
    path: str
    kind: str
    notes: tuple[str, ...]
    tensors: tuple[StoredTensor, ...]
    adapts: tuple[AdaptedWeight, ...] = ()
    scaling: str = ""
