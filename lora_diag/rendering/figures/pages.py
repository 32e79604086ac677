"""Pages of several panels: of sets or runs, of module types as small multiples, and of named values.

Panels of sets or runs are wide enough to be read; named values have error bars, one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lora_diag.rendering.figures.panels import panel_width, panels_of
from lora_diag.rendering.figures.series import Series
from lora_diag.rendering.figures.sheet import FigureText, Key, finish_grid, grid_of, sheet
from lora_diag.rendering.figures.style import CATEGORIES, INK, PageStyle, category, crop_names, wrap_text

# Draws a panel: ``draw(ax, inches=...)``, on axes of this width in inches.
Draw = Callable[..., object]


def page_of(
    panels: Sequence[tuple[str, Draw]],
    text: FigureText,
    style: PageStyle,
    *,
    height: float = 1.9,
    xlabel: str = "",
    ylabel: str = "",
) -> Figure:
    """Return a page of panels with separate axes.

    Args:
        panels: The title of each, and what draws it.
        text: The text around them.
        style: The page.
        height: Least height of a panel over that of the page's small multiples.
        xlabel: Label of all x axes; as drawn if empty.
        ylabel: Label of all y axes; as drawn if empty.
    """
    rows, columns = panels_of(len(panels), style)
    inches = panel_width(style, columns)
    figure, axes = sheet(style, text, rows, columns, panel=height * style.panel, share=False)
    for (title, draw), ax in zip(panels, axes, strict=False):
        draw(ax, inches=inches)
        ax.set_title(wrap_text(title, inches, style.text), parse_math=False)
        ax.set(**{name: label for name, label in (("xlabel", xlabel), ("ylabel", ylabel)) if label})
    for ax in axes[len(panels) :]:
        ax.remove()
    return figure


def multiples_of(
    panels: Mapping[str, Draw], text: FigureText, style: PageStyle, xlabel: str, ylabel: str, width: float = 0.97
) -> Figure:
    """Return a page of one panel for each module type, with shared axes.

    Args:
        panels: What draws the panel of each type.
        text: The text around them.
        style: The page.
        xlabel: Label of the x axes at the bottom.
        ylabel: Label of the y axes at the left.
        width: Share of the page's width that the panels have.
    """
    rows, columns = grid_of(len(panels), style)
    inches = (style.width * width - 3.4 * style.text / 72) / columns - 1.2 * style.text / 72
    figure, axes = sheet(style, text, rows, columns)
    titles = crop_names(list(panels), inches, style.text)
    for (name, draw), ax in zip(panels.items(), axes, strict=False):
        draw(ax, inches=inches)
        ax.set_title(titles[name], parse_math=False)
    finish_grid(axes, len(panels), columns, xlabel, ylabel)
    return figure


# Fraction of a page's width available to names.
NAMES = 0.42
# Fraction of a row's height over which the values of several runs are spread.
_SPREAD = 0.5


@dataclass(frozen=True, slots=True)
class Row:
    """One value; values of several runs with one name share a row.

    Args:
        name: Name as drawn.
        value: Position of the dot.
        error: Half the length of the bar; None without a bar.
        color: Colour of both.
    """

    name: str
    value: float
    error: float | None = None
    color: str = CATEGORIES[0]


def highest(rows: Sequence[Row], count: int, first: Sequence[Row] = ()) -> list[Row]:
    """Return the rows of the names with the highest values.

    Args:
        rows: Rows of all runs.
        count: Number of names.
        first: Rows that define the order; if empty, the highest values come first.
    """
    best: dict[str, float] = {}
    for row in rows:
        best[row.name] = max(row.value, best.get(row.name, row.value))
    names = sorted(best, key=lambda name: -best[name])[:count]
    order = {name: number for number, name in enumerate(dict.fromkeys([*(row.name for row in first), *names]))}
    return sorted((row for row in rows if row.name in names), key=lambda row: order[row.name])


def draw_rows(ax: Axes, rows: Sequence[Row], style: PageStyle | None, short: Mapping[str, str] | None = None) -> None:
    """Draw one dot per row from top to bottom, with an error bar, and a line at zero.

    Args:
        ax: Axes to draw on.
        rows: From top to bottom.
        style: The page.
        short: Short names by name; default unchanged names.
    """
    width = style.line if style else 1.2
    ax.axvline(0, color=INK, lw=0.8 * width, ls=(0, (4, 2)), zorder=1)
    names = list(dict.fromkeys(row.name for row in rows))
    colors = list(dict.fromkeys(row.color for row in rows))
    positions = {name: order for order, name in enumerate(names)}
    shared = len(names) < len(rows)
    for row in rows:
        offset = _SPREAD * ((colors.index(row.color) + 0.5) / len(colors) - 0.5) if shared else 0.0
        bar: dict[str, Any] = {"color": row.color, "marker": "o", "ms": 4 * width, "elinewidth": 1.4 * width}
        ax.errorbar(row.value, positions[row.name] + offset, xerr=row.error or 0.0, ls="", label=f"_{row.name}", **bar)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_yticks(range(len(names)), [short[name] if short else name for name in names])
    for label in ax.get_yticklabels():
        label.set_parse_math(False)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    ax.margins(x=0.08)


def run_keys(series: Sequence[Series[Any]], style: PageStyle) -> tuple[Key, ...]:
    """Return the legend of the colours of several runs; empty for a single run."""
    if len(series) == 1:
        return ()
    dot: dict[str, Any] = {"ls": "", "marker": "o", "ms": 4 * style.line}
    return tuple(Key(Line2D([], [], color=category(n), **dot), item.label) for n, item in enumerate(series))


def figure_of(panels: Sequence[tuple[str, Sequence[Row]]], xlabel: str, text: FigureText, style: PageStyle) -> Figure:
    """Return a page of panels of named values: two side by side, or stacked on a column page."""
    columns = 1 if style.columns < 3 else min(len(panels), 2)
    rows = -(-len(panels) // columns)
    names = {row.name for _, panel_rows in panels for row in panel_rows}
    short = crop_names(sorted(names), NAMES * style.width / columns, style.ticks)
    inches = style.width / columns * (1 - NAMES)
    # Rows shared by several runs need room for all bars.
    max_rows = max(max(len({row.name for row in panel_rows}), 0.6 * len(panel_rows)) for _, panel_rows in panels)
    panel = max(style.panel, (max_rows + 3.5) * 1.55 * style.ticks / 72)
    figure, axes = sheet(style, text, rows, columns, panel=panel, share=False, low=True)
    for (title, panel_rows), ax in zip(panels, axes, strict=False):
        draw_rows(ax, panel_rows, style, short)
        ax.set_title(wrap_text(title, inches, style.text), parse_math=False)
        ax.set_xlabel(xlabel)
    for ax in axes[len(panels) :]:
        ax.remove()
    return figure
