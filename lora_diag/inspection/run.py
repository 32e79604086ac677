"""``inspect``: list the contents of a checkpoint or an adapter."""

from __future__ import annotations

from pathlib import Path

from lora_diag.adapters import is_adapter, open_adapter
from lora_diag.adapters.source import alpha_option
from lora_diag.checkpoints import Checkpoint, as_path, locate, open_checkpoint
from lora_diag.deltas import natural_order, why_left_out
from lora_diag.errors import InputError
from lora_diag.records import is_results_file
from lora_diag.records.run import Inventory, StoredTensor
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import MOMENTS


def inspect(path: Path | str, *, alpha: float | None = None, alpha_is_rank: bool = False) -> Inventory:
    """Describe a checkpoint or an adapter by its headers.

    No weights are read, except those factors of an adapter that are initialized to zero, to check whether they still
    are.

    Args:
        path: A file, a folder, or a shard index.
        alpha: α of an adapter whose files give none: s = α/r.
        alpha_is_rank: Assume α = r, so s = 1, if an adapter's files give no α.

    Returns:
        The tensors in natural order of their names; for an adapter, also the weights it changes.

    Raises:
        InputError: The path cannot be read, or is a results file, which ``read_results`` reads.
        UsageError: ``alpha`` is invalid, or contradicts ``alpha_is_rank``.

    Example:
        >>> inspect("sample_checkpoints/base").kind
        'sharded safetensors, 3 files'
    """
    path = as_path(path)
    if is_results_file(path):
        raise InputError(f"{path}: is a results file; read it with lora_diag.read_results")
    if not is_adapter(locate(path)):
        checkpoint = open_checkpoint(path)
        has_moments = any(file.metadata.get("kind") == MOMENTS for file in checkpoint.files)
        notes = (f"contains {MOMENTS}, not a checkpoint; pass it with --activations",) if has_moments else ()
        return Inventory(
            path=legible(checkpoint.path),
            kind=legible(checkpoint.kind),
            notes=tuple(map(legible, (*checkpoint.notes, *notes))),
            tensors=_list_tensors(checkpoint),
        )
    adapter = open_adapter(locate(path), alpha_option({"alpha": alpha, "alpha_is_rank": alpha_is_rank}))
    return Inventory(
        path=legible(adapter.path),
        kind=legible(adapter.kind),
        notes=tuple(map(legible, (*adapter.notes, *adapter.warnings()))),
        tensors=_list_tensors(adapter.checkpoint),
        adapts=adapter.weights(),
        scaling=legible(adapter.reading.scaling),
    )


def _list_tensors(checkpoint: Checkpoint) -> tuple[StoredTensor, ...]:
    return tuple(
        StoredTensor(layer=name, shape=info.shape, dtype=info.dtype, left_out=why_left_out(info))
        for name in sorted(checkpoint, key=natural_order)
        if (info := checkpoint[name])
    )
