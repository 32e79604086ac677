"""Other contents of a PEFT adapter file: weights and biases stored in full, and rows of an embedding.

``modules_to_save``, ``bias="all"`` and resized embeddings are stored as new values under the weight's plain name. They
are identified by the file, not by the config: PEFT matches ``modules_to_save`` by the end of a name without a dot, so
that "norm" also saves every ``input_layernorm``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_diag.adapters.keys import is_named, strip
from lora_diag.adapters.source import Config, Source
from lora_diag.adapters.updates import NewValue, Reading, Site, Update, read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError

if TYPE_CHECKING:
    from lora_diag.adapters.updates import Factors

# Some rows of an embedding.
ROWS = "trainable_tokens_delta"
TOKENS = f".token_adapter.{ROWS}"

# Names inside PEFT's wrappers, as in manual dumps.
SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
ORIGINAL = re.compile(r"\.original_module\.")


def add_stored_values(reading: Reading, source: Source, names: Iterable[str]) -> Reading:
    """Add tensors that no family claimed: weights stored in full, updates of rows, and tensors without effect.

    Args:
        reading: Result of the family.
        source: The adapter.
        names: The tensors outside of factors.

    Raises:
        InputError: Token indices and rows do not fit together.
    """
    values, updates, ignored = [*reading.values], [*reading.updates], [*reading.ignored]
    for key in names:
        name = SAVED.sub("", strip(key))
        if name.endswith(TOKENS):
            indices = source.settings.values.get("trainable_token_indices")
            updates.append(rows_update(source, strip(key).removesuffix(TOKENS), key, indices))
        elif ORIGINAL.search(name):
            ignored.append(key)
        else:
            is_copy = name.endswith(".base_layer.weight")
            values.append(NewValue(name.replace(".base_layer.", "."), key, is_copy))
    return replace(reading, updates=tuple(updates), values=tuple(values), ignored=tuple(ignored))


def rows_update(source: Source, module: str, key: str, indices: Any) -> Update:
    """Return the update that replaces rows of a table.

    Despite its name, ``trainable_tokens_delta`` ``(n, dim)`` holds the new values: ΔW[i] = value − W[i] for the trained
    rows i, else 0. As S·(value − W[i]) with S ``(vocab, n)`` picking the rows, the update has rank at most n and stays
    in factored form.

    Raises:
        InputError: The number of indices differs from the number of rows.
    """
    rows = _read_row_indices(source.settings, module, indices)
    shape = source.checkpoint[key].shape
    if len(shape) != 2 or not rows or len(rows) != shape[0] or len(set(rows)) != len(rows):
        raise InputError(
            f"{source.checkpoint.path}: {key} has shape {list(shape)}, but {source.settings.path.name} has "
            f"{len(set(rows))} token indices for it; save the adapter again"
        )
    load = partial(factors, source.checkpoint, key, rows)
    return Update(f"{module}.weight", (None, shape[1]), load, True, source.checkpoint[key].dtype, "trainable tokens")


def _read_row_indices(config: Config, module: str, indices: Any) -> list[int]:
    """Return the indices of one table, from a list for the only one or from a mapping by module."""
    if isinstance(indices, dict):
        indices = next((rows for name, rows in indices.items() if is_named(module, name)), None)
    if not isinstance(indices, list) or not all(type(row) is int and row >= 0 for row in indices):
        raise InputError(
            f"{config.path}: has no token indices for {module}, which the adapter trained; give the config that it was "
            "trained with"
        )
    return indices


def factors(checkpoint: Checkpoint, key: str, rows: list[int], site: Site) -> Factors:
    """Return S ``(vocab, n)`` and value − W[rows] ``(n, dim)``."""
    import torch

    if max(rows) >= site.shape[0]:
        raise InputError(
            f"{checkpoint.path}: token {max(rows)} is beyond the {site.shape[0]} rows of BASE's embedding; give the "
            "base with the resized vocabulary"
        )
    selection = torch.zeros(site.shape[0], len(rows), dtype=torch.float64)
    selection[rows, range(len(rows))] = 1.0
    return selection, read(checkpoint, key) - site.rows(rows)
