"""diffusers: ``pytorch_lora_weights.safetensors``, with keys that begin with the pipeline's component (``unet.``).

s = α/r with α from an ``.alpha`` tensor or from the file's ``lora_adapter_metadata``; without either diffusers uses α =
r, so s = 1, which is noted.

Reference: ``diffusers.loaders``, ``diffusers.utils.peft_utils.get_peft_kwargs``.
"""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

from lora_diag.adapters.kohya import factors, shapes_of
from lora_diag.adapters.patterns import Scale, Scaling, scale_in
from lora_diag.adapters.source import Config, Source
from lora_diag.adapters.thin import thin_factors
from lora_diag.adapters.updates import Reading, Update
from lora_diag.errors import InputError

PIPELINE = re.compile(r"(unet|text_encoder(_\d)?|transformer(_\d)?|prior|controlnet)\.")
FILE = "pytorch_lora_weights"
METADATA = "lora_adapter_metadata"

# Names of the two factors in current diffusers, and before PEFT; and of α.
PART = re.compile(
    r"(?P<module>.+?)(?:\.lora\.|\.|(?P<old>_lora\.))(?P<part>lora_A|lora_B|lora_down|lora_up|down|up|alpha)(\.weight)?"
)
DOWN = {"lora_A", "lora_down", "down"}


def is_diffusers(source: Source) -> bool:
    """Return whether this family reads the adapter."""
    if source.config is not None or not any(PIPELINE.match(name) for name in source.checkpoint):
        return False
    has_mark = source.checkpoint.files[0].path.name.startswith(FILE) or METADATA in source.metadata
    return has_mark or any("transformer_blocks." in name or ".processor." in name for name in source.checkpoint)


def read_diffusers(source: Source) -> Reading:
    """Read a diffusers LoRA file.

    Raises:
        InputError: A tensor is unknown, a factor is missing, the factors do not fit together or to the metadata, or the
            metadata are invalid.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in source.checkpoint:
        match = PART.fullmatch(name)
        if match is None:
            raise InputError(
                f"{source.path}: {name} is not a tensor of a diffusers LoRA; check that the file is a diffusers adapter"
            )
        part = "alpha" if match["part"] == "alpha" else "down" if match["part"] in DOWN else "up"
        modules.setdefault(_parse_module(match["module"], bool(match["old"])), {})[part] = name
    without_alpha = [module for module, parts in modules.items() if "alpha" not in parts]
    scalings = _read_scalings(source, without_alpha)
    updates = [_read_update(source, module, parts, scalings.get(module)) for module, parts in modules.items()]
    without_scale = [module for module in without_alpha if module not in scalings]
    notes = source.note_missing_alpha(without_scale, "diffusers")
    ranks = sorted({update.rank or 0 for update in updates})
    kind = f"diffusers LoRA, r={'-'.join(map(str, ranks[:: max(1, len(ranks) - 1)]))}, {len(modules)} modules"
    return Reading(kind, tuple(updates), (), tuple(notes), scaling="alpha / r, from the file or its metadata")


def _parse_module(module: str, old_style: bool) -> str:
    """Return the module of a key; ``attn1.processor.to_q_lora`` is ``attn1.to_q``; ``to_out`` is ``to_out.0``."""
    if not old_style:
        return module
    name = module.replace(".processor", "")
    return f"{name}.0" if name.endswith(".to_out") else name


def _read_settings(source: Source) -> dict[str, Any]:
    """Return the settings in the file's metadata; empty without any."""
    text = source.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{source.path}: {METADATA} in the file's metadata is not valid JSON ({error}); save the adapter again"
        ) from error
    if not isinstance(values, dict):
        raise InputError(
            f"{source.path}: {METADATA} in the file's metadata must be a JSON object; save the adapter again"
        )
    return values


def _read_scalings(source: Source, modules: list[str]) -> dict[str, Scaling]:
    """Return the scaling of each module for whose component of the pipeline the metadata has settings."""
    settings = _read_settings(source)
    path = Path(f"{source.path} ({METADATA})")
    scalings: dict[str, Scaling] = {}
    for prefix in dict.fromkeys(f"{module.partition('.')[0]}." for module in modules):
        values = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        component_modules = [module for module in modules if module.startswith(prefix)] if values else []
        scaling = Scaling.of(Config(path, values), [module.removeprefix(prefix) for module in component_modules])
        scalings |= dict.fromkeys(component_modules, scaling)
    return scalings


def _read_update(source: Source, module: str, parts: dict[str, str], scaling: Scaling | None) -> Update:
    if "up" not in parts or "down" not in parts:
        raise InputError(
            f"{source.path}: {module} has only one of its two factors, so the file is incomplete; save it again"
        )
    up, down = shapes_of(source, module, parts["up"], parts["down"])
    if "alpha" in parts and source.checkpoint[parts["alpha"]].numel != 1:
        raise InputError(f"{source.path}: {parts['alpha']} must be a single number; save the adapter again")
    scale = scale_in(source, parts.get("alpha", ""), down[0])
    if scaling is not None:
        scale = Scale(_find_scale(scaling, module, down[0]))
    load = partial(factors, source.checkpoint, (parts["up"], parts["down"], None), scale)
    shape = (up[0], math.prod(down[1:]))
    key = parts["up"]
    dtype = source.checkpoint[key].dtype
    return Update(
        f"{module}.weight",
        shape,
        load,
        True,
        dtype,
        zero_if=key,
        rank=down[0],
        scale=scale.known,
        alpha=scale.alpha,
        thin=thin_factors(source.checkpoint, parts["up"], parts["down"], scale),
    )


def _find_scale(scaling: Scaling, module: str, rank: int) -> float:
    """Return s of a module, after checking its rank against the metadata."""
    path_in_component = module.partition(".")[2]
    if (expected := scaling.rank(path_in_component)) != rank:
        path = scaling.config.path
        raise InputError(f"{path}: {module} has rank {rank}, but {expected} in the metadata; save the adapter again")
    return scaling.of_module(path_in_component)
