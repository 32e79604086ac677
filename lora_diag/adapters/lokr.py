"""LoKr: ΔW = (w1 ⊗ w2)·α/r, a Kronecker product whose sides may be products themselves.

Reference: Yeh et al. 2023, https://arxiv.org/abs/2309.14859; ``peft.tuners.lokr``; LyCORIS ``modules/lokr.py``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.patterns import Scale, Scaling, scale_of, scaling_words
from lora_diag.adapters.source import Source, by_module, check_rank
from lora_diag.adapters.updates import Reading, Site, Update, add_stored_values, read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def read_lokr(source: Source) -> Reading:
    """Read a PEFT LoKr adapter.

    Raises:
        InputError: Its parts do not fit together.
    """
    modules, unclaimed = by_module(source.checkpoint, PARTS, source.path)
    scaling = Scaling.of(source.settings, list(modules))
    updates = []
    for module, parts in modules.items():
        rank = scaling.rank(module)
        stored_rank = rank_of(source, parts) or rank
        check_rank(source, module, stored_rank, rank, stored_rank)
        scale = Scale(scaling.alpha(module, "alpha") / rank)
        updates.append(kronecker(source, f"{module}.weight", parts, scale, as_peft=True))
    kind = f"PEFT LoKr, {scaling_words(source.settings, 'alpha')}, {len(modules)} modules"
    notes = tuple(scaling.notes(list(modules)))
    reading = Reading(kind, tuple(updates), notes=notes, scaling=scaling.words("alpha"))
    return add_stored_values(reading, source, unclaimed)


def rank_of(source: Source, parts: dict[str, str]) -> int | None:
    """Return the rank of the factors; None if both sides are stored in full."""
    for part in ("lokr_w1_b", "lokr_w2_b"):
        if part in parts:
            return source.shape(parts[part], 2)[0]
    return None


def kronecker(source: Source, weight: str, parts: dict[str, str], scale: Scale, as_peft: bool = False) -> Update:
    """Return the update of one weight.

    Args:
        source: The adapter.
        weight: Its name.
        parts: Its tensors.
        scale: s.
        as_peft: Whether the sides are multiplied as by PEFT instead of LyCORIS.

    Raises:
        InputError: A side is incomplete, or its parts do not fit together.
    """
    left, right = (_read_side_shape(source, weight, parts, side) for side in ("lokr_w1", "lokr_w2"))
    shape = (left[0] * right[0], left[1] * math.prod(right[1:]))
    key = parts.get("lokr_w1") or parts["lokr_w1_a"]
    load = partial(delta, source.checkpoint, dict(parts), scale, as_peft)
    return Update(
        weight, shape, load, False, source.checkpoint[key].dtype, rank=rank_of(source, parts), scale=scale.known
    )


def _read_side_shape(source: Source, weight: str, parts: dict[str, str], side: str) -> tuple[int, ...]:
    if side in parts:
        shape = source.checkpoint[parts[side]].shape
        if len(shape) < 2 or 0 in shape or (side == "lokr_w1" and len(shape) != 2):
            raise InputError(
                f"{source.checkpoint.path}: {parts[side]} has shape {list(shape)}, not that of a matrix; save the "
                "adapter again"
            )
        return shape
    if f"{side}_a" not in parts or f"{side}_b" not in parts:
        raise InputError(
            f"{source.checkpoint.path}: {weight} has neither {side} nor both of its factors, so the file is "
            "incomplete; save it again"
        )
    a, b = (source.shape(parts[f"{side}_{part}"], 2) for part in "ab")
    tucker = side == "lokr_w2" and "lokr_t2" in parts
    core = source.checkpoint[parts["lokr_t2"]].shape if tucker else (a[1], b[0])
    if core[:2] != ((a[0], b[0]) if tucker else (b[0], a[1])):
        raise InputError(
            f"{source.checkpoint.path}: the factors of {side} of {weight} do not fit together; save the adapter again"
        )
    return (a[1], b[1], *core[2:]) if tucker else (a[0], b[1])


def delta(checkpoint: Checkpoint, parts: dict[str, str], scale: Scale, as_peft: bool, site: Site) -> torch.Tensor:
    """Return s·(w1 ⊗ w2) in the layout of W."""
    import torch

    w1, w2 = _read_side(checkpoint, parts, "lokr_w1"), _read_side(checkpoint, parts, "lokr_w2")
    # PEFT 0.21.2 aligns the sides of a Conv1d at their ends, so w1's columns multiply the kernel. Its model is
    # trained with this and its merge agrees, so it is the behaviour of the adapter.
    if not (as_peft and w2.ndim == 3):
        w1 = w1.reshape(*w1.shape, *[1] * (w2.ndim - 2))
    return torch.kron(w1, w2.contiguous()).reshape(site.shape) * scale_of(checkpoint, scale)


def _read_side(checkpoint: Checkpoint, parts: dict[str, str], side: str) -> torch.Tensor:
    import torch

    if side in parts:
        return read(checkpoint, parts[side])
    a, b = (read(checkpoint, parts[f"{side}_{part}"]) for part in "ab")
    if side == "lokr_w2" and "lokr_t2" in parts:
        return torch.einsum("ij...,ip,jr->pr...", read(checkpoint, parts["lokr_t2"]), a, b)
    return a @ b
