"""Elements of panels: module types in equal slots with their blocks from left to right, measured ranks, named levels.

Also the probe records of a figure, by probe and set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lora_diag.records import LayerRecord, Probe, Results
from lora_diag.records.probe import OnSet
from lora_diag.rendering.figures.axes import label_ticks
from lora_diag.rendering.figures.fields import Types, by_depth
from lora_diag.rendering.figures.sheet import MAX_PANELS
from lora_diag.rendering.figures.style import INK, PageStyle, crop_names, name_of, width_of

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
    """Return the slots with layers; if there are too many types, the last slot has the others.

    Args:
        records: One per layer.
        per: ``layer`` for one bar per block, ``type`` for one bar per type.
        types: Module types of all compared layers, if ``records`` are a subset.
    """
    types = types or Types(record.layer for record in records)
    names = types.names
    if len(names) > MAX_PANELS:
        others = f"{len(names) - MAX_PANELS + 1} other types"
        slot_names = dict.fromkeys(names, others) | {name: name for name in names[: MAX_PANELS - 1]}
    else:
        slot_names = {name: name for name in names}
    groups: dict[str, list[R]] = {name: [] for name in slot_names.values()}
    for record in records:
        groups[slot_names[types.of(record.layer)]].append(record)
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


# Height of a line of text as a fraction of a panel's height.
TEXT = 0.13


def probes(results: Results[Any] | Iterable[Any], probe: str) -> tuple[Probe, ...]:
    """Return the records of one probe from results or records."""
    records = results.whole if isinstance(results, Results) else results
    return tuple(record for record in records if isinstance(record, Probe) and record.probe == probe)


def sets_of(records: Iterable[OnSet]) -> dict[str, str]:
    """Return the labels of the evaluation sets by name, in the order of the run."""
    labels: dict[str, str] = {}
    for record in records:
        shifted = record.shifted and record.set != "shifted"
        labels.setdefault(record.set, f"{name_of(record.set)}{' (shifted)' if shifted else ''}")
    return labels


def one_set(results: Results[Any] | Iterable[Any], probe: str, name: str | None) -> tuple[list[Probe], str]:
    """Return the records of one probe on one set, by default the first, and the label of the set."""
    records = probes(results, probe)
    sets = sets_of(records)
    chosen = name if name is not None else next(iter(sets))
    return [record for record in records if record.set == chosen], sets[chosen]


def panels_of(number: int, style: PageStyle) -> tuple[int, int]:
    """Return rows and columns of panels of a readable width; on a column page they are stacked."""
    columns = 1 if style.columns < 3 else min(number, 2 if number in {2, 4} else 3)
    return -(-number // columns), columns


def panel_width(style: PageStyle, columns: int, right: float = 0.0) -> float:
    """Estimate the width of a panel with its labels in inches, without ``right`` lines of text at its side."""
    return style.width / columns - (6.5 + right) * style.text / 72


def measured_axis(
    ax: Axes,
    ranks: Iterable[int],
    inches: float,
    style: PageStyle | None,
    label: Callable[[int], str] = str,
) -> None:
    """Set up the x axis for ranks, logarithmic from 1, with labels at measured ranks as far as they fit."""
    measured = sorted(set(ranks))
    ax.set_xscale("symlog", base=2, linthresh=1, linscale=1)
    first, last = measured[0], measured[-1]
    ax.set_xlim(first - 0.35 if first < 2 else first / 2**0.35, last * 2**0.35 if last else 0.35)
    label_ticks(ax, (first, last, *measured), inches, style, label)


# Background of a line's name: transparent enough to show other lines, but readable.
GROUND: dict[str, Any] = {"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 0.6}


def levels(
    ax: Axes, lines: Sequence[tuple[str, float, str]], style: PageStyle | None, lowest_below: bool = False
) -> None:
    """Draw horizontal lines, each with its name at the right end; names of nearly equal lines share a row.

    Args:
        ax: Axes with limits set.
        lines: Name, value and colour of each.
        style: The page.
        lowest_below: Whether the lowest line has its name below, away from lines above.
    """
    low, high = ax.get_ylim()
    groups: list[list[tuple[str, float, str]]] = []
    for level in sorted(lines, key=lambda item: item[1]):
        text, value, color = level
        ax.axhline(
            value, color=color, lw=0.8 * (style.line if style else 1), ls=(0, (4, 2)), zorder=1.5, label=f"_{text}"
        )
        if groups and value - groups[-1][-1][1] < TEXT * (high - low):
            groups[-1].append(level)
        else:
            groups.append([level])
    for position, group in enumerate(groups):
        below = lowest_below and position == 0 and len(groups) > 1
        ax.annotate(
            ", ".join(text for text, _, _ in group),
            (1, group[0 if below else -1][1]),
            xycoords=("axes fraction", "data"),
            xytext=(-2, -1.5 if below else 1.5),
            textcoords="offset points",
            ha="right",
            va="top" if below else "bottom",
            size=style.ticks if style else 9.0,
            color=group[-1][2] if len(group) == 1 else INK,
            parse_math=False,
            annotation_clip=False,
            bbox=GROUND,
            zorder=1.9,
        )


def loss_axis(ax: Axes) -> None:
    """Set few, plain ticks on the loss axis."""
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    ax.ticklabel_format(axis="y", useOffset=False, style="plain")


def limits(values: Sequence[float], below: float = 0.08, above: float = 0.14) -> tuple[float, float]:
    """Return the limits of an axis for values, with room for a name above the highest.

    >>> limits([1.0, 2.0])
    (0.92, 2.14)
    """
    low, high = min(values), max(values)
    span = high - low or abs(high) * 0.1 or 1.0
    return low - below * span, high + above * span
