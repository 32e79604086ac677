"""Several updates of one BASE: layers aligned by name, each with the updates that change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_diag.adapters import locate
from lora_diag.deltas import Delta, Pairing, Unpaired, drop_base, natural_order
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.running.inputs import Comparison


@dataclass(frozen=True, slots=True)
class Update:
    """One of several updates of a layer.

    Args:
        name: The input's path.
        weight: w_k.
        delta: Its ΔW.
    """

    name: str
    weight: float
    delta: Delta


@dataclass(frozen=True, slots=True)
class LayerUpdates:
    """One layer and all its updates; those that do not change it are missing or zero."""

    layer: str
    shape: tuple[int, int]
    updates: tuple[Update, ...]


def split_base(inputs: Sequence[Path | str]) -> tuple[Path | None, list[Path]]:
    """Return BASE and the updates: adapters alone have no BASE, else it comes first.

    Raises:
        UsageError: An adapter comes first, but not all inputs are adapters.
    """
    sources = list(map(locate, inputs))
    paths = [source.path for source in sources]
    if all(source.is_adapter for source in sources):
        return None, paths
    if sources[0].is_adapter:
        raise UsageError(f"{paths[0]}: is an adapter, not BASE; give BASE first, then the updates")
    return paths[0], paths[1:]


def align_layers(
    comparisons: Sequence[Comparison], weights: Sequence[float], vectors: bool = False
) -> list[LayerUpdates]:
    """Return the layers that any update has, in natural order, each with its updates.

    Args:
        comparisons: BASE with each of the updates.
        weights: One per update.
        vectors: Whether 1-D tensors are layers, too.

    Raises:
        InputError: Two have different shapes for one name.
        NothingComparedError: There are several updates, and no layer is changed by two of them.
    """
    by_layer: dict[str, list[Update]] = {}
    for comparison, weight in zip(comparisons, weights, strict=True):
        for delta in comparison.pairing.deltas:
            if vectors or delta.is_matrix:
                by_layer.setdefault(delta.layer, []).append(
                    Update(tuned_path(comparison), weight, drop_base(delta))
                )
    is_shared = any(len(updates) > 1 for updates in by_layer.values())
    if len(comparisons) > 1 and not is_shared:
        examples = "; ".join(
            f"{tuned_path(item)} has "
            f"{min((delta.layer for delta in item.pairing.deltas), default='no layer')}"
            for item in comparisons
        )
        raise NothingComparedError(
            f"no weight is changed by two of the inputs, so nothing was compared: {examples}"
        )
    for layer, (first, *others) in by_layer.items():
        for other in others:
            if other.delta.shape != first.delta.shape:
                raise InputError(
                    layer,
                    f"{list(first.delta.shape)} in {first.name} but "
                    f"{list(other.delta.shape)} in {other.name}, so these are not "
                    "updates of one model",
                    "skip the weight with $exclude",
                )
    names = sorted(by_layer, key=natural_order)
    return [
        LayerUpdates(name, by_layer[name][0].delta.shape, tuple(by_layer[name])) for name in names
    ]


def tuned_path(comparison: Comparison) -> str:
    """Return the path of the compared update."""
    return comparison.inputs[-1].path


def list_unmeasured(comparisons: Sequence[Comparison], layers: set[str]) -> Pairing:
    """Return the compared 1-D tensors, and the unpaired tensors that no comparison pairs, each name
    once.

    The first comparison that has one counts; ``layers`` are the compared matrices.
    """
    vectors: dict[str, Delta] = {}
    unpaired: dict[str, Unpaired] = {}
    for delta in (
        delta
        for comparison in comparisons
        for delta in comparison.pairing.deltas
        if not delta.is_matrix
    ):
        vectors.setdefault(delta.layer, delta)
    for comparison in comparisons:
        for item in comparison.pairing.unpaired:
            if item.layer not in layers and item.layer not in vectors:
                unpaired.setdefault(
                    item.layer, replace(item, detail=f"{tuned_path(comparison)}: {item.detail}")
                )
    return Pairing(tuple(vectors.values()), tuple(unpaired.values()))
