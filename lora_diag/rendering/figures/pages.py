"""Pages of figures: panels with title, legend and notes, laid out in one place; and single panels on a user's own axes.

A feature makes a ``Page`` of its records: what its panels draw, and the text around them. ``make_figure`` draws it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from lora_diag.errors import UsageError
from lora_diag.records import Results
from lora_diag.rendering.figures.series import Options, Series, single_series
from lora_diag.rendering.figures.style import (
    DEPTH,
    INK,
    PANEL,
    QUIET,
    PageStyle,
    apply_style,
    category,
    crop_names,
    format_log_axis,
    width_of,
    wrap_text,
)

# Line height relative to font size; gap between blocks of text in lines.
LEADING, GAP = 1.28, 0.55
# Maximum number of readable panels; the smallest types share the last one.
MAX_PANELS = 24

# Draws a panel: ``draw(ax, style)``, where the width of ``style`` is that of the panel.
Draw = Callable[[Axes, PageStyle], object]


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel of a page.

    Args:
        title: Its title; may be empty.
        draw: Draws it.
        xlabel: Label of its x axis; of small multiples, drawn at the bottom.
        ylabel: Label of its y axis; of small multiples, drawn at the left.
        height: Its height in inches, with its labels; 0 for ``PageStyle.panel``, or 1.9 times that without ``share``.
        width: Its width in inches; 0 for an estimate from the number of columns.
        name: What selects it for a user's own axes, such as an evaluation set.
        after: Draws what depends on the height of the panel, after the layout.
    """

    title: str
    draw: Draw
    xlabel: str = ""
    ylabel: str = ""
    height: float = 0.0
    width: float = 0.0
    name: str = ""
    after: Draw | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of the legend."""

    handle: Artist
    label: str


def key(label: str, **line_style: Any) -> Key:
    """Return the entry of a line or a marker in the legend."""
    return Key(Line2D([], [], **line_style), label)


@dataclass(frozen=True, slots=True)
class Page:
    """A figure: its panels and the text around them.

    Args:
        title: Quantity and norm of the figure.
        panels: The panels, row by row.
        about: Subtitle: the data shown.
        notes: Notes: aggregation, data not drawn; empty ones are left out.
        keys: The legend; None for the labels of what is drawn.
        columns: Panels side by side; 0 for as many as are readable.
        share: Whether the panels are small multiples with common axes.
        low: Whether the figure may be shorter than its page.
        scale: Colour scale at the side; None without one.
        scale_label: Label of the colour scale.
    """

    title: str
    panels: Sequence[Panel]
    about: str = ""
    notes: Sequence[str] = ()
    keys: Sequence[Key] | None = None
    columns: int = 0
    share: bool = False
    low: bool = False
    scale: ScalarMappable | None = None
    scale_label: str = ""


def choose_columns(count: int, style: PageStyle, share: bool = False) -> int:
    """Return the number of panels side by side; on the page of a column, only small multiples are.

    >>> from lora_diag.rendering.figures.style import COLUMN, SLIDE
    >>> [choose_columns(count, SLIDE, share=True) for count in (1, 7, 9)], choose_columns(9, COLUMN, share=True)
    ([1, 4, 5], 3)
    >>> [choose_columns(count, SLIDE) for count in (2, 4, 5)], choose_columns(4, COLUMN)
    ([2, 2, 3], 1)
    """
    if not share:
        return 1 if style.columns < 3 else min(count, 2 if count in {2, 4} else 3)
    if count <= style.columns:
        return max(count, 1)
    return min((style.columns, style.columns + 1), key=lambda columns: -count % columns)  # with few empty places


def make_figure(page: Page, style: PageStyle) -> Figure:
    """Draw a page; taller than its style if its panels need it."""
    count = len(page.panels)
    columns = page.columns or choose_columns(count, style, page.share)
    rows, text = math.ceil(count / columns), style.text / 72
    heights = [
        max(
            panel.height or (1.0 if page.share else 1.9) * style.panel
            for panel in page.panels[row * columns : (row + 1) * columns]
        )
        for row in range(rows)
    ]
    width = style.width / columns - 6.5 * text
    if page.share:
        width = (style.width * (0.97 if page.scale is None else 0.88) - 3.4 * text) / columns - 1.2 * text
        titles = crop_names([panel.title for panel in page.panels], width, style.text)
    figure = Figure(figsize=(style.width, style.height), dpi=style.dpi, facecolor="white")
    ratios = {"height_ratios": heights}
    axes = figure.subplots(rows, columns, sharex=page.share, sharey=page.share, squeeze=False, gridspec_kw=ratios)
    for number, (panel, ax) in enumerate(zip(page.panels, axes.flat, strict=False)):
        inches = panel.width or width
        panel.draw(ax, replace(style, width=inches))
        title = titles[panel.title] if page.share else wrap_text(panel.title, inches, style.text)
        ax.set_title(title, parse_math=False)
        if not page.share or number // columns == rows - 1:
            ax.set_xlabel(panel.xlabel or ax.get_xlabel())
        if not page.share or number % columns == 0:
            ax.set_ylabel(panel.ylabel or ax.get_ylabel())
        if page.share and number + columns >= count:
            ax.tick_params(labelbottom=True)
    for ax in axes.flat[count:]:
        ax.remove()
    keys = collect_keys(figure.axes) if page.keys is None else page.keys
    if page.scale is not None:
        add_scale(figure, figure.axes, page.scale, page.scale_label, sum(heights) / (0.02 * style.width))
    _add_text(figure, page, keys, sum(heights), style)
    if any(panel.after for panel in page.panels):
        figure.draw_without_rendering()
    for panel, ax in zip(page.panels, axes.flat, strict=False):
        if panel.after:
            panel.after(ax, style)
    return figure


def collect_keys(axes: Iterable[Axes]) -> list[Key]:
    """Return the labels of what is drawn, each once, in the order of drawing."""
    drawn = [(label, handle) for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)]
    first = dict(reversed(drawn))
    return [Key(first[label], label) for label in dict.fromkeys(label for label, _ in drawn)]


def add_scale(figure: Any, axes: Sequence[Axes], scale: ScalarMappable, label: str, aspect: float = 20.0) -> None:
    """Add a colour scale at the side of panels."""
    bar = figure.colorbar(scale, ax=list(axes), fraction=0.04, aspect=aspect, pad=0.015)
    bar.set_label(label, parse_math=False)
    bar.outline.set_visible(False)
    if bar.ax.get_yscale() == "log":
        format_log_axis(bar.ax.yaxis, *bar.ax.get_ylim())
    elif scale.cmap is DEPTH:
        bar.locator = MaxNLocator(nbins=6, integer=True)
        bar.update_ticks()


def _add_text(figure: Figure, page: Page, keys: Sequence[Key], panels: float, style: PageStyle) -> None:
    """Place title, subtitle and legend above the panels and the notes below, and fit the height of the page."""
    margin, ticks = 0.6 * style.text / 72, style.ticks / 72
    width = style.width - 2 * margin
    blocks: list[tuple[str, dict[str, Any]]] = [
        # Bold text is one ninth wider than the measured regular text.
        (wrap_text(page.title, width / 1.12, style.title), {"size": style.title, "color": INK, "weight": "bold"}),
        (wrap_text(page.about, width, style.ticks), {"size": style.ticks, "color": QUIET}),
        (wrap_text(" ".join(filter(None, page.notes)), width, style.ticks), {"size": style.ticks, "color": QUIET}),
    ]
    depths = [
        ((text.count("\n") + 1) * LEADING + GAP) * font["size"] / 72 if text and not style.plain else 0.0
        for text, font in blocks
    ]
    rows = _break_legend(keys, width, style)
    row_depths = [max(key.label.count("\n") + 1 for key in row) * LEADING * 1.15 * ticks for row in rows]
    above = sum(depths[:2]) + sum(row_depths) + (GAP * ticks if rows else 0.0)
    text_height = above + depths[2] + 2 * margin
    height = max(0.0 if page.low else style.height, text_height + panels)
    figure.set_size_inches(style.width, height)
    figure.set_layout_engine(
        "constrained",
        rect=(
            margin / style.width / 2,
            (depths[2] + margin / 2) / height,
            1 - margin / style.width,
            1 - (text_height - margin) / height,
        ),
        w_pad=0.04 * style.text / 10,
        h_pad=0.06 * style.text / 10,
        wspace=0.02,
        hspace=0.02,
    )
    tops = (height - margin, height - margin - depths[0], depths[2] + margin / 2)
    for (text, font), depth, top in zip(blocks, depths, tops, strict=True):
        if depth:
            place: dict[str, Any] = {"x": margin / style.width, "y": top / height, "va": "top", "linespacing": LEADING}
            figure.text(s=text, **place, **font, parse_math=False, in_layout=False)
    top = height - margin - sum(depths[:2])
    for row, depth in zip(rows, row_depths, strict=True):
        legend = figure.legend(
            [key.handle for key in row],
            [key.label for key in row],
            loc="upper left",
            bbox_to_anchor=Bbox.from_bounds(margin / style.width, top / height, 0, 0),
            ncols=len(row),
            borderpad=0,
            borderaxespad=0,
            handlelength=1.9,
            handletextpad=0.5,
            columnspacing=1.4,
        )
        for label in legend.get_texts():
            label.set_parse_math(False)
        legend.set_in_layout(False)
        top -= depth


def _break_legend(keys: Sequence[Key], width: float, style: PageStyle) -> list[list[Key]]:
    """Break the legend into rows that fit; a label longer than a row is wrapped."""
    rows: list[list[Key]] = []
    room, handle = 0.0, 4.2 * style.ticks / 72
    for key in (Key(key.handle, wrap_text(key.label, width - handle, style.ticks)) for key in keys):
        needed = width_of(key.label, style.ticks) + handle
        if not rows or needed > room:
            rows.append([])
            room = width
        rows[-1].append(key)
        room -= needed
    return rows


def freeze_layout(figure: Figure) -> Figure:
    """Compute the layout and fix it.

    The solver's result differs in the last bits between runs (it orders by address), which would change the bytes of an
    SVG, whose clip paths are named by a hash of their bounds. Positions are therefore rounded to a millionth of the
    page.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for ax in figure.axes:
        position = ax.get_position(original=True)
        ax.set_position(Bbox(np.round(position.get_points(), 6)))
    return figure


@contextmanager
def panel_axes(ax: Axes | None) -> Iterator[tuple[Axes, PageStyle]]:
    """Yield given axes, whose fonts are kept, or those of a new figure; and a style whose width is that of the axes."""
    with apply_style(PANEL if ax is None else None):
        style = PANEL if ax is None else replace(PANEL, text=10, line=1.2)
        if ax is None:
            figure = Figure((PANEL.width, PANEL.height), dpi=PANEL.dpi, layout="constrained", facecolor="white")
            ax = figure.subplots()
        yield ax, replace(style, width=float(ax.get_window_extent().width) / ax.figure.dpi)


def draw_panel(
    make_page: Callable[[Sequence[Series[Any]], PageStyle, Options], Page],
    results: Results[Any] | Iterable[Any],
    kind: str,
    ax: Axes | None,
    *,
    name: str | None = None,
    options: Options | None = None,
    legend: bool = False,
) -> Axes:
    """Draw one panel of a page on a user's own axes.

    Args:
        make_page: Makes the page of some series.
        results: Results of a run, or its records.
        kind: Kind of the records drawn; empty for all.
        ax: Axes to draw on; None for those of a new figure.
        name: Name of the panel; default the first.
        options: Options of the figure.
        legend: Whether to add a legend.

    Returns:
        The Axes drawn on.

    Raises:
        UsageError: The records cannot be drawn, or there is no panel of this name.
    """
    with panel_axes(ax) as (axes, style):
        page = make_page((single_series(results, kind),), style, options or Options())
        panel = next((panel for panel in page.panels if name in {None, panel.name}), None)
        if panel is None:
            raise UsageError(f"{name}: unknown; use one of {', '.join(panel.name for panel in page.panels)}")
        panel.draw(axes, style)
        axes.set_title(wrap_text(panel.title, style.width, style.text), loc="left", parse_math=False)
        axes.tick_params(labelbottom=True)
        axes.set(xlabel=panel.xlabel or axes.get_xlabel(), ylabel=panel.ylabel or axes.get_ylabel())
        if panel.after:
            panel.after(axes, style)
        if legend:
            add_legend(axes, page.keys)
    return axes


def add_legend(ax: Axes, keys: Sequence[Key] | None = None) -> None:
    """Add a legend to a panel: of given keys, or of the labels of what is drawn."""
    keys = collect_keys([ax]) if keys is None else keys
    for text in ax.legend([key.handle for key in keys], [key.label for key in keys], fontsize="small").get_texts():
        text.set_parse_math(False)


# Fraction of a page's width available to the names of rows.
NAMES = 0.42
# Fraction of a row's height over which the values of several runs are spread.
_SPREAD = 0.5
# Maximum number of rows of a panel.
ROWS = 24


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
    color: str = category(0)


def make_rows_panel(
    title: str,
    rows: Sequence[Row],
    style: PageStyle,
    *,
    xlabel: str,
    columns: int = 1,
    order: Sequence[Row] = (),
    name: str = "",
) -> Panel:
    """Return a panel of the ``ROWS`` highest of named values with error bars, one below the other.

    Args:
        title: Title of the panel.
        rows: The values.
        style: The page.
        xlabel: Label of the x axis.
        columns: Panels side by side on the page.
        order: Rows whose names come first, in this order; the others follow by their values.
        name: Name of the panel.
    """
    best: dict[str, float] = {}
    for row in rows:
        best[row.name] = max(row.value, best.get(row.name, row.value))
    highest = sorted(best, key=lambda name: -best[name])[:ROWS]
    names = [name for name in dict.fromkeys([*(row.name for row in order), *highest]) if name in highest]
    shown = [row for name in names for row in rows if row.name == name]
    short = crop_names(names, NAMES * style.width / columns, style.ticks)
    return Panel(
        title,
        lambda ax, style: draw_rows(ax, shown, style, short),
        xlabel,
        # Rows shared by several runs need room for all bars.
        height=max(style.panel, (max(len(names), 0.6 * len(shown)) + 3.5) * 1.55 * style.ticks / 72),
        width=style.width / columns * (1 - NAMES) - style.text / 72,
        name=name,
    )


def draw_rows(ax: Axes, rows: Sequence[Row], style: PageStyle, short: Mapping[str, str]) -> None:
    """Draw one dot per row from top to bottom, with an error bar, and a line at zero.

    Args:
        ax: Axes to draw on.
        rows: From top to bottom.
        style: The page.
        short: Short names by name.
    """
    ax.axvline(0, color=INK, lw=0.8 * style.line, ls=(0, (4, 2)), zorder=1)
    names = list(dict.fromkeys(row.name for row in rows))
    colors = list(dict.fromkeys(row.color for row in rows))
    for row in rows:
        offset = _SPREAD * ((colors.index(row.color) + 0.5) / len(colors) - 0.5) if len(names) < len(rows) else 0.0
        bar: dict[str, Any] = {"color": row.color, "marker": "o", "ms": 4 * style.line, "elinewidth": 1.4 * style.line}
        position = names.index(row.name) + offset
        ax.errorbar(row.value, position, xerr=row.error or 0.0, ls="", label=f"_{row.name}", **bar)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_yticks(range(len(names)), [short[name] for name in names], parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    ax.margins(x=0.08)


def run_keys(series: Sequence[Series[Any]], **line_style: Any) -> list[Key]:
    """Return the legend of the colours of several runs; empty for a single run."""
    if len(series) == 1:
        return []
    return [key(item.label, color=category(number), **line_style) for number, item in enumerate(series)]


def make_rows_page(
    series: Sequence[Series[Any]],
    rows_of: Callable[[Series[Any], str, str], Sequence[Row]],
    sets: Mapping[str, str],
    style: PageStyle,
    *,
    title: str,
    about: str,
    xlabel: str,
    notes: Sequence[str] = (),
    ordered: bool = False,
) -> Page:
    """Return a page of named values, one panel per evaluation set.

    Args:
        series: The runs.
        rows_of: Returns the rows of a run on a set in a colour.
        sets: Labels of the sets by name.
        style: The page.
        title: Title of the page.
        about: Its subtitle.
        xlabel: Label of the x axes.
        notes: Notes of the page.
        ordered: Whether all panels have the order of the first.
    """
    rows_by_set = {
        name: [row for number, item in enumerate(series) for row in rows_of(item, name, category(number))]
        for name in sets
    }
    rows_by_set = {name: rows for name, rows in rows_by_set.items() if rows}
    columns = choose_columns(min(len(rows_by_set), 2), style)
    first = next(iter(rows_by_set.values()), [])
    order = sorted(first, key=lambda row: -row.value) if ordered else ()
    panels = [
        make_rows_panel(sets[name], rows, style, xlabel=xlabel, columns=columns, order=order, name=name)
        for name, rows in rows_by_set.items()
    ]
    most = max((len({row.name for row in rows}) for rows in rows_by_set.values()), default=0)
    limit = [f"The {ROWS} highest of {most}."] if most > ROWS else []
    keys = run_keys(series, ls="", marker="o", ms=4 * style.line)
    return Page(title, panels, about, (*notes, *limit), keys, columns=columns, low=True)
