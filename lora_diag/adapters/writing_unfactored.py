"""Tensors without factors, stored in full: norms and other small modules, biases, embeddings with a resized vocabulary.

PEFT keeps whole modules (``modules_to_save``) and, with ``bias: all``, biases by themselves. It matches saved modules
by the end of their names, so full names are given; and it needs every tensor of a saved module in the file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING

from lora_diag.adapters.updates import as_float64
from lora_diag.adapters.writing import Value
from lora_diag.adapters.writing_targets import Model
from lora_diag.checkpoints import Checkpoint, TensorInfo
from lora_diag.deltas import Delta, FactoredDelta, Side, StoredDelta

if TYPE_CHECKING:
    import torch


def can_be_saved(name: str, base: Checkpoint, model: Model) -> bool:
    """Return whether PEFT can store a tensor of BASE in full.

    Args:
        name: Its name in BASE.
        base: The checkpoint.
        model: Its names in memory.
    """
    module, _, leaf = name.rpartition(".")
    if name not in base or not module or leaf not in {"weight", "bias"}:
        return False
    if f"{module.rpartition('.')[0]}.in_proj_weight" in base:
        return False  # part of an nn.MultiheadAttention
    inside = [other for other in base if other.startswith(f"{module}.")]
    return all("." not in other[len(module) + 1 :] for other in inside) and bool(model.in_memory(name))


def full_values(
    names: Collection[str],
    deltas: Mapping[str, Delta],
    base: Checkpoint,
    model: Model,
    adapted: Collection[str],
) -> list[Value]:
    """Return the tensors of the adapter file that store some tensors of BASE in full.

    Args:
        names: Tensors of BASE.
        deltas: Their changes, and those of their siblings in a module, by their names in BASE.
        base: The checkpoint.
        model: Its names in memory.
        adapted: Modules with factors, whose own tensors PEFT calls ``base_layer``.
    """
    values: dict[str, Value] = {}
    whole = {name.rpartition(".")[0] for name in names if not _is_bias_of_layer(name, base)}
    for name in names:
        disk_module = name.rpartition(".")[0]
        module = model.in_memory(name).rpartition(".")[0]
        if disk_module not in whole:
            key = f"{module}.base_layer.bias" if module in adapted else f"{module}.bias"
            values[key] = _make_value(key, name, deltas.get(name), base)
            continue
        for sibling in base:
            if sibling.rpartition(".")[0] == disk_module:
                key = model.in_memory(sibling)
                values[key] = _make_value(key, sibling, deltas.get(sibling), base, module)
    return list(values.values())


def _is_bias_of_layer(name: str, base: Checkpoint) -> bool:
    """Return whether a tensor is the bias of a layer whose weight is a matrix."""
    weight = f"{name.removesuffix('bias')}weight"
    return name.endswith(".bias") and weight in base and len(base[weight].shape) > 1


def _make_value(key: str, name: str, delta: Delta | None, base: Checkpoint, module: str = "") -> Value:
    """Return a tensor of BASE as it is after its change, to be stored in full."""
    info = base[name]
    if isinstance(delta, StoredDelta):
        info = delta.tuned.info
        read = partial(_read_whole, delta.tuned)
    elif delta is None:
        read = partial(_read_whole, Side(base, name))
    else:
        info = TensorInfo(key, info.shape, "float32")
        read = partial(_compute_changed_value, delta, base, name)
    return Value(key, TensorInfo(key, info.shape, info.dtype), read, module)


def _read_whole(side: Side) -> torch.Tensor:
    return side.checkpoint.read(side.name).view(side.info.shape)


def _compute_changed_value(delta: Delta, base: Checkpoint, name: str) -> torch.Tensor:
    """Return the new value of a tensor that an adapter changes, float32."""
    assert not isinstance(delta, StoredDelta)
    if isinstance(delta, FactoredDelta):
        b, a = delta.load()
        change = b @ a
    else:
        change = delta.load()
    shape = base[name].shape
    return (as_float64(base.read(name)).view(shape) + as_float64(change).reshape(shape)).float()
