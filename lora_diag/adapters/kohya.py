"""kohya-ss and LyCORIS files: one safetensors file without a config, module paths with ``_`` for every dot.

LoRA is ΔW = s·up·down with s = α/r; α is a number in the file, and where it is missing or 0, s = 1 (kohya's rule).
LyCORIS adds LoHa, LoKr, full differences (``diff``, ``diff_b``), norms (``w_norm``, ``b_norm``) and DoRA
(``dora_scale``) under the same names.

Reference: kohya-ss/sd-scripts ``networks/lora.py``; KohakuBlueleaf/LyCORIS ``lycoris/modules``.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters import dora, loha, lokr
from lora_diag.adapters.patterns import Scale, scale_in, scale_of
from lora_diag.adapters.source import Source
from lora_diag.adapters.thin import thin_factors
from lora_diag.adapters.updates import Reading, Site, Update, read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

    from lora_diag.adapters.updates import Factors

PREFIX = re.compile(r"lora_(unet|te\d?|transformer|prior|clip_l|clip_g|t5xxl)_|lycoris_")

LORA = ("lora_up.weight", "lora_down.weight", "lora_mid.weight")
FULL = ("diff", "diff_b", "w_norm", "b_norm")
EXTRA = ("alpha", "dora_scale")
PARTS = frozenset({*LORA, *FULL, *EXTRA, *loha.FACTORS, *loha.CORES, *lokr.PARTS})


def is_kohya(source: Source) -> bool:
    """Return whether this family reads the adapter."""
    if source.config is not None:
        return False
    return any(PREFIX.match(name) and _split(name)[1] in PARTS for name in source.checkpoint)


def read_kohya(source: Source) -> Reading:
    """Read a kohya or LyCORIS file.

    Raises:
        InputError: It holds unsupported or invalid tensors, a factor is missing, or the factors do not fit together.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in source.checkpoint:
        module, part = _split(name)
        if part not in PARTS:
            raise InputError(
                f"{source.path}: {name} belongs to an unsupported kind of LyCORIS module; merge it with the tool "
                "that wrote it and pass the merged checkpoint"
            )
        if part == "alpha" and source.checkpoint[name].numel != 1:
            raise InputError(
                f"{source.path}: {name} must be a single number, not of shape {list(source.checkpoint[name].shape)}; "
                "save the adapter again"
            )
        modules.setdefault(module, {})[part] = name
    updates = [update for module, parts in modules.items() for update in _read_module(source, module, parts)]
    without_alpha = [module for module, parts in modules.items() if "alpha" not in parts and not set(FULL) & set(parts)]
    notes = source.note_missing_alpha(without_alpha, "kohya")
    return Reading(
        f"{_name_kind(source, modules)}, {len(modules)} modules",
        tuple(updates),
        (),
        tuple(notes),
        scaling="alpha / r, alpha from the file",
    )


def _split(name: str) -> tuple[str, str]:
    """Return the module and the part in the name of a tensor."""
    module, _, part = name.partition(".")
    return module, part


def _name_kind(source: Source, modules: dict[str, dict[str, str]]) -> str:
    """Return the kinds of modules in a file, and the trainer's settings, as text."""
    parts = set[str]().union(*modules.values())
    typical = {"LoRA": LORA[0], "LoHa": "hada_w1_a", "LoKr": ("lokr_w1", "lokr_w1_a"), "full differences": "diff"}
    kinds = [
        kind for kind, part in typical.items() if (part in parts if isinstance(part, str) else bool(parts & set(part)))
    ]
    dim, alpha = (source.metadata.get(f"ss_network_{key}") for key in ("dim", "alpha"))
    settings = f", dim={dim}, alpha={alpha}" if dim is not None else ""
    return f"kohya {' + '.join(kinds) or 'file'}{settings}"


def _read_module(source: Source, module: str, parts: dict[str, str]) -> list[Update]:
    """Return the updates of one module: of its weight, and of its bias if there is one."""
    updates = []
    path = PREFIX.sub("", module, count=1)
    for part in FULL:
        if part in parts:
            key = parts[part]
            shape = source.checkpoint[key].shape
            if not shape or 0 in shape:
                raise InputError(f"{source.path}: {key} has the invalid shape {list(shape)}; save the adapter again")
            name = "bias" if part.startswith("b_") or part.endswith("_b") else "weight"
            expected = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape
            load = partial(read_stored, source.checkpoint, key)
            updates.append(Update(f"{module}.{name}", expected, load, False, source.checkpoint[key].dtype))
    if not set(parts) <= {*FULL, *EXTRA}:
        updates.append(_read_factored(source, module, parts))
    return [replace(update, base_weight=update.weight.replace(module, path, 1)) for update in updates]


def _read_factored(source: Source, module: str, parts: dict[str, str]) -> Update:
    if "hada_w1_a" in parts:
        rank = loha.rank_of(source, module, parts)
        update = loha.hadamard(source, f"{module}.weight", parts, scale_in(source, parts.get("alpha", ""), rank))
    elif any(part in lokr.PARTS for part in parts):
        # If both sides are stored in full there is no rank, and LyCORIS does not scale.
        lokr_rank = lokr.rank_of(source, parts)
        scale = Scale() if lokr_rank is None else scale_in(source, parts.get("alpha", ""), lokr_rank)
        update = lokr.kronecker(source, f"{module}.weight", parts, scale)
    else:
        update = _read_lora(source, module, parts)
    if "dora_scale" not in parts:
        return update
    shape = source.checkpoint[parts["dora_scale"]].shape
    if not shape:
        raise InputError(
            f"{source.path}: {parts['dora_scale']} is a single number instead of a vector; save the adapter again"
        )
    by_column = shape[0] == 1 and len(shape) > 1 and math.prod(shape) == shape[1] != 1
    return dora.add_magnitude(update, source, parts["dora_scale"], by_column)


def _read_lora(source: Source, module: str, parts: dict[str, str]) -> Update:
    for part in LORA[:2]:
        if part not in parts:
            raise InputError(
                f"{source.path}: {module} has no {part}, only {next(iter(parts.values()))}, so the file is "
                "incomplete; save it again"
            )
    up, down = shapes_of(source, module, parts[LORA[0]], parts[LORA[1]])
    mid = parts.get(LORA[2])
    core = source.checkpoint[mid].shape if mid else ()
    if mid and (core[:2] != (up[1], down[0]) or math.prod(down[2:]) != 1):
        raise InputError(
            f"{source.path}: {module}: lora_mid {list(core)} does not fit up and down; save the adapter again"
        )
    kernel = core[2:] if mid else down[2:]
    shape = (up[0], down[1] * math.prod(kernel))
    scale = scale_in(source, parts.get("alpha", ""), down[0])
    keys = parts[LORA[0]], parts[LORA[1]], mid
    load = partial(factors, source.checkpoint, keys, scale)
    dtype = source.checkpoint[keys[0]].dtype
    return Update(
        f"{module}.weight",
        shape,
        load,
        True,
        dtype,
        zero_if=keys[0],
        rank=down[0],
        scale=scale.known,
        alpha=scale.alpha,
        thin=None if mid else thin_factors(source.checkpoint, *keys[:2], scale),
    )


def shapes_of(source: Source, module: str, up_key: str, down_key: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of two factors, ``(out, r, 1, …)`` and ``(r, in, …)``.

    Raises:
        InputError: Their shapes are inconsistent.
    """
    up, down = source.checkpoint[up_key].shape, source.checkpoint[down_key].shape
    if len(up) < 2 or len(down) < 2 or math.prod(up[1:]) != down[0] or 0 in (*up, *down):
        raise InputError(
            f"{source.path}: {module}: up {list(up)} and down {list(down)} do not fit together; save the adapter again"
        )
    return up, down


def factors(checkpoint: Checkpoint, keys: tuple[str, str, str | None], scale: Scale, site: Site) -> Factors:
    """Return s·up ``(out, r)`` and down ``(r, in·kh·kw)``; with a core, down contracted with it."""
    import torch

    up, down = read(checkpoint, keys[0]), read(checkpoint, keys[1])
    up = up.reshape(up.shape[0], -1)
    if keys[2] is not None:
        core = read(checkpoint, keys[2])
        down = torch.einsum("ij...,jp->ip...", core, down.reshape(down.shape[0], -1))
    return up * scale_of(checkpoint, scale), down.reshape(down.shape[0], -1)


def read_stored(checkpoint: Checkpoint, key: str, site: Site) -> torch.Tensor:
    """Return a difference that is stored in full."""
    return read(checkpoint, key).reshape(site.shape)
