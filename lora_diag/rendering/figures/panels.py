"""Elements of panels: axes, named levels, and module types in slots, with blocks from left to
right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from statistics import median
from typing import Any, Generic, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from lora_diag.records import LayerRecord
from lora_diag.rendering.figures.fields import Types, by_depth
from lora_diag.rendering.figures.pages import MAX_PANELS, Panel
from lora_diag.rendering.figures.style import (
    DASHED,
    INK,
    PageStyle,
    crop_names,
    fit_chars,
    log_label,
    name_of,
)

R = TypeVar("R", bound=LayerRecord)

# Fraction of a slot for bars, and the maximum width of a single bar.
_FILLED, _WIDEST = 0.86, 0.3
# Maximum length of a name below an axis, in characters.
LONGEST = 24
# BASE is drawn unless its distance from the losses exceeds their range by this factor.
FAR = 8.0
# Common ranks of adapters, marked in every panel over ranks.
MARKED = (4, 16, 64)


@dataclass(frozen=True, slots=True)
class Slot(Generic[R]):
    """The bars of one module type, or of several that share a slot.

    Args:
        name: Name of the type or types.
        edges: Edges of its bars on the x axis, ``(bars + 1,)``.
        bars: The records of each bar: of one block, or of the whole slot.
    """

    name: str
    edges: NDArray[np.float64]
    bars: tuple[tuple[R, ...], ...]

    @property
    def joined(self) -> int:
        """The largest number of layers of a bar."""
        return max(map(len, self.bars))


def make_slots(runs: Sequence[Sequence[R]], per: str) -> list[tuple[Slot[R], ...]]:
    """Return, for each run, a slot for each module type that it has; beyond ``MAX_PANELS`` types,
    the rest share one.

    Args:
        runs: The records of each run, one per layer.
        per: ``layer`` for one bar per block, ``type`` for one bar per type.
    """
    types = Types(record.layer for record in chain.from_iterable(runs))
    names = types.pool(types.names[: MAX_PANELS - 1])
    slots = []
    for records in runs:
        groups: dict[str, list[R]] = {name: [] for name in names.values()}
        for record in records:
            groups[names[types.of(record.layer)]].append(record)
        made = []
        for position, (name, group) in enumerate(groups.items()):
            bars = (tuple(group),) if per == "type" else tuple(by_depth(group).values())
            half = min(_FILLED, _WIDEST * len(bars)) / 2
            if group:
                made.append(Slot(name, position + np.linspace(-half, half, len(bars) + 1), bars))
        slots.append(tuple(made))
    return slots


def stack_panels(
    panels: Sequence[Panel], runs: Iterable[Sequence[Slot[Any]]], style: PageStyle
) -> list[Panel]:
    """Return panels with a common x axis, the slots of all runs, whose names are below the last
    panel.
    """
    slots = list({slot.name: slot for slot in chain.from_iterable(runs)}.values())
    short = crop_names([slot.name for slot in slots], LONGEST)
    places = [round(float(slot.edges.mean())) for slot in slots]
    room = 0.85 * style.width / (max(places) - min(places) + 1)
    longest = max(map(len, short.values()))
    angle = 0
    if longest >= fit_chars(room, style.ticks):  # names do not fit side by side
        angle = 45 if room > 1.75 * style.ticks / 72 else 90

    def draw(ax: Axes, style: PageStyle, panel: Panel) -> None:
        panel.draw(ax, style)
        ax.set_xlim(min(places) - 0.5, max(places) + 0.5)
        turned: dict[str, Any] = {"ha": "right", "rotation_mode": "anchor"} if angle == 45 else {}
        names = [short[slot.name] for slot in slots]
        ax.set_xticks(places, names, parse_math=False, rotation=angle, size=style.ticks, **turned)
        ax.tick_params(axis="x", length=0, labelbottom=panel is panels[-1])

    below = (longest * 0.6 * {0: 0, 45: 0.71, 90: 1}[angle] + 1.4) * style.ticks / 72 / len(panels)
    return [
        replace(panel, draw=partial(draw, panel=panel), height=panel.height + below)
        for panel in panels
    ]


def draw_bars(
    ax: Axes,
    slots: Sequence[Slot[R]],
    height_of: Callable[[Sequence[R]], float | None],
    **line_style: Any,
) -> None:
    """Draw a value of each bar, by default as a line; nothing for a slot without values."""
    for slot in slots:
        heights = np.array([height_of(bar) for bar in slot.bars], dtype=np.float64)
        if np.isfinite(heights).any():
            ax.stairs(heights, slot.edges, **{"baseline": None, **line_style})


def median_of(value_of: Callable[[R], float | None]) -> Callable[[Sequence[R]], float | None]:
    """Return a function for the median over the layers of a bar; None if a layer has no value."""

    def pool(bar: Sequence[R]) -> float | None:
        values = [value for record in bar if (value := value_of(record)) is not None]
        return float(np.median(values)) if len(values) == len(bar) else None

    return pool


def sets_of(records: Iterable[Any]) -> dict[str, str]:
    """Return the labels of the evaluation sets by name, in the order of the run."""
    labels: dict[str, str] = {}
    for record in records:
        shifted = record.shifted and record.set != "shifted"
        labels.setdefault(record.set, f"{name_of(record.set)}{' (shifted)' if shifted else ''}")
    return labels


def label_ticks(
    ax: Axes, ticks: Iterable[int], style: PageStyle, label: Callable[[int], str] = str
) -> None:
    """Label the x axis where labels do not overlap.

    Args:
        ax: Axes with scale and limits set.
        ticks: Ticks to label, the most important first.
        style: The page.
        label: Returns the label of a tick.
    """
    # Before the layout, axes are at about their final width.
    chars = ax.get_window_extent().width / ax.figure.dpi * 72 / (0.6 * style.ticks)
    extents: dict[int, tuple[float, float]] = {}
    for tick in ticks:
        position = (ax.transScale + ax.transLimits).transform((tick, 1))[0] * chars
        half = max(map(len, label(tick).split("\n"))) / 2 + 0.6
        if all(abs(position - other) > half + other_half for other, other_half in extents.values()):
            extents[tick] = (position, half)
    ax.xaxis.set_major_locator(FixedLocator(sorted(extents)))
    ax.xaxis.set_major_formatter(lambda value, _: label(round(value)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def set_rank_axis(ax: Axes, largest: int, style: PageStyle) -> None:
    """Set up a logarithmic x axis for ranks: dotted lines at ``MARKED``, labels there and at the
    ends if they fit.
    """
    ax.set_xscale("log")
    ax.set_xlim(0.92, max(largest * 1.08, 2))
    marked = [rank for rank in MARKED if rank <= largest]
    for rank in marked:
        ax.axvline(rank, color=INK, alpha=0.35, lw=0.6 * style.line, ls=(0, (1, 1.6)), zorder=1)
    label_ticks(ax, (1, *marked, largest), style)


def set_measured_rank_axis(
    ax: Axes, ranks: Iterable[int], style: PageStyle, label: Callable[[int], str] = str
) -> None:
    """Set up the x axis for ranks, logarithmic from 1, with labels at measured ranks as far as they
    fit.
    """
    measured = sorted(set(ranks)) or [1]
    ax.set_xscale("symlog", base=2, linthresh=1, linscale=1)
    first, last = measured[0], measured[-1]
    ax.set_xlim(first - 0.35 if first < 2 else first / 2**0.35, last * 2**0.35 if last else 0.35)
    label_ticks(ax, (first, last, *measured), style, label)


def set_params_axis(ax: Axes, params: Sequence[int], above: float = 1.8) -> None:
    """Set up the x axis for numbers of trained parameters, logarithmic, up to ``above`` times the
    largest.
    """
    ax.set_xscale("log")
    ax.set_xlim(min(params) / 1.8, max(params) * above)
    ax.xaxis.set_major_locator(LogLocator(numticks=8))
    ax.xaxis.set_major_formatter(log_label)
    ax.xaxis.set_minor_formatter(NullFormatter())


def draw_seeds(
    ax: Axes,
    points: Iterable[tuple[float, float]],
    style: PageStyle,
    color: str,
    label: str,
    marker: str = "o",
) -> None:
    """Draw one small dot per training run."""
    small: dict[str, Any] = {"ls": "", "ms": 2.6 * style.line, "mew": 0, "alpha": 0.55}
    ax.plot(*zip(*points, strict=True), color=color, marker=marker, label=label, **small)


def draw_levels(ax: Axes, levels: Iterable[tuple[str, float, str]], style: PageStyle) -> None:
    """Draw horizontal lines, each with its name right of the panel; one beyond the axis is named at
    its end.

    Args:
        ax: Axes with limits set.
        levels: Name, value and colour of each.
        style: The page.
    """
    low, high = ax.get_ylim()
    ends = {low: " ↓", high: " ↑"}
    places: dict[float, list[tuple[str, str]]] = {}
    for text, value, color in sorted(levels, key=lambda level: level[1]):
        place = min(max(value, low), high)
        if place == value:
            line_style: dict[str, Any] = {"color": color, "lw": 0.8 * style.line, "ls": DASHED}
            ax.axhline(value, **line_style, zorder=1.5, label=f"_{text}")
        # Levels close to each other share a label.
        near = next((other for other in places if place - other < 0.1 * (high - low)), place)
        name = text if place == value else text + ends[place]
        places.setdefault(near, []).append((name, color))
    for place, named in places.items():
        ax.annotate(
            "\n".join(text for text, _ in reversed(named)),
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va={low: "bottom", high: "top"}.get(place, "center"),
            size=style.ticks,
            color=named[0][1] if len(named) == 1 else INK,
            parse_math=False,
            annotation_clip=False,
        )


def set_loss_axis(ax: Axes) -> None:
    """Set few, plain ticks on the loss axis."""
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    ax.ticklabel_format(axis="y", useOffset=False, style="plain")


def set_fraction_ticks(*axes: Axis) -> None:
    """Label 0, 0.5 and 1 of an axis of fractions."""
    for axis in axes:
        axis.set_ticks([0, 0.5, 1], ["0", "0.5", "1"])


def axis_limits(values: Iterable[float], base: float | None = None) -> tuple[float, float]:
    """Return the limits of a loss axis: the range of values, extended by a tenth of it on both
    sides.

    With the loss of BASE, losses of diverged runs are outside: they are farther above BASE than the
    best loss is below it, and above the best loss more than six times as far as the median. BASE is
    outside if it is more than ``FAR`` times as far from the losses as they are from each other.

    >>> (
    ...     axis_limits([1.0, 2.0]),
    ...     axis_limits([1.0, 2.0, 90.0], base=2.0),
    ...     axis_limits([1.0, 2.0], base=90.0),
    ... )
    ((0.9, 2.1), (0.9, 2.1), (0.9, 2.1))
    """
    values = list(values)
    low = min(values)
    if base is not None:
        limit = max(2 * base - low, low + 6 * (median(values) - low))
        values = [value for value in values if value <= limit]
        span = max(values) - low or abs(low) * 0.05
        if low - FAR * span <= base <= max(values) + FAR * span:
            values.append(base)
    low, high = min(values), max(values)
    span = high - low or abs(high) * 0.1 or 1.0
    return low - 0.1 * span, high + 0.1 * span
