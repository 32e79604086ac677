"""Layers side by side: module types in equal slots, the blocks of each from left to right inside its slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from lora_diag.records import LayerRecord
from lora_diag.rendering.figures.groups import Types, by_depth
from lora_diag.rendering.figures.sheet import MAX_PANELS
from lora_diag.rendering.figures.style import cropped_all, width_of

R = TypeVar("R", bound=LayerRecord)

# Share of a slot that bars may fill, and the widest a single bar may be.
_FILLED, _WIDEST = 0.86, 0.3
# The longest name below an axis, in heights of its text.
LONGEST = 15


@dataclass(frozen=True, slots=True)
class Slot(Generic[R]):
    """The bars of one module type.

    Args:
        name: Of the type.
        edges: Of its bars on the x axis, ``(bars + 1,)``.
        bars: The records that each bar stands for: of one block, or all of the type.
    """

    name: str
    edges: NDArray[np.float64]
    bars: tuple[tuple[R, ...], ...]

    @property
    def joined(self) -> int:
        """The most layers that one bar stands for."""
        return max(map(len, self.bars))


def slots(records: Sequence[R], per: str, types: Types | None = None) -> tuple[Slot[R], ...]:
    """Return the slots of some layers; where there are too many types, those past the limit share the last.

    Args:
        records: One a layer.
        per: ``layer`` for one bar a block, ``type`` for one bar a type.
        types: Of all layers that are compared, if these are not all.
    """
    types = types or Types(record.layer for record in records)
    names = types.names
    if len(names) > MAX_PANELS:
        others = f"{len(names) - MAX_PANELS + 1} other types"
        shown = dict.fromkeys(names, others) | {name: name for name in names[: MAX_PANELS - 1]}
    else:
        shown = {name: name for name in names}
    groups: dict[str, list[R]] = {name: [] for name in shown.values()}
    for record in records:
        groups[shown[types.of(record.layer)]].append(record)
    return tuple(_slot(place, name, group, per) for place, (name, group) in enumerate(groups.items()) if group)


def _slot(place: int, name: str, group: Sequence[R], per: str) -> Slot[R]:
    bars = (tuple(group),) if per == "type" else tuple(by_depth(group).values())
    half = min(_FILLED, _WIDEST * len(bars)) / 2
    return Slot(name, place + np.linspace(-half, half, len(bars) + 1), bars)


def slot_axis(ax: Axes, drawn: Sequence[Slot[R]], inches: float, size: float, labels: bool = True) -> None:
    """Name the slots below the axis, turned as far as their width asks for.

    Args:
        ax: The panel.
        drawn: Its slots.
        inches: Its width.
        size: Of the text, in points.
        labels: Whether the names are written.
    """
    places = [round(float(slot.edges.mean())) for slot in drawn]
    ax.set_xlim(min(places) - 0.5, max(places) + 0.5)
    ax.set_xticks(places)
    ax.tick_params(axis="x", length=0, labelbottom=labels)
    if not labels:
        return
    names, angle = _written(drawn, inches, size)
    ax.set_xticklabels(
        names,
        parse_math=False,
        rotation=angle,
        ha="right" if angle == 45 else "center",
        rotation_mode="anchor" if angle == 45 else "default",
        size=size,
    )


def label_height(drawn: Sequence[Slot[R]], inches: float, size: float) -> float:
    """Return how high the names below the axis are, in inches."""
    names, angle = _written(drawn, inches, size)
    widest = max(width_of(name, size) for name in names)
    return widest * {0: 0, 45: 0.71, 90: 1}[angle] + 1.4 * size / 72


def _written(drawn: Sequence[Slot[R]], inches: float, size: float) -> tuple[list[str], int]:
    """Return the names as they fit, and by how many degrees they are turned."""
    places = [round(float(slot.edges.mean())) for slot in drawn]
    room = inches / (max(places) - min(places) + 1)
    names = list(cropped_all([slot.name for slot in drawn], LONGEST * size / 72, size).values())
    if max(width_of(name, size) for name in names) < 0.94 * room:
        return names, 0
    return names, 90 if room < 1.75 * size / 72 else 45
