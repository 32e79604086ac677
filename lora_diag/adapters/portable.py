"""An adapter → one that every program scales alike: one rank, α = r, the scaling in B, plain names, no patterns.

Factors of a lower rank are filled up with zeros: B·A stays what it is, and α/r and α/√… are 1 whatever a program
divides by, as long as it is α = r over that one rank. What is no pair of factors has no place in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.adapters.adapter import Adapter
from lora_diag.adapters.contents import Contents, Item, component_of, contents_of
from lora_diag.adapters.keys import PREFIX
from lora_diag.adapters.source import CONFIG
from lora_diag.adapters.updates import Site, as_float64
from lora_diag.adapters.writing import PEFT_VERSION, WEIGHTS
from lora_diag.checkpoints import Checkpoint, TensorInfo
from lora_diag.checkpoints.writing import write_safetensors
from lora_diag.deltas import Delta, FactoredDelta
from lora_diag.errors import InputError, UsageError
from lora_diag.files import check_folder_of, sync, write_whole

if TYPE_CHECKING:
    import torch

# kohya's prefixes and the parts of a pipeline that they mean, and back.
_PARTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_transformer": "transformer",
}
_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}

# What a config says of training, and of the modules that are adapted, and so may stay.
_KEPT = (
    "base_model_name_or_path",
    "task_type",
    "auto_mapping",
    "fan_in_fan_out",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "revision",
)


@dataclass(frozen=True, slots=True)
class Factored:
    """The factors of one weight as they will be written, before they are filled up to the common rank.

    Args:
        item: What the adapter's file holds of it.
        b: s·B ``(out, r)``, float64.
        a: A ``(r, in)``, float64.
        epsilon: ‖ΔW − s·B·A‖_F / ‖ΔW‖_F; above 0 only where a full-rank update was truncated.
    """

    item: Item
    b: torch.Tensor
    a: torch.Tensor
    epsilon: float = 0.0


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Args:
        rank: r of every pair of factors, and α.
        dtype: Of the factors.
        truncated: ε of every weight whose update was truncated.
        lost: What has no place in it, with the reason.
    """

    rank: int
    dtype: str
    truncated: Mapping[str, float]
    lost: Mapping[str, str]


def why_not_portable(item: Item, has_delta: bool, dora_to_lora: bool) -> str:
    """Return why an item has no place in a portable adapter; empty if it has.

    Args:
        item: The item.
        has_delta: Whether its ΔW against BASE is known.
        dora_to_lora: Whether DoRA may be truncated to its rank.
    """
    if item.part == "dora":
        if not dora_to_lora:
            return "DoRA; --dora-to-lora writes the nearest LoRA of its rank"
        return "" if has_delta else "DoRA is relative to the base weight; give BASE"
    if item.part == "residual":
        return "" if has_delta else "its initialisation changed the base; give BASE"
    if item.part == "experts":
        return "stacked experts (target_parameters)"
    if item.part not in {"factors", "embedding", "convolution"}:
        return {"bias": "a bias", "rows": "rows of an embedding", "other": "no LoRA"}.get(item.part, "a weight in full")
    return "a part of an nn.MultiheadAttention" if ".base_layer.out_proj." in item.key else ""


def factored(
    contents: Contents, deltas: Mapping[str, Delta], dora_to_lora: bool
) -> tuple[list[Factored], dict[str, str]]:
    """Return the factors of every weight that has a place in a portable adapter, and why the others have none."""
    found: list[Factored] = []
    lost: dict[str, str] = {}
    for item in contents.items:
        delta = deltas.get(item.layer)
        if reason := why_not_portable(item, delta is not None, dora_to_lora):
            lost[item.layer] = reason
        else:
            found.append(_factors(item, delta))
    return found, lost


def _factors(item: Item, delta: Delta | None) -> Factored:
    if item.part in {"dora", "residual"}:
        assert delta is not None
        if isinstance(delta, FactoredDelta):
            b, a = delta.load()
            return Factored(item, *(_turned(b, a) if _is_turned(item, delta) else (b, a)))
        return _nearest(item, delta)
    assert item.load is not None
    loaded = item.load(Site(item.shape))
    assert isinstance(loaded, tuple)
    return Factored(item, *loaded)


def _is_turned(item: Item, delta: Delta) -> bool:
    """Say whether BASE stores a weight ``(in, out)``."""
    return delta.shape != item.shape and delta.shape == item.shape[::-1]


def _turned(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return a.T, b.T


def _nearest(item: Item, delta: Delta) -> Factored:
    """Return the nearest update of the item's rank to a ΔW that is formed: U_rΣ_r and V_rᵀ (Eckart and Young 1936)."""
    import torch

    assert not isinstance(delta, FactoredDelta)
    assert item.rank is not None
    load: Callable[[], torch.Tensor] = delta.load  # type: ignore[union-attr]
    whole = as_float64(load())
    if _is_turned(item, delta):
        whole = whole.T
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    rank = min(item.rank, len(s))
    norm = float(torch.linalg.vector_norm(s))
    epsilon = float(torch.linalg.vector_norm(s[rank:])) / norm if norm else 0.0
    return Factored(item, u[:, :rank] * s[:rank], vh[:rank], epsilon)


def write_portable(
    adapter: Adapter,
    folder: Path,
    base: Checkpoint | None = None,
    form: str | None = None,
    dora_to_lora: bool = False,
    leave_out: bool = False,
) -> Written:
    """Write a portable copy of an adapter.

    Args:
        adapter: The adapter.
        folder: Where; must not be there yet.
        base: Its BASE, where names or updates take it.
        form: ``peft``, ``kohya``, ``diffusers`` or ``mlx``; by default that of the adapter.
        dora_to_lora: Write the nearest LoRA of its rank for DoRA.
        leave_out: Leave out what has no place in it, instead of stopping.

    Raises:
        UsageError: Something is at ``folder``.
        InputError: Something has no place in a portable adapter, or names in the other layout take a BASE.
    """
    form = form or adapter.form
    if form not in WRITERS:
        raise UsageError(f"--format {form}: use {', '.join(WRITERS)}")
    _refuse_existing(folder)
    contents = contents_of(adapter, base)
    deltas: dict[str, Delta] = {}
    if base is not None:
        deltas = {delta.layer: delta for delta in adapter.pair(base)[0].deltas}
    found, lost = factored(contents, deltas, dora_to_lora)
    if lost and not leave_out:
        raise InputError(f"{adapter.path}: {_named(lost)}; --leave-out writes the adapter without")
    if not found:
        raise InputError(f"{adapter.path}: nothing of it has a place in a portable adapter: {_named(lost)}")
    rank = max(part.b.shape[1] for part in found)
    dtype = _dtype(found, adapter)
    tensors, config = WRITERS[form](found, contents, base, rank)
    _write(folder, FILES[form], _padded(tensors, rank, dtype), config)
    truncated = {part.item.layer: part.epsilon for part in found if part.item.part == "dora"}
    return Written(rank, dtype, truncated, lost)


def _named(lost: Mapping[str, str]) -> str:
    """Name what has no place, by reasons."""
    reasons: dict[str, list[str]] = {}
    for layer, reason in lost.items():
        reasons.setdefault(reason, []).append(layer)
    return "; ".join(
        f"{layers[0]}{f' and {len(layers) - 1} more' if len(layers) > 1 else ''}: {reason}"
        for reason, layers in reasons.items()
    )


def _refuse_existing(folder: Path) -> None:
    check_folder_of(folder)
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder}: is there already; choose another folder for the adapter")


def _dtype(found: Sequence[Factored], adapter: Adapter) -> str:
    """Return the stored dtype if it holds every factor exactly, as with a scaling of 2; else float32."""
    import torch

    stored = {update.dtype for update in adapter.reading.updates}
    if len(stored) == 1:
        (name,) = stored
        dtype = getattr(torch, name)
        if all(torch.equal(as_float64(x.to(dtype)), x) for part in found for x in (part.b, part.a)):
            return name
    return "float32"


# Name of a tensor -> the matrix, its axis that is filled up to the common rank (-1 for none), and its shape if another.
Plan = dict[str, tuple["torch.Tensor", int, tuple[int, ...]]]


def _padded(plan: Plan, rank: int, dtype: str) -> dict[str, torch.Tensor]:
    """Fill factors up with zeros along the axis of the rank."""
    import torch

    found = {}
    for name, (matrix, axis, shape) in plan.items():
        size = list(matrix.shape)
        if axis >= 0:
            size[axis] = rank
        whole = torch.zeros(size, dtype=torch.float64)
        whole[tuple(slice(0, n) for n in matrix.shape)] = matrix
        kind = torch.float32 if axis < 0 else getattr(torch, dtype)  # bfloat16 does not hold every α
        found[name] = whole.to(kind).reshape(shape or size).contiguous()
    return found


def _kernels(item: Item, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B of a convolution; nothing for others."""
    if not item.kernel:
        return (), ()
    return (rank, *item.kernel), (item.shape[0], rank, *(1 for _ in item.kernel[1:]))


def _path(item: Item, contents: Contents) -> str:
    """Return the dotted path of a module in its model.

    Raises:
        InputError: Only BASE tells it.
    """
    if contents.form != "kohya":
        return item.module if contents.form != "diffusers" else item.module.partition(".")[2]
    if component_of(item.layer) == component_of(item.module):
        raise InputError(f"{item.module}: BASE tells which of its underscores are dots; give BASE")
    return item.layer.removesuffix(".weight")


def _component(item: Item, contents: Contents, base: Checkpoint | None) -> str:
    """Return the part of a pipeline that a weight is in.

    Raises:
        InputError: BASE is not such a part.
    """
    if contents.form == "diffusers":
        return component_of(item.module)
    if contents.form == "kohya":
        return _PARTS.get(component_of(item.module), component_of(item.module))
    name = str(base.config.get("_class_name", "")) if base is not None else ""
    if "UNet" in name:
        return "unet"
    if "Transformer" in name:
        return "transformer"
    raise InputError(
        f"{item.module}: which part of a pipeline it belongs to is not known; give as BASE the folder of a U-Net or "
        "transformer with its config.json (_class_name)"
    )


def _to_peft(
    found: Iterable[Factored], contents: Contents, base: Checkpoint | None, rank: int
) -> tuple[Plan, dict[str, Any]]:
    plan: Plan = {}
    modules = []
    for part in found:
        path = _path(part.item, contents)
        modules.append(path)
        shapes = _kernels(part.item, rank)
        if part.item.part == "embedding":  # ΔW = (B·A)ᵀ of what PEFT stores
            plan[f"{PREFIX}{path}.lora_embedding_A"] = part.b.T, 0, ()
            plan[f"{PREFIX}{path}.lora_embedding_B"] = part.a.T, 1, ()
        else:
            plan[f"{PREFIX}{path}.lora_A.weight"] = part.a, 0, shapes[0]
            plan[f"{PREFIX}{path}.lora_B.weight"] = part.b, 1, shapes[1]
    kept = {key: contents.config.get(key) for key in _KEPT if contents.config.get(key) is not None}
    names = contents.config.get("target_modules") if contents.form == "peft" else None
    config = {
        "base_model_name_or_path": str(base.path) if base is not None else None,
        "task_type": None,
        "fan_in_fan_out": False,
        **kept,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": _targets(names, modules) if isinstance(names, list) and names else sorted(set(modules)),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return plan, config


def _targets(names: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Return the names that still stand for a module."""
    return [name for name in names if any(module == name or module.endswith(f".{name}") for module in modules)]


def _to_kohya(
    found: Iterable[Factored], contents: Contents, base: Checkpoint | None, rank: int
) -> tuple[Plan, dict[str, Any]]:
    import torch

    plan: Plan = {}
    for part in found:
        module = part.item.module
        if contents.form != "kohya":
            component = _component(part.item, contents, base)
            module = f"{_PREFIXES.get(component, f'lora_{component}')}_{_path(part.item, contents).replace('.', '_')}"
        shapes = _kernels(part.item, rank)
        plan[f"{module}.lora_down.weight"] = part.a, 0, shapes[0]
        plan[f"{module}.lora_up.weight"] = part.b, 1, shapes[1]
        plan[f"{module}.alpha"] = torch.tensor(float(rank), dtype=torch.float64), -1, ()
    return plan, {}


def _to_diffusers(
    found: Iterable[Factored], contents: Contents, base: Checkpoint | None, rank: int
) -> tuple[Plan, dict[str, Any]]:
    plan: Plan = {}
    for part in found:
        module = f"{_component(part.item, contents, base)}.{_path(part.item, contents)}"
        shapes = _kernels(part.item, rank)
        plan[f"{module}.lora_A.weight"] = part.a, 0, shapes[0]
        plan[f"{module}.lora_B.weight"] = part.b, 1, shapes[1]
    return plan, {}


def _to_mlx(
    found: Iterable[Factored], contents: Contents, base: Checkpoint | None, rank: int
) -> tuple[Plan, dict[str, Any]]:
    plan: Plan = {}
    keys = set()
    for part in found:
        if part.item.part == "convolution":
            raise InputError(f"{part.item.module}: mlx-lm has no LoRA for a convolution; leave it out of the adapter")
        path = _path(part.item, contents)
        _, layers, inside = path.partition("layers.")
        keys.add(inside.partition(".")[2] if layers else path)
        plan[f"{path}.lora_a"] = part.a.T, 1, ()
        plan[f"{path}.lora_b"] = part.b.T, 0, ()
    settings = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    return plan, {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": settings}


Writer = Callable[[Iterable[Factored], Contents, "Checkpoint | None", int], tuple[Plan, dict[str, Any]]]
WRITERS: dict[str, Writer] = {"peft": _to_peft, "kohya": _to_kohya, "diffusers": _to_diffusers, "mlx": _to_mlx}
FILES = {
    "peft": WEIGHTS,
    "kohya": "lora.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "mlx": "adapters.safetensors",
}


def _write(folder: Path, name: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write the files beside their place, and rename the folder into it.

    Raises:
        InputError: They cannot be written.
    """
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        work.mkdir(parents=True)
        infos = {
            key: TensorInfo(key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for key, tensor in tensors.items()
        }
        write_safetensors(work / name, infos, lambda key: tensors[key], {"format": "pt"})
        if config:
            text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
            write_whole(work / CONFIG, f"{text}\n")
        work.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
