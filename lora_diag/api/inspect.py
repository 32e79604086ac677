"""``inspect``: what is in this checkpoint or adapter?"""

from __future__ import annotations

from pathlib import Path

from lora_diag.adapters import is_adapter, open_adapter
from lora_diag.checkpoints import Checkpoint, locate, open_checkpoint
from lora_diag.deltas import natural_order, why_left_out
from lora_diag.results import Inventory, StoredTensor


def inspect(path: Path | str) -> Inventory:
    """Describe a checkpoint or an adapter from its headers.

    No weight is read; of an adapter, only the factors that start at zero, to see whether they still are.

    Args:
        path: A file, a folder, or a shard index.

    Returns:
        Its tensors in natural order of their names; of an adapter also the weights it changes.

    Raises:
        InputError: Nothing readable is there.

    Example:
        >>> inspect("sample_checkpoints/base").kind
        'sharded safetensors, 3 files'
    """
    if not is_adapter(locate(path)):
        checkpoint = open_checkpoint(path)
        return Inventory(
            path=str(checkpoint.path), kind=checkpoint.kind, notes=checkpoint.notes, tensors=_tensors(checkpoint)
        )
    adapter = open_adapter(locate(path))
    return Inventory(
        path=str(adapter.path),
        kind=adapter.kind,
        notes=(*adapter.notes, *adapter.warnings()),
        tensors=_tensors(adapter.checkpoint),
        adapts=adapter.weights(),
        scaling=adapter.reading.scaling,
    )


def _tensors(checkpoint: Checkpoint) -> tuple[StoredTensor, ...]:
    return tuple(
        StoredTensor(layer=name, shape=info.shape, dtype=info.dtype, left_out=why_left_out(info))
        for name in sorted(checkpoint, key=natural_order)
        if (info := checkpoint[name])
    )
