"""Named values with their errors, one below the other: a panel of dots and bars that several figures are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_diag.rendering.figures.sheet import Words, sheet
from lora_diag.rendering.figures.style import CATEGORIES, INK, Look, cropped_all, styled, wrapped

# Share of a page's width that names may take.
NAMES = 0.38


@dataclass(frozen=True, slots=True)
class Row:
    """One value.

    Args:
        name: As it is drawn.
        value: Where its dot is.
        error: Half the length of its bar; None without one.
        color: Of both.
    """

    name: str
    value: float
    error: float | None = None
    color: str = CATEGORIES[0]


def draw_rows(ax: Axes, rows: Sequence[Row], names: Sequence[str], look: Look | None) -> None:
    """Draw one dot a row from top to bottom, a bar through it, and a line at zero.

    Args:
        ax: Where.
        rows: From top to bottom.
        names: What each is called, short enough for the page.
        look: The page.
    """
    width = look.line if look else 1.2
    ax.axvline(0, color=INK, lw=0.8 * width, ls=(0, (4, 2)), zorder=1)
    for place, row in enumerate(rows):
        bar: dict[str, Any] = {"color": row.color, "marker": "o", "ms": 4 * width, "elinewidth": 1.4 * width}
        ax.errorbar(row.value, place, xerr=row.error or 0.0, ls="", label=f"_{row.name}", **bar)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks(range(len(rows)), list(names))
    for label in ax.get_yticklabels():
        label.set_parse_math(False)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    ax.margins(x=0.08)


def figure_of(panels: Sequence[tuple[str, Sequence[Row]]], xlabel: str, words: Words, look: Look) -> Figure:
    """Return a page of such panels: side by side where there are few, and in a column one below the other."""
    columns = 1 if look.columns < 3 else min(len(panels), 2)
    rows = -(-len(panels) // columns)
    shown = {row.name for _, some in panels for row in some}
    short = cropped_all(sorted(shown), NAMES * look.width / columns, look.ticks)
    inches = look.width / columns * (1 - NAMES)
    most = max(len(some) for _, some in panels)
    panel = max(look.panel, (most + 3.5) * 1.55 * look.ticks / 72)
    with styled(look):
        figure, axes = sheet(look, words, rows, columns, panel=panel, share=False, low=True)
        for (title, some), ax in zip(panels, axes, strict=False):
            draw_rows(ax, some, [short[row.name] for row in some], look)
            ax.set_title(wrapped(title, inches, look.text), parse_math=False)
            ax.set_xlabel(xlabel)
        for ax in axes[len(panels) :]:
            ax.remove()
    return figure
