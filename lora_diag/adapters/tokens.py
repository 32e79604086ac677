"""Trainable tokens: some rows of an embedding are replaced.

Despite its name, ``trainable_tokens_delta`` ``(n, dim)`` holds the new values: ΔW[i] = value − W[i] for the trained
rows i, else 0. As S·(value − W[i]) with S ``(vocab, n)`` picking the rows, the update has rank at most n and stays in
factored form.

Reference: ``peft.tuners.trainable_tokens``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lora_diag.adapters.keys import by_module, strip
from lora_diag.adapters.source import Config, Source
from lora_diag.adapters.updates import Reading, Site, Update, read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError

if TYPE_CHECKING:
    from lora_diag.adapters.updates import Factors

PART = "trainable_tokens_delta"


def is_trainable_tokens(source: Source) -> bool:
    """Say whether this family reads the adapter."""
    return source.peft_type == "TRAINABLE_TOKENS"


def read_trainable_tokens(source: Source) -> Reading:
    """Read a TRAINABLE_TOKENS adapter.

    Raises:
        InputError: Indices and rows do not fit together.
    """
    from lora_diag.adapters.values import stored_values

    modules, rest = by_module(source.checkpoint, (PART,), source.path)
    updates = [
        rows_update(source, module, parts[PART], source.settings.values.get("token_indices"))
        for module, parts in modules.items()
    ]
    values, extra, ignored = stored_values(source, rest)
    return Reading(f"PEFT trainable tokens, {len(modules)} tables", (*updates, *extra), values, (), ignored)


def token_update(source: Source, key: str) -> Update:
    """Return the update of a ``token_adapter`` inside another adapter (``trainable_token_indices``)."""
    module = strip(key).removesuffix(f".token_adapter.{PART}")
    return rows_update(source, module, key, source.settings.values.get("trainable_token_indices"))


def rows_update(source: Source, module: str, key: str, indices: Any) -> Update:
    """Return the update that replaces rows of a table.

    Raises:
        InputError: There is not one index per row.
    """
    rows = _rows(source.settings, module, indices)
    shape = source.checkpoint[key].shape
    if len(shape) != 2 or not rows or len(rows) != shape[0] or len(set(rows)) != len(rows):
        raise InputError(
            f"{source.checkpoint.path}: {key} has the shape {list(shape)}, but {source.settings.path.name} gives "
            f"{len(set(rows))} token indices for it"
        )
    load = partial(factors, source.checkpoint, key, rows)
    return Update(f"{module}.weight", (None, shape[1]), load, True, source.checkpoint[key].dtype, "trainable tokens")


def _rows(config: Config, module: str, indices: Any) -> list[int]:
    """Return the indices of one table, from a list for the only one or from a mapping by module."""
    if isinstance(indices, dict):
        indices = next((rows for name, rows in indices.items() if module == name or module.endswith(f".{name}")), None)
    if not isinstance(indices, list) or not all(type(row) is int and row >= 0 for row in indices):
        raise InputError(f"{config.path}: there are no token indices for {module}, which the adapter trained")
    return indices


def factors(checkpoint: Checkpoint, key: str, rows: list[int], site: Site) -> Factors:
    """Return S ``(vocab, n)`` and value − W[rows] ``(n, dim)``."""
    import torch

    if max(rows) >= site.shape[0]:
        raise InputError(f"{checkpoint.path}: token {max(rows)} is beyond the {site.shape[0]} rows of BASE's table")
    picks = torch.zeros(site.shape[0], len(rows), dtype=torch.float64)
    picks[rows, range(len(rows))] = 1.0
    return picks, read(checkpoint, key) - site.rows(rows)
