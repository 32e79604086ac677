"""The axes of a panel: the caller's, or those of a new figure; an axis over the rank whose labels have room."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
