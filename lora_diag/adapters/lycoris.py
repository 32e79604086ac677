"""LoHa and LoKr, of PEFT and LyCORIS: products of small matrices, computed in full.

LoHa: ΔW = (w1_a·w1_b) ⊙ (w2_a·w2_b)·α/r, the Hadamard product of two low-rank matrices, whose rank
can reach r². LoKr: ΔW = (w1 ⊗ w2)·α/r, a Kronecker product whose sides may be products themselves.

Convolutions may have core tensors (Tucker form).

Reference: Hyeon-Woo et al. 2021 (LoHa), https://arxiv.org/abs/2108.06098; Yeh et al. 2023 (LoKr),
https://arxiv.org/abs/2309.14859; ``peft.tuners.loha``, ``.lokr``; LyCORIS ``modules/loha.py``,
``lokr.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.patterns import Scale, Scaling, compute_scale, describe_scaling
from lora_diag.adapters.source import AdapterFiles, check_ranks, group_by_module
from lora_diag.adapters.updates import (
    AdapterReading,
    Family,
    Shape,
    UpdateSite,
    WeightUpdate,
    add_stored_values,
    read,
)
from lora_diag.errors import damaged
from lora_diag.storage import Checkpoint

if TYPE_CHECKING:
    import torch

LOHA_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOHA_CORES = ("hada_t1", "hada_t2")
LOHA = LOHA_FACTORS + LOHA_CORES
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

# AdapterFiles, module, its tensors and its scale, given the rank of the factors -> its update.
Read = Callable[[AdapterFiles, str, dict[str, str], Callable[["int | None"], Scale]], WeightUpdate]


def _read_peft(
    parts: tuple[str, ...], kind: str, read_update: Read, source: AdapterFiles
) -> AdapterReading:
    """Return the contents of a PEFT adapter whose modules are scaled by α/r of the config."""
    modules, unclaimed = group_by_module(source.checkpoint, parts, source.path)
    names = list(modules)
    scaling = Scaling.read(source.settings, names)

    def find_scale(module: str, stored_rank: int | None) -> Scale:
        """Return s of a module, after checking the rank of its factors, if it has any, against the
        config.
        """
        rank = scaling.rank(module)
        stored = rank if stored_rank is None else stored_rank
        check_ranks(source, module, stored, rank, stored)
        return Scale(scaling.alpha(module, "alpha") / rank)

    updates = [
        read_update(source, name, found, partial(find_scale, name))
        for name, found in modules.items()
    ]
    kind = f"PEFT {kind}, {describe_scaling(source.settings, 'alpha')}, {len(modules)} modules"
    reading = AdapterReading(
        kind, tuple(updates), notes=tuple(scaling.notes(names)), scaling=scaling.describe("alpha")
    )
    return add_stored_values(reading, source, unclaimed)


def read_hadamard(
    source: AdapterFiles,
    module: str,
    parts: dict[str, str],
    find_scale: Callable[[int | None], Scale],
) -> WeightUpdate:
    """Return the update of one weight by LoHa.

    Args:
        source: The adapter.
        module: Its module.
        parts: Names of its tensors, by their parts.
        find_scale: Returns s, given the rank of the factors.

    Raises:
        InputError: A factor or one of two cores is missing, or they do not fit together.
    """
    missing = [part for part in LOHA_FACTORS if part not in parts]
    if missing or len(set(LOHA_CORES) & set(parts)) == 1:
        lacking = ", ".join(missing) or "second core"
        raise damaged(
            source.checkpoint.path, f"{module} has no {lacking}, so the file is incomplete"
        )
    shapes = {part: source.shape(parts[part], 2) for part in LOHA_FACTORS}
    cores = {part: source.checkpoint[parts[part]].shape for part in LOHA_CORES if part in parts}
    (a1, b1, a2, b2), rank = shapes.values(), shapes["hada_w1_b"][0]
    scale = find_scale(rank)
    shape: Shape = (a1[0], b1[1])
    fits = (a1, b1) == (a2, b2) and a1[1] == rank
    if cores:  # W[p, r, ...] = Σ_ij core[i, j, ...]·a[i, p]·b[j, r]
        core = cores["hada_t1"]
        shape = (a1[1], b1[1] * math.prod(core[2:]))
        fits = (a1, b1) == (a2, b2) and core == cores["hada_t2"] and core[:2] == (a1[0], rank)
    if not fits:
        raise damaged(
            source.checkpoint.path, f"the factors of {module} do not fit together: {shapes | cores}"
        )
    load, dtype = (
        partial(load_hadamard, source.checkpoint, dict(parts), scale),
        source.checkpoint[parts["hada_w1_a"]].dtype,
    )
    return WeightUpdate(
        f"{module}.weight",
        shape,
        load,
        False,
        dtype,
        rank=rank,
        scale=scale.known,
        alpha=scale.alpha,
    )


def load_hadamard(
    checkpoint: Checkpoint, parts: dict[str, str], scale: Scale, site: UpdateSite
) -> torch.Tensor:
    """Return s·(w1_a·w1_b) ⊙ (w2_a·w2_b)."""
    first, second = (
        _read_product(checkpoint, parts, f"hada_w{n}", f"hada_t{n}", "ij...,jr,ip->pr...")
        for n in "12"
    )
    return (first * second).reshape(site.shape) * compute_scale(checkpoint, scale)


def _read_product(
    checkpoint: Checkpoint, parts: dict[str, str], side: str, core: str, formula: str
) -> torch.Tensor:
    """Return a·b, or in Tucker form the core contracted with both; the formula names
    core, b and a.
    """
    import torch

    a, b = (read(checkpoint, parts[f"{side}_{part}"]) for part in "ab")
    return (
        a @ b if core not in parts else torch.einsum(formula, read(checkpoint, parts[core]), b, a)
    )


def read_kronecker(
    source: AdapterFiles,
    module: str,
    parts: dict[str, str],
    find_scale: Callable[[int | None], Scale],
    as_peft: bool = False,
) -> WeightUpdate:
    """Return the update of one weight by LoKr.

    Args:
        source: The adapter.
        module: Its module.
        parts: Names of its tensors, by their parts.
        find_scale: Returns s, given the rank of the factors; None if both sides are stored in full.
        as_peft: Whether the sides are multiplied as by PEFT instead of LyCORIS.
    """
    factor = next((parts[part] for part in ("lokr_w1_b", "lokr_w2_b") if part in parts), None)
    rank = None if factor is None else source.shape(factor, 2)[0]
    scale = find_scale(rank)
    left, right = (_read_side_shape(source, module, parts, side) for side in ("lokr_w1", "lokr_w2"))
    shape = (left[0] * right[0], left[1] * math.prod(right[1:]))
    dtype = source.checkpoint[parts.get("lokr_w1") or parts["lokr_w1_a"]].dtype
    load = partial(load_kronecker, source.checkpoint, dict(parts), scale, as_peft)
    return WeightUpdate(
        f"{module}.weight",
        shape,
        load,
        False,
        dtype,
        rank=rank,
        scale=scale.known,
        alpha=scale.alpha,
    )


def _read_side_shape(
    source: AdapterFiles, module: str, parts: dict[str, str], side: str
) -> tuple[int, ...]:
    """Return the shape of one side of LoKr, stored in full or as factors."""
    path = source.checkpoint.path
    if side in parts:
        shape = source.checkpoint[parts[side]].shape
        if len(shape) < 2 or 0 in shape or (side == "lokr_w1" and len(shape) != 2):
            raise damaged(path, f"{parts[side]} has shape {list(shape)}, not that of a matrix")
        return shape
    if f"{side}_a" not in parts or f"{side}_b" not in parts:
        raise damaged(
            path, f"{module} has neither {side} nor both of its factors, so the file is incomplete"
        )
    a, b = (source.shape(parts[f"{side}_{part}"], 2) for part in "ab")
    tucker = side == "lokr_w2" and "lokr_t2" in parts
    core = source.checkpoint[parts["lokr_t2"]].shape if tucker else (a[1], b[0])
    if core[:2] != ((a[0], b[0]) if tucker else (b[0], a[1])):
        raise damaged(path, f"the factors of {side} of {module} do not fit together")
    return (a[1], b[1], *core[2:]) if tucker else (a[0], b[1])


def load_kronecker(
    checkpoint: Checkpoint, parts: dict[str, str], scale: Scale, as_peft: bool, site: UpdateSite
) -> torch.Tensor:
    """Return s·(w1 ⊗ w2) in the layout of W."""
    import torch

    w1, w2 = (
        read(checkpoint, parts[side])
        if side in parts
        else _read_product(checkpoint, parts, side, core, "ij...,jr,ip->pr...")
        for side, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2"))
    )
    # PEFT 0.21.2 aligns the sides of a Conv1d at their ends, so w1's columns multiply the kernel.
    # Its model is trained with this and its merge agrees, so it is the behaviour of the adapter.
    if not (as_peft and w2.ndim == 3):
        w1 = w1.reshape(*w1.shape, *[1] * (w2.ndim - 2))
    return torch.kron(w1, w2.contiguous()).reshape(site.shape) * compute_scale(checkpoint, scale)


FAMILIES = (
    Family.of_peft("LoHa", "LOHA", partial(_read_peft, LOHA, "LoHa", read_hadamard), LOHA),
    Family.of_peft(
        "LoKr",
        "LOKR",
        partial(_read_peft, LOKR, "LoKr", partial(read_kronecker, as_peft=True)),
        LOKR,
    ),
)
