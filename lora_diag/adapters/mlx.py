"""MLX (mlx-lm): ``adapters.safetensors`` and a config with ``fine_tune_type``; ΔW = scale·(a·b)ᵀ,
not divided by r.

``lora_a`` is ``(in, r)`` and ``lora_b`` ``(r, out)``, transposed with respect to PEFT. Those of an
embedding are ``(vocab, r)`` and ``(r, dim)``, with ΔW = scale·a·b: names tell which modules are
embeddings, or else the length of ``m``. DoRA's magnitudes are ``m``, the lengths of the rows of
either.

Reference: ml-explore/mlx-lm ``mlx_lm/tuner/lora.py``, ``dora.py``.
"""

from __future__ import annotations

from functools import partial

from lora_diag.adapters.lora import add_magnitude
from lora_diag.adapters.patterns import Scale
from lora_diag.adapters.source import AdapterFiles, Config, group_by_module
from lora_diag.adapters.thin import find_thin_factors
from lora_diag.adapters.updates import AdapterReading, Family, NewValue, WeightUpdate, load_product
from lora_diag.deltas import is_table
from lora_diag.errors import damaged


def is_mlx(source: AdapterFiles) -> bool:
    """Return whether a source is an adapter of mlx-lm."""
    if source.peft_type:
        return False
    has_factors = any(name.endswith((".lora_a", ".lora_b")) for name in source.checkpoint)
    return has_factors or (source.config is not None and "fine_tune_type" in source.config)


def read_mlx(source: AdapterFiles) -> AdapterReading:
    """Return the contents of an MLX adapter, or of a full fine-tune by mlx-lm, whose weights are
    new values.

    Raises:
        InputError: There is no config or no scale, and no α was given; the config is invalid; a
            factor is missing; the file holds several adapters; or the factors contradict each other
            or the config.
    """
    config = (
        source.settings
        if source.stated_alpha is None or source.config is not None
        else Config(source.path, {})
    )
    if config.text("fine_tune_type") == "full":
        return AdapterReading(
            "MLX full fine-tune", (), tuple(NewValue(key, key) for key in source.checkpoint)
        )
    settings = Config(config.path, config.table("lora_parameters"))
    scale = settings.number("scale") if "scale" in settings else None
    if scale is None and source.stated_alpha is None:
        problem = "lora_parameters has no scale, so the scaling of this adapter is unknown"
        raise damaged(config.path, problem, "give it with $alpha")
    modules, unclaimed = group_by_module(source.checkpoint, ("lora_a", "lora_b", "m"), source.path)
    updates = [
        _read_update(source, module, parts, scale, settings) for module, parts in modules.items()
    ]
    values = tuple(NewValue(key, key) for key in unclaimed)
    notes = source.note_missing_alpha(list(modules), "mlx-lm") if scale is None else []
    scale_text = "α/r" if scale is None else f"{scale:g}"
    kind = (
        f"MLX {'DoRA' if config.text('fine_tune_type') == 'dora' else 'LoRA'}, scale={scale_text}"
    )
    scaling = (
        "the given α over r" if scale is None else f"lora_parameters.scale, from {config.path.name}"
    )
    return AdapterReading(
        f"{kind}, {len(modules)} modules", tuple(updates), values, tuple(notes), scaling=scaling
    )


def _read_update(
    source: AdapterFiles,
    module: str,
    parts: dict[str, str],
    config_scale: float | None,
    settings: Config,
) -> WeightUpdate:
    """Return the update of one module, given the scale of the config, if it has one."""
    if "lora_a" not in parts or "lora_b" not in parts:
        raise damaged(
            source.path, f"{module} has only {', '.join(sorted(parts))}, so the file is incomplete"
        )
    a, b = (source.checkpoint[parts[part]].shape for part in ("lora_a", "lora_b"))
    if len(a) != 2 or len(b) != 2 or a[1] != b[0] or 0 in (*a, *b):
        problem = f"{module}: lora_a {list(a)} and lora_b {list(b)} are not (in, r) and (r, out)"
        raise damaged(source.path, problem)
    if "rank" in settings and settings.integer("rank") != a[1]:
        problem = (
            f"{module} has rank {a[1]}, but {settings.path.name} says {settings.integer('rank')}"
        )
        raise damaged(source.path, problem, "give the config that this adapter was trained with")
    scale = config_scale if config_scale is not None else source.scale_without_alpha(a[1])
    weight, key = f"{module}.weight", parts["lora_b"]
    is_embedding = is_table(weight) or (
        "m" in parts and source.checkpoint[parts["m"]].numel == a[0] != b[1]
    )
    shape = (a[0], b[1]) if is_embedding else (b[1], a[0])
    keys = (parts["lora_a"], key) if is_embedding else (key, parts["lora_a"])
    update = WeightUpdate(
        weight,
        shape,
        partial(load_product, source.checkpoint, *keys, scale, not is_embedding),
        factored=True,
        dtype=source.checkpoint[key].dtype,
        zero_if=key,
        rank=a[1],
        scale=scale,
        thin=find_thin_factors(source.checkpoint, *keys, Scale(scale), turned=not is_embedding),
    )
    return add_magnitude(update, source, parts["m"], by_column=False) if "m" in parts else update


FAMILY = Family("MLX", is_mlx, read_mlx, "mlx", marks=("lora_a", "lora_b"))
