"""``inspect``: what is in this checkpoint?"""

from __future__ import annotations

from pathlib import Path

from lora_diag.checkpoints import open_checkpoint
from lora_diag.deltas import natural_order, why_left_out
from lora_diag.results import Inventory, StoredTensor


def inspect(path: Path | str) -> Inventory:
    """Describe a checkpoint from its headers; no weight is read.

    Args:
        path: A file, a folder, or a shard index.

    Returns:
        Its tensors in natural order of their names.

    Raises:
        InputError: Nothing readable is there.

    Example:
        >>> inspect("sample_checkpoints/base").kind
        'sharded safetensors, 3 files'
    """
    checkpoint = open_checkpoint(path)
    tensors = tuple(
        StoredTensor(layer=name, shape=info.shape, dtype=info.dtype, left_out=why_left_out(info))
        for name in sorted(checkpoint, key=natural_order)
        if (info := checkpoint[name])
    )
    return Inventory(path=str(checkpoint.path), kind=checkpoint.kind, notes=checkpoint.notes, tensors=tensors)
