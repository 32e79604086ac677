"""The layers that a probe truncates."""

from __future__ import annotations

from collections.abc import Sequence

from lora_diag.deltas import Delta, selector
from lora_diag.errors import NothingComparedError
from lora_diag.records.names import part_of


def truncated_layers(
    deltas: Sequence[Delta], layers: str | None = None, exclude: str | None = None
) -> dict[str, tuple[int, int]]:
    """Return the layers to truncate, with their shapes: the selected matrices outside embeddings and head.

    Raises:
        UsageError: A regular expression is invalid.
        NothingComparedError: No matrix is selected.
    """
    selected = selector(layers, exclude)
    truncated = {
        delta.layer: delta.shape
        for delta in deltas
        if delta.is_matrix and part_of(delta.layer) == "matrices" and selected(delta.layer)
    }
    if not truncated:
        raise NothingComparedError("no matrix outside embeddings and head is selected; check --layers and --exclude")
    return truncated
