"""`fleet`: norm of the updates of many adapters against the fraction of their rank in use; outliers
are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lora_diag.metrics.statistics import (
    OVER_RANKED_BELOW,
    OutlierKind,
    find_outlier_kinds,
    order_by_rarity,
)
from lora_diag.rendering.figures.pages import Page, Panel, key
from lora_diag.rendering.figures.panels import set_fraction_ticks
from lora_diag.rendering.figures.series import Options, Series, UndrawableError, short_names
from lora_diag.rendering.figures.style import (
    INK,
    QUIET,
    PageStyle,
    category,
    crop_names,
    fit_chars,
    format_log_axis,
)
from lora_diag.rendering.text import quantity

# Dashes of the limit of over-ranked adapters.
_DOTS = (0, (1, 1.6))

# Fraction of the width for the points if outliers are named in the rest; maximum number of names.
_PLOT, _NAMES = 0.62, 12


@dataclass(frozen=True, slots=True)
class _Point:
    """One adapter in the figure.

    Args:
        name: Label in the figure.
        outlier_kinds: Kinds of outlier that the adapter is; empty if it is none.
        used: Position on the x axis.
        fro: Position on the y axis; 0 for a zero update.
        run: Index of its run.
    """

    name: str
    outlier_kinds: tuple[OutlierKind, ...]
    used: float
    fro: float
    run: int


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the page of the scatter plot of all adapters with a used fraction of their rank, with
    a colour per run.

    Raises:
        UndrawableError: No adapter has a rank.
    """
    points = _make_points(series)
    if not points:
        raise UndrawableError("no adapter has a rank")
    marker: dict[str, Any] = {"ls": "", "mew": 0, "ms": 3.4 * style.line}
    labels = ["one adapter"] if len(series) == 1 else [item.label for item in series]
    keys = [
        key(label, color=category(number), marker="o", **marker)
        for number, label in enumerate(labels)
    ]
    if any(point.fro == 0 for point in points):
        color = category(0) if len(series) == 1 else INK
        keys.append(key("ΔW = 0", color=color, marker="v", **marker))
    dotted: dict[str, Any] = {"color": INK, "alpha": 0.6, "lw": 0.8 * style.line, "ls": _DOTS}
    keys.append(key(f"over-ranked: at most {OVER_RANKED_BELOW:g}", **dotted))
    outliers = sum(bool(point.outlier_kinds) for point in points)
    are = "is an outlier" if outliers == 1 else "are outliers"
    notes = [f"{outliers or 'None'} of them {are}; the rarest are named where space permits."]
    if rankless := sum(len(item.records) for item in series) - len(points):
        notes.append(f"Not drawn: {rankless} without a rank.")
    draw = partial(_draw_points, points=points)
    return Page(
        "A fleet of adapters: norm of the update and used fraction of its rank",
        [Panel("", draw, "rank at 99% of the energy / r", "‖ΔW‖_F")],
        f"{quantity(len(points), 'adapter')}; ‖ΔW‖_F over all layers; rank: Σ of the layers' ranks "
        "at 99% of the energy over Σr",
        notes,
        keys,
    )


def _make_points(series: Sequence[Series[Any]]) -> list[_Point]:
    """Return a point for each adapter with a used fraction of its rank."""
    records = [(record, run) for run, item in enumerate(series) for record in item.records]
    names = short_names(record.adapter for record, _ in records)
    outlier_kinds = [kinds for item in series for kinds in find_outlier_kinds(item.records)]
    return [
        _Point(names[record.adapter], kinds, record.used, record.fro, run)
        for (record, run), kinds in zip(records, outlier_kinds, strict=True)
        if record.used is not None
    ]


def _draw_points(ax: Axes, style: PageStyle, points: Sequence[_Point]) -> None:
    """Draw a point for each adapter, the limit of over-ranked ones, and the names of the rarest
    outliers.
    """
    norms = [point.fro for point in points if point.fro > 0] or [1.0]
    low, high = min(norms) / 2, max(norms) * 1.6
    ax.set_yscale("log")
    rarest = order_by_rarity([point.outlier_kinds for point in points])
    outliers = [points[i] for i in rarest[:_NAMES]]
    ax.set(xlim=(-0.03, 1 / _PLOT if outliers else 1.03), ylim=(low, high))
    set_fraction_ticks(ax.xaxis)
    format_log_axis(ax.yaxis, low, high)
    ax.spines["bottom"].set_bounds(-0.03, 1.03)
    limit: dict[str, Any] = {"color": INK, "alpha": 0.4, "lw": 0.7 * style.line, "ls": _DOTS}
    ax.plot([OVER_RANKED_BELOW] * 2, [low, high], label="_used", **limit)
    dots: dict[str, Any] = {
        "ls": "",
        "ms": 3.4 * style.line,
        "mew": 0,
        "alpha": 0.8,
        "clip_on": False,
    }
    for run in {point.run for point in points}:
        color = category(run)
        alive = [point for point in points if point.run == run and point.fro]
        dead = [point for point in points if point.run == run and not point.fro]
        # A line without points would count in the layout, at the corner of the page.
        if alive:
            used = [point.used for point in alive]
            norms = [point.fro for point in alive]
            ax.plot(used, norms, marker="o", color=color, label="_adapters", **dots)
        if dead:
            used = [point.used for point in dead]
            ax.plot(used, [low] * len(dead), marker="v", color=color, label="_dead", **dots)
    _draw_names(ax, style, outliers, low, high)


def _draw_names(
    ax: Axes, style: PageStyle, outliers: Sequence[_Point], low: float, high: float
) -> None:
    """Write the names of outliers in a column at the right, in the order of the norms, each with a
    line to its point.
    """
    named = sorted(outliers, key=lambda point: (point.fro, point.used))
    heights = [point.fro or low for point in named]
    if len(named) > 2:
        heights = list(np.geomspace(low * 1.2, high / 1.2, len(named)))
    thin: dict[str, Any] = {
        "color": QUIET,
        "lw": 0.5 * style.line,
        "alpha": 0.6,
        "zorder": 1,
        "clip_on": False,
    }
    chars = fit_chars(0.9 * (1 - _PLOT) * ax.get_window_extent().width / ax.figure.dpi, style.ticks)
    short = crop_names([point.name for point in named], chars)
    for point, y in zip(named, heights, strict=True):
        text = f"{short[point.name]}: {', '.join(point.outlier_kinds)}"
        text = text if len(text) <= chars else short[point.name]
        ax.plot([point.used, 1.03, 1.06], [point.fro or low, y, y], label="_to a name", **thin)
        ax.text(1.07, y, text, size=style.ticks, va="center", parse_math=False, in_layout=False)
