"""One panel over the rank: lines by depth or bands, marked ranks, and axis labels that fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lora_diag.diagnostics.spectrum.curves import Band, Curve, Quantity, band, curves, largest_rank, ranks_drawn
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.rendering.figures.axes import rank_axis
from lora_diag.rendering.figures.groups import deepest
from lora_diag.rendering.figures.series import Series
from lora_diag.rendering.figures.style import DEPTH, FLOOR, INK, PageStyle, category


def draw_series(
    ax: Axes,
    series: Sequence[Series[Spectrum]],
    quantity: Quantity,
    marked: Sequence[int],
    per: str,
    style: PageStyle | None,
    *,
    depths: int | None = None,
    largest: int | None = None,
    inches: float | None = None,
) -> int:
    """Draw one panel: lines by depth, or a band for each of several series.

    Returns:
        The largest number of layers that one line represents.
    """
    all_records = [record for item in series for record in item.records]
    largest = largest or largest_rank(all_records)
    grid = ranks_drawn(largest, marked)
    joined = 1
    if per == "type" or len(series) > 1:
        for number, item in enumerate(series):
            if drawn := band(item.records, quantity, grid):
                draw_band(ax, drawn, category(number), item.label or "median layer", style)
    else:
        depths = deepest(record.layer for record in all_records) if depths is None else depths
        for curve in curves(series[0].records, quantity, grid):
            draw_curve(ax, curve, depth_color(curve.depth, depths), style)
            joined = max(joined, curve.layers)
    rank_axis(ax, largest, marked, style, inches or float(ax.get_window_extent().width) / ax.figure.dpi)
    return joined


def draw_curve(ax: Axes, curve: Curve, color: object, style: PageStyle | None) -> None:
    """Draw the resolved part in colour, the unresolved part in grey."""
    width = None if style is None else style.line
    line_style: dict[str, Any] = {"marker": "o", "markersize": 2 * (width or 1)} if len(curve.ranks) == 1 else {}
    clear = int(np.searchsorted(curve.ranks, curve.signal, side="right"))
    # The grey part starts where the coloured one ends; otherwise there would be a gap.
    beyond = slice(max(clear - 1, 0), None)
    if clear < len(curve.ranks):
        ax.plot(
            curve.ranks[beyond],
            curve.values[beyond],
            color=FLOOR,
            lw=0.8 * width if width else None,
            zorder=1.5,
            label=f"_floor of {curve.layer}",
            **line_style,
        )
    if clear:
        ax.plot(
            curve.ranks[:clear], curve.values[:clear], color=color, lw=width, zorder=2, label=curve.layer, **line_style
        )


def depth_color(depth: int | None, deepest: int) -> object:
    """Return the colour of a block; outside the blocks, the text colour."""
    return INK if depth is None else DEPTH(depth / deepest if deepest else 0.0)


def draw_band(ax: Axes, drawn: Band, color: object, label: str, style: PageStyle | None) -> None:
    """Draw a median and the range around it."""
    ax.fill_between(drawn.ranks, drawn.low, drawn.high, color=color, alpha=0.22, lw=0, zorder=1.5)
    ax.plot(drawn.ranks, drawn.middle, color=color, lw=1.4 * style.line if style else None, zorder=2, label=label)
