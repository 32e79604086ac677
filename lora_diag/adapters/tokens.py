"""Trainable tokens: an adapter that only replaces some rows of an embedding.

Reference: ``peft.tuners.trainable_tokens``.
"""

from __future__ import annotations

from lora_diag.adapters.keys import by_module
from lora_diag.adapters.source import Source
from lora_diag.adapters.updates import Reading
from lora_diag.adapters.values import ROWS, add_stored_values, rows_update


def read_trainable_tokens(source: Source) -> Reading:
    """Read a TRAINABLE_TOKENS adapter.

    Raises:
        InputError: Indices and rows are inconsistent.
    """
    modules, rest = by_module(source.checkpoint, (ROWS,), source.path)
    indices = source.settings.values.get("token_indices")
    updates = tuple(rows_update(source, module, parts[ROWS], indices) for module, parts in modules.items())
    return add_stored_values(Reading(f"PEFT trainable tokens, {len(modules)} tables", updates), source, rest)
