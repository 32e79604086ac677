"""Layers side by side: module types in equal slots, with their blocks from left to right."""

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
from lora_diag.rendering.figures.style import crop_names, width_of

R = TypeVar("R", bound=LayerRecord)

# Fraction of a slot for bars, and the maximum width of a single bar.
_FILLED, _WIDEST = 0.86, 0.3
# Maximum length of a name below an axis, in text heights.
LONGEST = 15


@dataclass(frozen=True, slots=True)
class Slot(Generic[R]):
    """The bars of one module type.

    Args:
        name: Name of the type.
        edges: Edges of its bars on the x axis, ``(bars + 1,)``.
        bars: The records of each bar: of one block, or of the whole type.
    """

    name: str
    edges: NDArray[np.float64]
    bars: tuple[tuple[R, ...], ...]

    @property
    def joined(self) -> int:
        """The largest number of layers of a bar."""
        return max(map(len, self.bars))


def make_slots(records: Sequence[R], per: str, types: Types | None = None) -> tuple[Slot[R], ...]:
    """Return the slots of layers; if there are too many types, the last slot has the others.

    Args:
        records: One per layer.
        per: ``layer`` for one bar per block, ``type`` for one bar per type.
        types: Module types of all compared layers, if ``records`` are a subset.
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
    return tuple(
        _make_slot(position, name, group, per) for position, (name, group) in enumerate(groups.items()) if group
    )


def _make_slot(position: int, name: str, group: Sequence[R], per: str) -> Slot[R]:
    bars = (tuple(group),) if per == "type" else tuple(by_depth(group).values())
    half = min(_FILLED, _WIDEST * len(bars)) / 2
    return Slot(name, position + np.linspace(-half, half, len(bars) + 1), bars)


def slot_axis(ax: Axes, drawn: Sequence[Slot[R]], inches: float, size: float, labels: bool = True) -> None:
    """Name the slots below the axis, rotated to fit.

    Args:
        ax: The panel.
        drawn: Its slots.
        inches: Its width.
        size: Font size in points.
        labels: Whether to show the names.
    """
    positions = [round(float(slot.edges.mean())) for slot in drawn]
    ax.set_xlim(min(positions) - 0.5, max(positions) + 0.5)
    ax.set_xticks(positions)
    ax.tick_params(axis="x", length=0, labelbottom=labels)
    if not labels:
        return
    names, angle = _fit_labels(drawn, inches, size)
    ax.set_xticklabels(
        names,
        parse_math=False,
        rotation=angle,
        ha="right" if angle == 45 else "center",
        rotation_mode="anchor" if angle == 45 else "default",
        size=size,
    )


def label_height(drawn: Sequence[Slot[R]], inches: float, size: float) -> float:
    """Return the height of the names below the axis in inches."""
    names, angle = _fit_labels(drawn, inches, size)
    widest = max(width_of(name, size) for name in names)
    return widest * {0: 0, 45: 0.71, 90: 1}[angle] + 1.4 * size / 72


def _fit_labels(drawn: Sequence[Slot[R]], inches: float, size: float) -> tuple[list[str], int]:
    """Return the shortened names, and their rotation in degrees."""
    positions = [round(float(slot.edges.mean())) for slot in drawn]
    room = inches / (max(positions) - min(positions) + 1)
    names = list(crop_names([slot.name for slot in drawn], LONGEST * size / 72, size).values())
    if max(width_of(name, size) for name in names) < 0.94 * room:
        return names, 0
    return names, 90 if room < 1.75 * size / 72 else 45
