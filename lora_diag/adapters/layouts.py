"""Layouts of portable adapters: the names of the two factors of a weight, and the config.

Reference: ``peft``; kohya-ss/sd-scripts ``networks/lora.py``; ``diffusers.loaders``;
ml-explore/mlx-lm ``tuner/lora.py``; ggml-org/llama.cpp ``convert_lora_to_gguf.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lora_diag.adapters.contents import Contents, Item, parse_component
from lora_diag.adapters.gguf import ALPHA, TABLE
from lora_diag.adapters.names import drop_leading_wrappers
from lora_diag.adapters.source import PREFIX, is_named
from lora_diag.adapters.writing import LORA_CONFIG, WEIGHTS
from lora_diag.deltas import has_tied_head
from lora_diag.errors import Given, InputError, UsageError, damaged
from lora_diag.storage import Checkpoint
from lora_diag.storage.gguf_model import ARCHITECTURES, Names, find_names, heads

GGUF = "gguf"
PEFT = "peft"

# kohya's prefixes -> parts of a pipeline, and the inverse.
_COMPONENT_BY_PREFIX = {
    "lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2", "lora_transformer": "transformer",
}  # fmt: skip
_PREFIX_BY_COMPONENT = {
    "unet": "lora_unet",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
}

# Fields of a config on training and on the adapted modules, which are kept.
_KEPT = (
    "base_model_name_or_path", "task_type", "auto_mapping", "fan_in_fan_out", "exclude_modules",
    "layers_to_transform", "layers_pattern", "revision",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Placed:
    """The factors of one weight, to be placed in a file.

    Args:
        item: The weight's contents in the adapter's file.
        rank: The rank of the factors.
        shape: ``(out, in)``.
    """

    item: Item
    rank: int
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One tensor of a file.

    Args:
        placed: The weight that the tensor is a factor of; None for a number.
        side: Which factor.
        turned: Whether the factor is stored transposed.
        shape: The shape if the tensor is no matrix, with 0 for the common rank; else empty.
        heads: Number of heads whose rows are reordered for llama.cpp; 0 for none.
        value: The number.
    """

    placed: Placed | None
    side: Literal["A", "B"] = "A"
    turned: bool = False
    shape: tuple[int, ...] = ()
    heads: int = 0
    value: float = 0.0

    def sizes(self, rank: int) -> tuple[int, ...]:
        """Return the shape in the file, given the common rank; () for a number."""
        if self.placed is None:
            return ()
        if self.shape:
            return tuple(size or rank for size in self.shape)
        out, columns = self.placed.shape
        size = (rank, columns) if self.side == "A" else (out, rank)
        return size[::-1] if self.turned else size


Plan = dict[str, TensorSlot]

# Every tensor of a file, and the config.
Planned = tuple[Plan, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """A layout of files.

    Args:
        file: Name of the weights file.
        plan: Takes the weights, the adapter, BASE and the common rank; returns every tensor, and
            the config.
        unsupported: Returns the reason why its program cannot load a weight or it cannot be
            written; else empty.
    """

    file: str
    plan: Callable[[Sequence[Placed], Contents, Checkpoint | None, int], Planned]
    unsupported: Callable[[Item, Contents], str] = lambda item, contents: ""


def why_not_tied(form: str, item: Item) -> str:
    """Return why llama.cpp (``gguf``) or mlx-lm (``mlx``) fails to load an update where the head is
    tied; empty if not.

    llama.cpp b11739 applies the update of the embedding to the head, whose shapes then do not fit,
    and aborts: ``GGML_ASSERT(ggml_can_mul_mat(a, b))``.
    """
    if item.tied_role == "head":
        return "the head is tied to the embedding, and the program has no tensor for it"
    if item.tied_role == "embedding" and form == GGUF:
        return (
            "the head is tied to the embedding, and llama.cpp aborts as it applies the update "
            "to both"
        )
    return ""


def _plan_pair(placed: Placed, a: str, b: str) -> Plan:
    """Return the slots of the two factors of a linear layer or a convolution, by their names ``a``
    and ``b``.
    """
    kernel = placed.item.kernel
    if not kernel:
        return {a: TensorSlot(placed, "A"), b: TensorSlot(placed, "B")}
    of_b = (placed.item.shape[0], 0, *(1 for _ in kernel[1:]))
    return {a: TensorSlot(placed, "A", shape=(0, *kernel)), b: TensorSlot(placed, "B", shape=of_b)}


def _make_path(item: Item, contents: Contents) -> str:
    """Return the dotted path of a module in its model.

    Raises:
        InputError: The path is known only with BASE, which is missing.
    """
    if contents.form != "kohya":
        return item.module if contents.form != "diffusers" else item.module.partition(".")[2]
    if parse_component(item.layer) == parse_component(item.module):
        raise InputError(
            f"{item.module}: its underscores and dots cannot be distinguished without BASE; give "
            "BASE"
        )
    return item.layer.removesuffix(".weight")


def _find_component(item: Item, contents: Contents, base: Checkpoint | None) -> str:
    """Return the part of a pipeline that a weight is in; for an unknown prefix of kohya, the
    prefix.

    Raises:
        InputError: The adapter does not name the part, and BASE is missing or is no U-Net or
            transformer.
    """
    if contents.form == "diffusers":
        return parse_component(item.module)
    if contents.form == "kohya":
        return _COMPONENT_BY_PREFIX.get(parse_component(item.module), parse_component(item.module))
    name = str(base.config.get("_class_name", "")) if base is not None else ""
    if "UNet" not in name and "Transformer" not in name:
        fix = "give as BASE the folder of a U-Net or transformer with its config.json (_class_name)"
        raise damaged(item.module, "which part of a pipeline it belongs to is not known", fix)
    return "unet" if "UNet" in name else "transformer"


def _to_peft(
    placed: Sequence[Placed], contents: Contents, base: Checkpoint | None, rank: int
) -> Planned:
    """Return the tensors of a PEFT adapter, and its config."""
    plan: Plan = {}
    modules = [_make_path(weight.item, contents) for weight in placed]
    for path, weight in zip(modules, placed, strict=True):
        if weight.item.is_table:  # ΔW = (B·A)ᵀ of what PEFT stores
            plan[f"{PREFIX}{path}.lora_embedding_A"] = TensorSlot(weight, "B", turned=True)
            plan[f"{PREFIX}{path}.lora_embedding_B"] = TensorSlot(weight, "A", turned=True)
        else:
            plan |= _plan_pair(
                weight, f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"
            )
    kept_fields = {
        key: contents.config.get(key) for key in _KEPT if contents.config.get(key) is not None
    }
    names = contents.config.get("target_modules") if contents.form == "peft" else None
    targets = sorted(set(modules))
    if isinstance(names, list) and names:
        targets = [name for name in names if any(is_named(module, name) for module in modules)]
    config = {
        "base_model_name_or_path": str(base.path) if base is not None else None,
        "task_type": None,
        "fan_in_fan_out": False,
        **kept_fields,
        **LORA_CONFIG,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
        "bias": "none",
    }
    del config["peft_version"]  # PEFT before 0.14 fails at a field that it does not know
    return plan, config


def _to_kohya(
    placed: Sequence[Placed], contents: Contents, base: Checkpoint | None, rank: int
) -> Planned:
    """Return the tensors of a kohya file; it has no config."""
    plan: Plan = {}
    for weight in placed:
        module = weight.item.module
        if contents.form != "kohya":
            component = _find_component(weight.item, contents, base)
            prefix = _PREFIX_BY_COMPONENT.get(component, f"lora_{component}")
            module = f"{prefix}_{_make_path(weight.item, contents).replace('.', '_')}"
        plan |= _plan_pair(weight, f"{module}.lora_down.weight", f"{module}.lora_up.weight")
        plan[f"{module}.alpha"] = TensorSlot(None, value=float(rank))
    return plan, {}


def _to_diffusers(
    placed: Sequence[Placed], contents: Contents, base: Checkpoint | None, rank: int
) -> Planned:
    """Return the tensors of a diffusers file; it has no config."""
    plan: Plan = {}
    for weight in placed:
        module = (
            f"{_find_component(weight.item, contents, base)}.{_make_path(weight.item, contents)}"
        )
        plan |= _plan_pair(weight, f"{module}.lora_A.weight", f"{module}.lora_B.weight")
    return plan, {}


def _to_mlx(
    placed: Sequence[Placed], contents: Contents, base: Checkpoint | None, rank: int
) -> Planned:
    """Return the tensors of an MLX adapter, and its config."""
    plan: Plan = {}
    keys = set()
    for weight in placed:
        path = _make_path(weight.item, contents)
        _, layers, inside = path.partition("layers.")
        keys.add(inside.partition(".")[2] if layers else path)
        is_table = weight.item.is_table  # LoRAEmbedding has (vocab, r) and (r, dim)
        plan[f"{path}.lora_a"] = (
            TensorSlot(weight, "B") if is_table else TensorSlot(weight, "A", turned=True)
        )
        plan[f"{path}.lora_b"] = (
            TensorSlot(weight, "A") if is_table else TensorSlot(weight, "B", turned=True)
        )
    settings = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    return plan, {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": settings}


def _why_unsupported(form: str, item: Item, contents: Contents) -> str:
    """Return the reason why llama.cpp or mlx-lm cannot load an item, or why it cannot be written;
    empty without one.
    """
    if item.part == "convolution":
        return f"{'llama.cpp' if form == GGUF else 'mlx-lm'} has no LoRA for a convolution"
    if form == contents.form == GGUF and "_exps." in item.key:
        return "stacks of experts are not written in GGUF"
    return why_not_tied(form, item) if contents.tied else ""


def _to_gguf(
    placed: Sequence[Placed], contents: Contents, base: Checkpoint | None, rank: int
) -> Planned:
    """Return the tensors of a GGUF adapter, and the fields of its header."""
    names = _find_gguf_names(contents, base)
    plan: Plan = {}
    for weight in placed:
        name = _convert_to_gguf_name(weight.item, names, contents)
        if name == TABLE:
            plan[f"{name}.lora_a"] = TensorSlot(weight, "B")
            plan[f"{name}.lora_b"] = TensorSlot(weight, "A", turned=True)
            continue
        count = 0
        if base is not None and (key := names.heads_key(name) if names is not None else ""):
            count = heads(base.config, key) or 0
            if not count or weight.shape[0] % (2 * count):
                problem = (
                    f"its config.json gives {count or 'no'} heads ({key}) for the "
                    f"{weight.shape[0]} rows"
                )
                fix = "give the folder of the model that the adapter was trained on"
                raise damaged(base.path, f"{problem} of {weight.item.layer}", fix)
        plan[f"{name}.lora_a"] = TensorSlot(weight, "A")
        plan[f"{name}.lora_b"] = TensorSlot(weight, "B", heads=count)
    architecture = (
        names.architecture if names is not None else str(contents.config["general.architecture"])
    )
    fields = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
    }
    return plan, {**fields, ALPHA: float(rank)}


def _find_gguf_names(contents: Contents, base: Checkpoint | None) -> Names | None:
    """Return the names of the model's architecture; None for a GGUF adapter with unknown names,
    which are kept.

    Raises:
        InputError: BASE is missing, or its architecture is unsupported.
    """
    if contents.form == GGUF:
        return ARCHITECTURES.get(str(contents.config.get("general.architecture")))
    if base is None:
        raise InputError(
            "GGUF: llama.cpp's names and row order depend on the model; give BASE, too"
        )
    if (names := find_names(base.config)) is None:
        known = ", ".join(kind for each in ARCHITECTURES.values() for kind in each.model_types)
        problem = (
            f"llama.cpp's names for model type {base.config.get('model_type')!r} are not known"
        )
        raise damaged(base.path, problem, f"known are {known}")
    return names


def _convert_to_gguf_name(item: Item, names: Names | None, contents: Contents) -> str:
    """Return the name of a weight in a GGUF file.

    Raises:
        InputError: The name is unknown.
    """
    if contents.form == GGUF:
        return item.key.removesuffix(".lora_b").removesuffix(".lora_a")
    weight = f"{item.module}.weight"
    unwrapped = drop_leading_wrappers(weight)
    candidates = (weight, f"model.{unwrapped}", unwrapped)
    converted = (
        next(filter(None, map(names.in_gguf, candidates)), None) if names is not None else None
    )
    if converted is None:
        raise InputError(
            f"{item.layer}: has no name in llama.cpp's table for this model; leave it out of the "
            "adapter"
        )
    return converted


LAYOUTS = {
    "peft": AdapterLayout(WEIGHTS, _to_peft),
    "kohya": AdapterLayout("lora.safetensors", _to_kohya),
    "diffusers": AdapterLayout("pytorch_lora_weights.safetensors", _to_diffusers),
    "mlx": AdapterLayout("adapters.safetensors", _to_mlx, partial(_why_unsupported, "mlx")),
    GGUF: AdapterLayout("adapter.gguf", _to_gguf, partial(_why_unsupported, GGUF)),
}


def check_layout(form: str, placed: Sequence[Placed], base: Checkpoint) -> None:
    """Refuse weights of a PEFT adapter of BASE that a layout cannot represent.

    Args:
        form: One of ``LAYOUTS``.
        placed: The weights, their modules in PEFT's names; ranks do not count.
        base: BASE.

    Raises:
        UsageError: There is no such layout.
        InputError: The layout cannot represent a weight, or BASE does not determine its name or row
            order there.
    """
    if form not in LAYOUTS:
        raise UsageError(Given("format", form), f"use {', '.join(LAYOUTS)}")
    contents = Contents(PEFT, tuple(part.item for part in placed), tied=has_tied_head(base))
    for item in contents.items:
        if reason := LAYOUTS[form].unsupported(item, contents):
            raise InputError(item.layer, reason, "leave it out with $exclude")
    LAYOUTS[form].plan(placed, contents, base, 1)
