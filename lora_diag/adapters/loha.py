"""LoHa: ΔW = (w1_a·w1_b) ⊙ (w2_a·w2_b)·α/r, the Hadamard product of two low-rank matrices.

Its rank can reach r², so it is computed in full. Convolutions may have core tensors (Tucker form).

Reference: Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098; ``peft.tuners.loha``; LyCORIS ``modules/loha.py``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.patterns import Scale, Scaling, scale_of, scaling_words
from lora_diag.adapters.source import Source, by_module, check_rank
from lora_diag.adapters.updates import Reading, Shape, Site, Update, add_stored_values, read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")


def read_loha(source: Source) -> Reading:
    """Read a PEFT LoHa adapter.

    Raises:
        InputError: Its parts do not fit together.
    """
    modules, unclaimed = by_module(source.checkpoint, FACTORS + CORES, source.path)
    scaling = Scaling.of(source.settings, list(modules))
    updates = []
    for module, parts in modules.items():
        rank = scaling.rank(module)
        check_rank(source, module, rank_of(source, module, parts), rank, rank)
        scale = Scale(scaling.alpha(module, "alpha") / rank)
        updates.append(hadamard(source, f"{module}.weight", parts, scale))
    kind = f"PEFT LoHa, {scaling_words(source.settings, 'alpha')}, {len(modules)} modules"
    notes = tuple(scaling.notes(list(modules)))
    reading = Reading(kind, tuple(updates), notes=notes, scaling=scaling.words("alpha"))
    return add_stored_values(reading, source, unclaimed)


def rank_of(source: Source, module: str, parts: dict[str, str]) -> int:
    """Return the rank of a module's factors.

    Raises:
        InputError: A factor, or one of two cores, is missing.
    """
    missing = [part for part in FACTORS if part not in parts]
    if missing or len(set(CORES) & set(parts)) == 1:
        raise InputError(
            f"{source.checkpoint.path}: {module} has no {', '.join(missing) or 'second core'}, so the file is "
            "incomplete; save it again"
        )
    return source.shape(parts["hada_w1_b"], 2)[0]


def hadamard(source: Source, weight: str, parts: dict[str, str], scale: Scale) -> Update:
    """Return the update of one weight.

    Raises:
        InputError: The factors do not fit together.
    """
    shapes = {part: source.shape(parts[part], 2) for part in FACTORS}
    cores = {part: source.checkpoint[parts[part]].shape for part in CORES if part in parts}
    (a1, b1, a2, b2), rank = shapes.values(), shapes["hada_w1_b"][0]
    shape: Shape = (a1[0], b1[1])
    fits = (a1, b1) == (a2, b2) and a1[1] == rank
    if cores:  # W[p, r, ...] = Σ_ij core[i, j, ...]·a[i, p]·b[j, r]
        core = cores["hada_t1"]
        shape = (a1[1], b1[1] * math.prod(core[2:]))
        fits = (a1, b1) == (a2, b2) and core == cores["hada_t2"] and core[:2] == (a1[0], rank)
    if not fits:
        raise InputError(
            f"{source.checkpoint.path}: the factors of {weight} do not fit together: {shapes | cores}; save the "
            "adapter again"
        )
    load = partial(delta, source.checkpoint, dict(parts), scale)
    dtype = source.checkpoint[parts["hada_w1_a"]].dtype
    return Update(weight, shape, load, False, dtype, rank=rank, scale=scale.known)


def delta(checkpoint: Checkpoint, parts: dict[str, str], scale: Scale, site: Site) -> torch.Tensor:
    """Return s·(w1_a·w1_b) ⊙ (w2_a·w2_b)."""
    product = _read_side(checkpoint, parts, "1") * _read_side(checkpoint, parts, "2")
    return product.reshape(site.shape) * scale_of(checkpoint, scale)


def _read_side(checkpoint: Checkpoint, parts: dict[str, str], side: str) -> torch.Tensor:
    import torch

    a, b = (read(checkpoint, parts[f"hada_w{side}_{part}"]) for part in "ab")
    if f"hada_t{side}" not in parts:
        return a @ b
    core = read(checkpoint, parts[f"hada_t{side}"])
    return torch.einsum("ij...,jr,ip->pr...", core, b, a)
