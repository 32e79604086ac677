"""IA³ and LN tuning, which train vectors.

IA³ multiplies every output of a layer (or every input in feed-forward layers) by a trained number: ΔW = (l − 1) ⊙ W,
with l along the rows, or along the columns; a bias follows the rows. LN tuning trains normalization layers in full and
stores their new values.

Reference: Liu et al. 2022, https://arxiv.org/abs/2205.05638, ``peft.tuners.ia3.layer``; Zhao et al. 2023,
https://arxiv.org/abs/2312.11420, ``peft.tuners.ln_tuning``.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.source import Source, by_module, is_named, strip
from lora_diag.adapters.updates import NewValue, Reading, Shape, Site, Update, add_stored_values, read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch


# End of a key of LN tuning, without the tensor's own name.
PART = re.compile(r"\.ln_tuning_layers(\.(?!weight$|bias$)[^.]+)?(?=\.(weight|bias)$)")


def read_ia3(source: Source) -> Reading:
    """Read a PEFT IA³ adapter.

    Raises:
        InputError: A tensor is not a vector.
    """
    modules, unclaimed = by_module(source.checkpoint, ("ia3_l",), source.path)
    updates = tuple(
        update for module, parts in modules.items() for update in read_scaled_layer(source, module, parts["ia3_l"])
    )
    return add_stored_values(Reading(f"PEFT IA3, {len(modules)} modules", updates), source, unclaimed)


def read_scaled_layer(source: Source, module: str, key: str) -> list[Update]:
    """Return the update of a module's weight and, if it is along the rows, an optional one of its bias.

    Raises:
        InputError: ``ia3_l`` is not a vector.
    """
    shape = source.checkpoint[key].shape
    size = math.prod(shape)
    if max(shape, default=0) != size or len(shape) < 2:
        raise InputError(
            f"{source.checkpoint.path}: {key} has shape {list(shape)}, not that of a vector; save the adapter again"
        )
    # PEFT stores (out, 1), feed-forward (1, in); for a convolution (1, out, 1, 1) or (1, in, 1, 1), which are
    # indistinguishable.
    by_row = shape[0] == size if len(shape) == 2 and size > 1 else not _is_feedforward(source, module)
    expected: Shape = (size, None) if by_row else (None, None if len(shape) > 2 else size)
    load = partial(delta, source.checkpoint, key, by_row)
    dtype = source.checkpoint[key].dtype
    update = Update(f"{module}.weight", expected, load, False, dtype, "IA3")
    if not by_row:
        return [update]
    bias = partial(bias_delta, source.checkpoint, key)
    return [update, Update(f"{module}.bias", (size,), bias, False, dtype, "IA3", optional=True)]


def _is_feedforward(source: Source, module: str) -> bool:
    return any(is_named(module, name) for name in source.settings.names("feedforward_modules"))


def delta(checkpoint: Checkpoint, key: str, by_row: bool, site: Site) -> torch.Tensor:
    """Return (l − 1) ⊙ W."""
    change = read(checkpoint, key).reshape(-1) - 1
    w = site.weight()
    if by_row:
        return change[:, None] * w
    return (w.reshape(w.shape[0], len(change), -1) * change[None, :, None]).reshape(w.shape)


def bias_delta(checkpoint: Checkpoint, key: str, site: Site) -> torch.Tensor:
    """Return (l − 1) ⊙ bias."""
    return (read(checkpoint, key).reshape(-1) - 1) * site.weight()


def read_ln_tuning(source: Source) -> Reading:
    """Read a PEFT LN_TUNING adapter."""
    norm_keys = [key for key in source.checkpoint if PART.search(key)]
    values = tuple(NewValue(PART.sub("", strip(key)), key) for key in norm_keys)
    unclaimed = [key for key in source.checkpoint if key not in set(norm_keys)]
    return add_stored_values(Reading(f"PEFT LN tuning, {len(norm_keys)} tensors", (), values), source, unclaimed)
