"""Adapters of diffusion models: kohya-ss and LyCORIS files, and those of diffusers.

kohya: one safetensors file without a config, module paths with ``_`` for every dot. LoRA is ΔW =
s·up·down with s = α/r; α is a number in the file, and where it is missing or 0, s = 1 (kohya's
rule). LyCORIS adds LoHa, LoKr, full differences (``diff``, ``diff_b``), norms (``w_norm``,
``b_norm``) and DoRA (``dora_scale``) under the same names.

diffusers: ``pytorch_lora_weights.safetensors``, with keys that begin with the pipeline's component
(``unet.``). s = α/r with α from an ``.alpha`` tensor or from the file's ``lora_adapter_metadata``;
without either diffusers uses α = r, so s = 1, which is noted.

Reference: kohya-ss/sd-scripts ``networks/lora.py``; KohakuBlueleaf/LyCORIS ``lycoris/modules``;
``diffusers.loaders``, ``diffusers.utils.peft_utils.get_peft_kwargs``.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.adapters import lycoris
from lora_diag.adapters.lora import add_magnitude, load_scaled
from lora_diag.adapters.patterns import Scale, Scaling, compute_scale, make_scale
from lora_diag.adapters.source import AdapterFiles, Config
from lora_diag.adapters.thin import find_thin_factors
from lora_diag.adapters.updates import (
    AdapterReading,
    Family,
    UpdateSite,
    WeightUpdate,
    flatten_shape,
    format_ranks,
    read,
)
from lora_diag.errors import damaged
from lora_diag.storage import Checkpoint
from lora_diag.storage.documents import loads

if TYPE_CHECKING:
    from lora_diag.adapters.updates import Factors

PREFIX = re.compile(r"lora_(unet|te\d?|transformer|prior|clip_l|clip_g|t5xxl)_|lycoris_")

LORA = ("lora_up.weight", "lora_down.weight", "lora_mid.weight")
FULL = ("diff", "diff_b", "w_norm", "b_norm")
EXTRA = ("alpha", "dora_scale")
PARTS = frozenset({*LORA, *FULL, *EXTRA, *lycoris.LOHA, *lycoris.LOKR})
# Kind of modules -> parts of which one is in every such module.
KINDS = {
    "LoRA": LORA[:1],
    "LoHa": ("hada_w1_a",),
    "LoKr": ("lokr_w1", "lokr_w1_a"),
    "full differences": ("diff",),
}

PIPELINE = re.compile(r"(unet|text_encoder(_\d)?|transformer(_\d)?|prior|controlnet)\.")
FILE = "pytorch_lora_weights"
METADATA = "lora_adapter_metadata"

# Names of the two factors in current diffusers, in its text encoders, and before PEFT; and of α.
PART = re.compile(
    r"(?P<module>.+?)(?:\.lora(?:_linear_layer)?\.|\.|(?P<old>_lora\.))"
    r"(?P<part>lora_A|lora_B|lora_down|lora_up|down|up|alpha)(\.weight)?"
)
DOWN = {"lora_A", "lora_down", "down"}


def is_kohya(source: AdapterFiles) -> bool:
    """Return whether a source is a kohya or LyCORIS file."""
    if source.config is not None:
        return False
    return any(PREFIX.match(name) and name.partition(".")[2] in PARTS for name in source.checkpoint)


def read_kohya(source: AdapterFiles) -> AdapterReading:
    """Return the contents of a kohya or LyCORIS file.

    Raises:
        InputError: It holds unsupported or invalid tensors, a factor is missing, or the factors do
            not fit together.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in source.checkpoint:
        module, _, part = name.partition(".")
        if part not in PARTS:
            fix = "merge it with the tool that wrote it and pass the merged checkpoint"
            raise damaged(
                source.path, f"{name} belongs to an unsupported kind of LyCORIS module", fix
            )
        if part == "alpha":
            _check_alpha(source, name)
        modules.setdefault(module, {})[part] = name
    updates = [
        update
        for module, parts in modules.items()
        for update in _read_kohya_module(source, module, parts)
    ]
    without_alpha = [
        module for module, parts in modules.items() if parts.keys().isdisjoint(("alpha", *FULL))
    ]
    all_parts = set[str]().union(*modules.values())
    kinds = " + ".join(kind for kind, parts in KINDS.items() if not all_parts.isdisjoint(parts))
    dim, alpha = (source.metadata.get(f"ss_network_{key}") for key in ("dim", "alpha"))
    settings = f", dim={dim}, alpha={alpha}" if dim is not None else ""
    return AdapterReading(
        f"kohya {kinds or 'file'}{settings}, {len(modules)} modules",
        tuple(updates),
        notes=tuple(source.note_missing_alpha(without_alpha, "kohya")),
        scaling="alpha / r, alpha from the file",
    )


def _check_alpha(source: AdapterFiles, key: str) -> None:
    """Refuse an α that is not a single number."""
    if source.checkpoint[key].numel != 1:
        shape = list(source.checkpoint[key].shape)
        raise damaged(source.path, f"{key} must be a single number, not of shape {shape}")


def _read_kohya_module(
    source: AdapterFiles, module: str, parts: dict[str, str]
) -> list[WeightUpdate]:
    """Return the updates of one module: of its weight and of its bias, as far as the
    file has them.
    """
    updates = []
    for part, key in ((part, parts[part]) for part in FULL if part in parts):
        info = source.checkpoint[key]
        if info.numel == 0 or not info.shape:
            raise damaged(source.path, f"{key} has the invalid shape {list(info.shape)}")
        name = "bias" if part in {"diff_b", "b_norm"} else "weight"
        expected = flatten_shape(info.shape) if len(info.shape) > 1 else info.shape
        load = partial(load_scaled, source.checkpoint, key, 1.0)
        updates.append(WeightUpdate(f"{module}.{name}", expected, load, False, info.dtype))
    if not set(parts) <= {*FULL, *EXTRA}:
        updates.append(_read_kohya_factors(source, module, parts))
    path = PREFIX.sub("", module, count=1)
    return [
        replace(update, base_weight=update.weight.replace(module, path, 1)) for update in updates
    ]


def _read_kohya_factors(source: AdapterFiles, module: str, parts: dict[str, str]) -> WeightUpdate:
    """Return the update of a module by its factors: of LoRA, LoHa or LoKr, with or without DoRA."""

    def find_scale(rank: int | None) -> Scale:
        """Return s, given the rank of the factors."""
        # If both sides of LoKr are stored in full there is no rank, and LyCORIS does not scale.
        return Scale() if rank is None else make_scale(source, parts.get("alpha", ""), rank)

    if "hada_w1_a" in parts:
        update = lycoris.read_hadamard(source, module, parts, find_scale)
    elif any(part in lycoris.LOKR for part in parts):
        update = lycoris.read_kronecker(source, module, parts, find_scale)
    else:
        if missing := [part for part in LORA[:2] if part not in parts]:
            problem = (
                f"{module} has no {missing[0]}, only {next(iter(parts.values()))}, so the "
                "file is incomplete"
            )
            raise damaged(source.path, problem)
        up, down, mid = (parts.get(part) for part in LORA)
        update = _make_update(source, module, str(up), str(down), mid, find_scale)
    if "dora_scale" not in parts:
        return update
    shape = source.checkpoint[parts["dora_scale"]].shape
    if not shape:
        raise damaged(source.path, f"{parts['dora_scale']} is a single number instead of a vector")
    by_column = shape[0] == 1 and len(shape) > 1 and math.prod(shape) == shape[1] != 1
    return add_magnitude(update, source, parts["dora_scale"], by_column)


def _make_update(
    source: AdapterFiles, module: str, up_key: str, down_key: str, mid: str | None, find_scale: Any
) -> WeightUpdate:
    """Return the update by two factors, ``(out, r, 1, …)`` and ``(r, in, …)``, and the core of a
    convolution if any.

    ``find_scale`` returns s, given r.

    Raises:
        InputError: Their shapes are inconsistent.
    """
    up, down = source.checkpoint[up_key].shape, source.checkpoint[down_key].shape
    if len(up) < 2 or len(down) < 2 or math.prod(up[1:]) != down[0] or 0 in (*up, *down):
        raise damaged(
            source.path, f"{module}: up {list(up)} and down {list(down)} do not fit together"
        )
    core = source.checkpoint[mid].shape if mid else ()
    if mid and (core[:2] != (up[1], down[0]) or math.prod(down[2:]) != 1):
        raise damaged(source.path, f"{module}: lora_mid {list(core)} does not fit up and down")
    scale: Scale = find_scale(down[0])
    return WeightUpdate(
        f"{module}.weight",
        (up[0], down[1] * math.prod(core[2:] if mid else down[2:])),
        partial(load_factors, source.checkpoint, (up_key, down_key, mid), scale),
        factored=True,
        dtype=source.checkpoint[up_key].dtype,
        zero_if=up_key,
        rank=down[0],
        scale=scale.known,
        alpha=scale.alpha,
        thin=None if mid else find_thin_factors(source.checkpoint, up_key, down_key, scale),
    )


def load_factors(
    checkpoint: Checkpoint, keys: tuple[str, str, str | None], scale: Scale, site: UpdateSite
) -> Factors:
    """Return s·up ``(out, r)`` and down ``(r, in·kh·kw)``; with a core, down contracted with the
    core.
    """
    import torch

    up, down = (read(checkpoint, key).flatten(1) for key in keys[:2])
    if keys[2] is not None:
        down = torch.einsum("ij...,jp->ip...", read(checkpoint, keys[2]), down).flatten(1)
    return up * compute_scale(checkpoint, scale), down


def is_diffusers(source: AdapterFiles) -> bool:
    """Return whether a source is a file of diffusers."""
    if source.config is not None or not any(PIPELINE.match(name) for name in source.checkpoint):
        return False
    has_mark = source.checkpoint.files[0].path.name.startswith(FILE) or METADATA in source.metadata
    return has_mark or any(
        "transformer_blocks." in name or ".processor." in name for name in source.checkpoint
    )


def read_diffusers(source: AdapterFiles) -> AdapterReading:
    """Return the contents of a diffusers LoRA file.

    Raises:
        InputError: A tensor is unknown, a factor is missing, the factors do not fit together or
            contradict the metadata, or the metadata are invalid.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in source.checkpoint:
        match = PART.fullmatch(name)
        if match is None:
            fix = "check that the file is a diffusers adapter"
            raise damaged(source.path, f"{name} is not a tensor of a diffusers LoRA", fix)
        part = match["part"]
        if part == "alpha":
            _check_alpha(source, name)
        else:
            part = "down" if part in DOWN else "up"
        module = match["module"]
        # ``attn1.processor.to_q`` is ``attn1.to_q``, ``to_out`` is ``to_out.0``; in CLIP,
        # ``q_proj``.
        if match["old"]:
            is_clip = module.startswith("text_encoder")
            pattern, new = (r"\.to_(\w+)$", r".\1_proj") if is_clip else (r"\.to_out$", ".to_out.0")
            module = re.sub(pattern, new, module.replace(".processor", ""))
        modules.setdefault(module, {})[part] = name
    without_alpha = [module for module, parts in modules.items() if "alpha" not in parts]
    scalings = _read_scalings(source, without_alpha)
    updates = []
    for module, parts in modules.items():
        if "up" not in parts or "down" not in parts:
            raise damaged(
                source.path, f"{module} has only one of its two factors, so the file is incomplete"
            )
        find_scale = partial(make_scale, source, parts.get("alpha", ""))
        if module in scalings:
            find_scale = partial(_find_scale, scalings[module], module)
        updates.append(_make_update(source, module, parts["up"], parts["down"], None, find_scale))
    notes = source.note_missing_alpha(
        [module for module in without_alpha if module not in scalings], "diffusers"
    )
    kind = f"diffusers LoRA, r={format_ranks(updates)}, {len(modules)} modules"
    return AdapterReading(
        kind, tuple(updates), (), tuple(notes), scaling="alpha / r, from the file or its metadata"
    )


def _read_scalings(source: AdapterFiles, modules: list[str]) -> dict[str, Scaling]:
    """Return the scaling of each given module for whose component of the pipeline the metadata have
    settings.
    """
    where = f"{METADATA} in the file's metadata"
    try:
        settings = loads(source.metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise damaged(source.path, f"{where} is not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise damaged(source.path, f"{where} must be a JSON object")
    path = Path(f"{source.path} ({METADATA})")
    scalings: dict[str, Scaling] = {}
    for prefix in dict.fromkeys(f"{module.partition('.')[0]}." for module in modules):
        values = {
            key.removeprefix(prefix): value
            for key, value in settings.items()
            if key.startswith(prefix)
        }
        component_modules = (
            [module for module in modules if module.startswith(prefix)] if values else []
        )
        scaling = Scaling.read(
            Config(path, values), [module.removeprefix(prefix) for module in component_modules]
        )
        scalings |= dict.fromkeys(component_modules, scaling)
    return scalings


def _find_scale(scaling: Scaling, module: str, rank: int) -> Scale:
    """Return s of a module, after checking its rank against the metadata."""
    path_in_component = module.partition(".")[2]
    if (expected := scaling.rank(path_in_component)) != rank:
        raise damaged(
            scaling.config.path, f"{module} has rank {rank}, but {expected} in the metadata"
        )
    return Scale(scaling.of_module(path_in_component))


FAMILIES = (
    Family(
        "kohya and LyCORIS",
        is_kohya,
        read_kohya,
        "kohya",
        marks=("lora_up", "lora_down", "lora_mid", "w_norm", "b_norm"),
        starts=(
            "lora_unet_",
            "lora_te_",
            "lora_te1_",
            "lora_te2_",
            "lora_te3_",
            "lora_transformer_",
        ),
    ),
    Family("diffusers", is_diffusers, read_diffusers, "diffusers", marks=("lora.up", "lora.down")),
)
