"""The axes of a panel: the caller's, or those of a new figure; an axis over the rank whose labels have room."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from lora_diag.rendering.figures.style import INK, PANEL, Look, styled, width_of


@contextmanager
def panel_axes(ax: Axes | None) -> Iterator[tuple[Axes, Look | None]]:
    """Give the caller's axes, whose fonts are left alone, or those of a new figure."""
    with styled(PANEL if ax is None else None):
        if ax is not None:
            yield ax, None
        else:
            figure = Figure((PANEL.width, PANEL.height), dpi=PANEL.dpi, layout="constrained", facecolor="white")
            yield figure.subplots(), PANEL


def rank_axis(ax: Axes, largest: int, marked: Sequence[int], look: Look | None, inches: float) -> None:
    """Make x the rank: logarithmic, the usual ranks marked, labels only where there is room for them."""
    ax.set_xscale("log")
    ax.set_xlim(0.92, max(largest * 1.08, 2))
    for rank in marked:
        if rank <= largest:
            ax.axvline(rank, color=INK, alpha=0.35, lw=0.6 * (look.line if look else 1), ls=(0, (1, 1.6)), zorder=1)
    powers = [2**k for k in range(1, 20) if 2**k < largest]
    usual = [rank for rank in (*marked, *reversed(powers)) if rank <= largest]
    label_ticks(ax, (1, largest, *usual), inches, look)


def label_ticks(
    ax: Axes, ticks: Iterable[int], inches: float, look: Look | None, label: Callable[[int], str] = str
) -> None:
    """Label x where labels do not touch, and nowhere else.

    Args:
        ax: Where; its scale and limits are set.
        ticks: The ones to label, the most important first.
        inches: Width of the panel.
        look: The page.
        label: Returns what is written at a tick.
    """
    size = look.ticks if look else 9.0
    shown: dict[int, tuple[float, float]] = {}
    for tick in ticks:
        at = (ax.transScale + ax.transLimits).transform((tick, 1))[0] * inches
        half = width_of(label(tick), size) / 2 + 0.35 * size / 72
        if all(abs(at - other) > half + theirs for other, theirs in shown.values()):
            shown[tick] = (at, half)
    ax.xaxis.set_major_locator(FixedLocator(sorted(shown)))
    ax.xaxis.set_major_formatter(lambda value, _: label(round(value)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
