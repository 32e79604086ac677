"""Records of ``inspect``, which are printed and not kept in a file."""

from __future__ import annotations

from typing import Literal

from lora_diag.records.base import Record


class StoredTensor(Record):
    """One tensor of a checkpoint, as its header describes it.

    Args:
        layer: Its name.
        shape: Its shape.
        dtype: Stored dtype.
        left_out: Why ``spectrum`` would not measure it; null if it would.
    """

    layer: str
    shape: tuple[int, ...]
    dtype: str
    left_out: str | None = None


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

    layer: str
    shape: tuple[int | None, ...]
    form: Literal["factored", "dense", "value"]
    dtype: str
    rank: int | None = None
    scaling: float | None = None
    needs_base: str = ""


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
