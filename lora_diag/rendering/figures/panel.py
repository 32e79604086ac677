"""One panel over the rank: lines by depth or bands, marked ranks, and an axis whose labels have room."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.rendering.figures.curves import Band, Curve, Quantity, band, curves, largest_rank, ranks_drawn
from lora_diag.rendering.figures.groups import deepest
from lora_diag.rendering.figures.series import Series
from lora_diag.rendering.figures.style import DEPTH, FLOOR, INK, PANEL, Look, category, styled, width_of


@contextmanager
def panel_axes(ax: Axes | None) -> Iterator[tuple[Axes, Look | None]]:
    """Give the caller's axes, whose fonts are left alone, or those of a new figure."""
    with styled(PANEL if ax is None else None):
        if ax is not None:
            yield ax, None
        else:
            figure = Figure((PANEL.width, PANEL.height), dpi=PANEL.dpi, layout="constrained", facecolor="white")
            yield figure.subplots(), PANEL


def draw_series(
    ax: Axes,
    series: Sequence[Series[Spectrum]],
    quantity: Quantity,
    marked: Sequence[int],
    per: str,
    look: Look | None,
    *,
    depths: int | None = None,
    largest: int | None = None,
    inches: float | None = None,
) -> int:
    """Draw one panel: lines by depth, or a band for each of several series.

    Returns:
        The most layers that one line stands for.
    """
    everything = [record for one in series for record in one.records]
    largest = largest or largest_rank(everything)
    grid = ranks_drawn(largest, marked)
    joined = 1
    if per == "type" or len(series) > 1:
        for number, one in enumerate(series):
            if drawn := band(one.records, quantity, grid):
                draw_band(ax, drawn, category(number), one.label or "median layer", look)
    else:
        depths = deepest(record.layer for record in everything) if depths is None else depths
        for curve in curves(series[0].records, quantity, grid):
            draw_curve(ax, curve, depth_color(curve.depth, depths), look)
            joined = max(joined, curve.layers)
    rank_axis(ax, largest, marked, look, inches or float(ax.get_window_extent().width) / ax.figure.dpi)
    return joined


def draw_curve(ax: Axes, curve: Curve, color: object, look: Look | None) -> None:
    """Draw what the files resolve in colour, the rest in grey."""
    width = None if look is None else look.line
    style: dict[str, Any] = {"marker": "o", "markersize": 2 * (width or 1)} if len(curve.ranks) == 1 else {}
    clear = int(np.searchsorted(curve.ranks, curve.signal, side="right"))
    # The grey part starts where the coloured one ends, or there would be a gap.
    beyond = slice(max(clear - 1, 0), None)
    if clear < len(curve.ranks):
        ax.plot(
            curve.ranks[beyond],
            curve.values[beyond],
            color=FLOOR,
            lw=0.8 * width if width else None,
            zorder=1.5,
            label=f"_floor of {curve.layer}",
            **style,
        )
    if clear:
        ax.plot(curve.ranks[:clear], curve.values[:clear], color=color, lw=width, zorder=2, label=curve.layer, **style)


def depth_color(depth: int | None, deepest: int) -> object:
    """Return the colour of a block; of what lies outside the blocks, that of text."""
    return INK if depth is None else DEPTH(depth / deepest if deepest else 0.0)


def draw_band(ax: Axes, drawn: Band, color: object, label: str, look: Look | None) -> None:
    """Draw a median and the range around it."""
    ax.fill_between(drawn.ranks, drawn.low, drawn.high, color=color, alpha=0.22, lw=0, zorder=1.5)
    ax.plot(drawn.ranks, drawn.middle, color=color, lw=1.4 * look.line if look else None, zorder=2, label=label)


def rank_axis(ax: Axes, largest: int, marked: Sequence[int], look: Look | None, inches: float) -> None:
    """Make x the rank: logarithmic, the usual ranks marked, labels only where there is room for them."""
    ax.set_xscale("log")
    ax.set_xlim(0.92, max(largest * 1.08, 2))
    for rank in marked:
        if rank <= largest:
            ax.axvline(rank, color=INK, alpha=0.35, lw=0.6 * (look.line if look else 1), ls=(0, (1, 1.6)), zorder=1)
    shown = _labelled(largest, marked, inches, look.ticks if look else 9)
    ax.xaxis.set_major_locator(FixedLocator(shown))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def _labelled(largest: int, marked: Sequence[int], inches: float, size: float) -> list[int]:
    """Choose ranks to label: the ends and the marked ones first, then powers of two; none that touch."""
    decades = math.log10(max(largest * 1.08, 2) / 0.92)
    powers = [2**k for k in range(1, 20) if 2**k < largest]
    shown: list[int] = []
    for rank in (1, largest, *marked, *reversed(powers)):
        room = [
            abs(math.log10(rank / other)) / decades * inches
            - (width_of(str(rank), size) + width_of(str(other), size)) / 2
            for other in shown
        ]
        if rank <= largest and all(space > 0.7 * size / 72 for space in room):
            shown.append(rank)
    return sorted(shown)
