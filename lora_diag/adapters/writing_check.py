"""Check of a written adapter by reading it: the same factors, on the same weights, or an error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diag.adapters.adapter import open_adapter
from lora_diag.adapters.updates import as_float64
from lora_diag.adapters.writing import Part
from lora_diag.checkpoints import Checkpoint
from lora_diag.deltas import Delta, FactoredDelta
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch


def check_written(folder: Path, base: Checkpoint, parts: Sequence[Part]) -> None:
    """Compare an adapter folder with its factors.

    For a stack of experts, only the first and the last are compared, since each reads the whole stack.

    Args:
        folder: The adapter.
        base: The checkpoint it belongs to.
        parts: The factors, whose errors were measured.

    Raises:
        InputError: A layer differs when read back, so that the measured errors are not those of the file.
    """
    pairing, _ = open_adapter(folder).pair(base)
    deltas = {delta.layer: delta for delta in pairing.deltas}
    for part in parts:
        index, count = part.target.expert
        if index in {0, count - 1} and not _are_equal(deltas.get(part.target.layer), part):
            raise InputError(
                f"{folder}: the factors of {part.target.layer} differ when read back, since names and shapes of "
                "BASE do not determine its layout; exclude it with --exclude and report this"
            )


def check_converted(folder: Path, written: Path, base: Checkpoint) -> None:
    """Compare an adapter in another layout with the PEFT adapter that it was made from, layer by layer.

    Args:
        folder: The adapter in the other layout; both have a scale of 1 in every layer.
        written: The PEFT adapter.
        base: The checkpoint that both belong to.

    Raises:
        InputError: A layer reads back as other factors.
    """
    import torch

    actual, expected = ({d.layer: d for d in open_adapter(path).pair(base)[0].deltas} for path in (folder, written))
    for layer, delta in expected.items():
        actual_delta = actual.get(layer)
        if (
            not isinstance(delta, FactoredDelta)
            or not isinstance(actual_delta, FactoredDelta)
            or actual_delta.shape != delta.shape
        ):
            raise InputError(
                f"{folder}: {layer} does not read back as it was written; do not use the folder, and report this"
            )
        pairs = zip(_select_used(*actual_delta.load()), _select_used(*delta.load()), strict=True)
        if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
            raise InputError(
                f"{folder}: {layer} does not read back as it was written; do not use the folder, and report this"
            )


def _are_equal(delta: Delta | None, part: Part) -> bool:
    """Return whether the ΔW read from the file has the factors of a part."""
    import torch

    if not isinstance(delta, FactoredDelta) or delta.shape != part.target.shape:
        return False
    written = as_float64(part.read("B")), as_float64(part.read("A"))
    if part.target.transposed:
        written = written[1].T, written[0].T
    pairs = zip(_select_used(*delta.load()), _select_used(*written), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def _select_used(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns of B and rows of A that are not padding."""
    used = (b != 0).any(0) & (a != 0).any(1)
    return b[:, used], a[used]
