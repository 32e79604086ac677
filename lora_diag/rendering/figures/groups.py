"""Grouping of layers into panels, rows and colours by module type and depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from lora_diag.records import LayerRecord
from lora_diag.records.names import depth_of, module_type_of, place_of, tower_of
from lora_diag.rendering.figures.style import name_of

R = TypeVar("R", bound=LayerRecord)


class Types:
    """Module types of layers in the usual order; types common to several towers have the tower's name as a prefix.

    Args:
        layers: Names of the weights.

    Example:
        >>> types = Types(["encoder.block.0.q.weight", "decoder.block.0.q.weight", "lm_head.weight"])
        >>> types.names
        ('encoder: q', 'decoder: q', 'lm_head')
        >>> types.of("decoder.block.0.q.weight")
        'decoder: q'
        >>> Types(["model.layers.0.mlp.up.weight", "bert.layer.0.output.dense.weight"]).names
        ('mlp.up', 'output.dense')
    """

    def __init__(self, layers: Iterable[str]) -> None:
        layers = tuple(dict.fromkeys(layers))
        towers: dict[str, set[tuple[str, ...]]] = {}
        order: dict[tuple[str, ...], int] = {}
        for layer in layers:
            if tower := tower_of(layer):
                towers.setdefault(module_type_of(layer), set()).add(tower)
                order.setdefault(tower, len(order))
        self._towers = _find_distinguishing_parts(
            {tower for of_type in towers.values() if len(of_type) > 1 for tower in of_type}
        )
        ordered = sorted(layers, key=lambda layer: (order.get(tower_of(layer), len(order)), place_of(layer)))
        self._name = {layer: self._label_type(layer) for layer in ordered}
        self.names = tuple(dict.fromkeys(self._name.values()))

    def of(self, layer: str) -> str:
        """Return the module type of a layer as drawn."""
        return self._name[layer]

    def _label_type(self, layer: str) -> str:
        tower = self._towers.get(tower_of(layer))
        return name_of(f"{tower}: {module_type_of(layer)}" if tower else module_type_of(layer))


def _find_distinguishing_parts(towers: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Return the first part of each tower's name that differs; the whole names if these parts are not all distinct."""
    shared = 0
    while len({tower[shared : shared + 1] for tower in towers}) == 1 and all(len(t) > shared for t in towers):
        shared += 1
    labels = {tower: ".".join(tower[shared : shared + 1]) for tower in towers}
    if len(set(labels.values())) < len(labels) or "" in labels.values():
        return {tower: ".".join(tower) for tower in towers}
    return labels


def by_depth(records: Sequence[R]) -> dict[int | None, tuple[R, ...]]:
    """Group records by block in ascending order; those outside the blocks come last."""
    by_block: dict[int | None, list[R]] = {}
    for record in records:
        by_block.setdefault(depth_of(record.layer), []).append(record)
    return {depth: tuple(by_block[depth]) for depth in sorted(by_block, key=lambda d: (d is None, d or 0))}


def deepest(layers: Iterable[str]) -> int:
    """Return the largest block index, 0 without blocks."""
    return max((depth for layer in layers if (depth := depth_of(layer)) is not None), default=0)
