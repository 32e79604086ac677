"""Axes of a panel: the caller's, or new ones; a rank axis with labels that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from lora_diag.rendering.figures.style import INK, PANEL, PageStyle, apply_style, width_of


@contextmanager
def panel_axes(ax: Axes | None) -> Iterator[tuple[Axes, PageStyle | None]]:
    """Yield the caller's axes, and None for unchanged fonts; or the axes of a new figure, and their style."""
    with apply_style(PANEL if ax is None else None):
        if ax is not None:
            yield ax, None
        else:
            figure = Figure((PANEL.width, PANEL.height), dpi=PANEL.dpi, layout="constrained", facecolor="white")
            yield figure.subplots(), PANEL


def rank_axis(ax: Axes, largest: int, marked: Sequence[int], style: PageStyle | None, inches: float) -> None:
    """Set up the x axis for ranks: logarithmic, with common ranks marked, and labels as far as they fit."""
    ax.set_xscale("log")
    ax.set_xlim(0.92, max(largest * 1.08, 2))
    for rank in marked:
        if rank <= largest:
            ax.axvline(rank, color=INK, alpha=0.35, lw=0.6 * (style.line if style else 1), ls=(0, (1, 1.6)), zorder=1)
    powers = [2**k for k in range(1, 20) if 2**k < largest]
    candidates = [rank for rank in (*marked, *reversed(powers)) if rank <= largest]
    label_ticks(ax, (1, largest, *candidates), inches, style)


def label_ticks(
    ax: Axes, ticks: Iterable[int], inches: float, style: PageStyle | None, label: Callable[[int], str] = str
) -> None:
    """Label the x axis where labels do not overlap.

    Args:
        ax: Axes with scale and limits set.
        ticks: Ticks to label, the most important first.
        inches: Width of the panel.
        style: The page.
        label: Returns the label of a tick.
    """
    size = style.ticks if style else 9.0
    extents: dict[int, tuple[float, float]] = {}
    for tick in ticks:
        position = (ax.transScale + ax.transLimits).transform((tick, 1))[0] * inches
        half = width_of(label(tick), size) / 2 + 0.35 * size / 72
        if all(abs(position - other_position) > half + other_half for other_position, other_half in extents.values()):
            extents[tick] = (position, half)
    ax.xaxis.set_major_locator(FixedLocator(sorted(extents)))
    ax.xaxis.set_major_formatter(lambda value, _: label(round(value)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
