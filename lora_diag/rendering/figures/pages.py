"""Pages of figures: panels with title, legend and caption, laid out in one place; and single panels
on a user's axes.

A feature makes a ``Page`` of its records: what its panels draw, and the text around them.
``make_figure`` draws it. Matplotlib's constrained layout places everything; the title is that of
the legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    DASHED,
    DEPTH,
    INK,
    PANEL,
    QUIET,
    PageStyle,
    apply_style,
    category,
    crop_names,
    fit_chars,
    format_log_axis,
    wrap_text,
)

# Maximum number of readable panels.
MAX_PANELS = 24

# Draws a panel: ``draw(ax, style)``.
Draw = Callable[[Axes, PageStyle], object]


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel of a page.

    Args:
        title: Its title; may be empty.
        draw: Draws it.
        xlabel: Label of its x axis; of small multiples, drawn at the bottom.
        ylabel: Label of its y axis; of small multiples, drawn at the left.
        height: Its height in inches, with its labels; 0 for ``PageStyle.panel``, or 1.9 times that
            without ``share``.
        indent: Length of the labels left of its axes, in characters.
        name: What selects it for a user's own axes, such as an evaluation set.
    """

    title: str
    draw: Draw
    xlabel: str = ""
    ylabel: str = ""
    height: float = 0.0
    indent: int = 6
    name: str = ""


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
        about: First sentence of the caption, without its full stop: the data shown.
        notes: The rest of the caption: aggregation, data not drawn; empty ones are left out.
        keys: The legend; None for the labels of what is drawn.
        columns: Panels side by side; 0 for as many as are readable.
        share: Whether the panels are small multiples with common axes.
        low: Whether the figure may be shorter than its page.
        scale: Colour scale at the side; None without one.
        scale_label: Label of the colour scale.
        whole: The panel for a user's own axes; None for one of ``panels``.
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
    whole: Panel | None = None


def choose_columns(count: int, style: PageStyle, share: bool = False) -> int:
    """Return the number of panels side by side; on the page of a column, only small multiples are.

    >>> from lora_diag.rendering.figures.style import COLUMN, SLIDE
    >>> (
    ...     [choose_columns(count, SLIDE, share=True) for count in (1, 7, 9)],
    ...     choose_columns(9, COLUMN, share=True),
    ... )
    ([1, 4, 5], 3)
    >>> [choose_columns(count, SLIDE) for count in (2, 4, 5)], choose_columns(4, COLUMN)
    ([2, 2, 3], 1)
    """
    if not share and style.columns < 3:
        return 1
    if not share:
        return 2 if count == 4 else min(count, 3)
    if count <= style.columns:
        return max(count, 1)
    # With few empty places.
    return min(style.columns, style.columns + 1, key=lambda columns: -count % columns)


def make_figure(page: Page, style: PageStyle) -> Figure:
    """Return the figure of a page; taller than its style if panels need it, lower only if the page
    may be (``low``).
    """
    panels = list(page.panels)
    count = len(panels)
    columns = page.columns or choose_columns(count, style, page.share)
    width = style.width / columns
    default = style.panel if page.share else 1.9 * style.panel
    of_panels = [panel.height or default for panel in panels]
    heights = [max(of_panels[start : start + columns]) for start in range(0, count, columns)]
    figure = _make_empty_figure(style)
    axes = figure.subplots(
        len(heights),
        columns,
        sharex=page.share,
        sharey=page.share,
        squeeze=False,
        height_ratios=heights,
    )
    # Left of the axes, which have one place on all panels of a column; of small multiples, on the
    # page.
    labels = max(panel.indent for panel in panels)
    left = 0.6 * max(labels - 6, 0) * style.ticks / 72
    scale_width = 0.12 * width if page.scale is not None else 0.0
    chars = fit_chars(0.9 * (width - left / columns - scale_width), style.text)
    titles = crop_names([panel.title for panel in panels], chars)
    room = width - (labels + 1) * 0.6 * style.text / 72
    for number, (panel, ax) in enumerate(zip(panels, axes.flat, strict=False)):
        panel.draw(ax, style)
        title = titles[panel.title]
        if not page.share:
            title = wrap_text(panel.title, room, style.text)
        ax.set_title(title, parse_math=False)
        if not page.share or number + columns >= count:
            ax.set_xlabel(wrap_text(panel.xlabel or ax.get_xlabel(), room, style.text))
        if not page.share or number % columns == 0:
            ax.set_ylabel(panel.ylabel or ax.get_ylabel())
    if page.share:
        for ax in axes.flat[count - columns : count]:
            ax.tick_params(labelbottom=True)
    for ax in axes.flat[count:]:
        ax.remove()
    keys = collect_keys(figure.axes) if page.keys is None else page.keys
    if page.scale is not None:
        aspect = sum(heights) / (0.02 * style.width)
        add_scale(figure, figure.axes, page.scale, page.scale_label, aspect)
    height = sum(heights) + _add_text(figure, page, keys, style)
    figure.set_figheight(max(0.0 if page.low else style.height, height))
    return figure


def _make_empty_figure(style: PageStyle) -> Figure:
    """Return a figure of the size of a page."""
    size = (style.width, style.height)
    return Figure(size, dpi=style.dpi, layout="constrained", facecolor="white")


def collect_keys(axes: Iterable[Axes]) -> list[Key]:
    """Return a legend entry for each label of what is drawn, in the order of drawing."""
    keys: dict[str, Key] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            keys.setdefault(label, Key(handle, label))
    return list(keys.values())


def add_scale(
    figure: Any, axes: Sequence[Axes], scale: ScalarMappable, label: str, aspect: float = 20.0
) -> None:
    """Add a colour scale at the side of panels."""
    bar = figure.colorbar(scale, ax=list(axes), fraction=0.04, aspect=aspect, pad=0.015)
    bar.set_label(label, parse_math=False)
    bar.outline.set_visible(False)
    if bar.ax.get_yscale() == "log":
        format_log_axis(bar.ax.yaxis, *bar.ax.get_ylim())
    elif scale.cmap is DEPTH:
        bar.locator = MaxNLocator(nbins=6, integer=True)
        bar.update_ticks()


def _add_text(figure: Figure, page: Page, keys: Sequence[Key], style: PageStyle) -> float:
    """Add title and legend above the panels and the caption below, and return about their height in
    inches.
    """
    title = caption = ""
    if not style.plain:
        title = wrap_text(page.title, style.width, 1.12 * style.title)
        sentences = filter(None, [page.about and f"{page.about}.", *page.notes])
        caption = wrap_text(" ".join(sentences), style.width, 0.95 * style.ticks)
    room = style.width - 4 * style.ticks / 72
    labels = [wrap_text(key.label, room, 1.08 * style.ticks) for key in keys]
    columns = _count_legend_columns(labels, fit_chars(style.width, 0.95 * style.ticks))
    if title or keys:
        legend = figure.legend(
            [key.handle for key in keys],
            labels,
            loc="outside upper left",
            ncols=columns,
            title=title or None,
            title_fontproperties={"size": style.title, "weight": "bold"},
            alignment="left",
            handlelength=1.9,
            columnspacing=1.4,
        )
        for text in (legend.get_title(), *legend.get_texts()):
            text.set_parse_math(False)
    if caption:
        figure.supxlabel(
            caption, x=0.01, ha="left", size=style.ticks, color=QUIET, parse_math=False
        )
    label_lines = max([label.count("\n") + 1 for label in labels], default=0)
    lines = math.ceil(len(keys) / columns) * label_lines
    title_height = 1.3 * style.title * (title.count("\n") + 2)
    text_height = 1.5 * style.ticks * (lines + caption.count("\n") + 1.5)
    return (title_height + text_height) / 72


def _count_legend_columns(labels: Sequence[str], chars: int) -> int:
    """Return the largest number of columns in which a legend fits into a number of characters; at
    least 1.
    """
    widths = [max(map(len, label.split("\n"))) + 6 for label in labels]
    for columns in range(len(labels), 1, -1):
        # Matplotlib fills columns from top to bottom, the first ones with one more entry.
        parts = np.array_split(widths, columns)
        if sum(int(part.max()) for part in parts) <= chars:
            return columns
    return 1


def freeze_layout(figure: Figure) -> Figure:
    """Compute the layout and fix it; return the same figure.

    The solver's result differs in the last bits between runs (it orders by address), which would
    change the bytes of an SVG, whose clip paths are named by a hash of their bounds. Positions are
    therefore rounded to a millionth of the page.
    """
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine(None)  # not "none", for which savefig draws twice
    for ax in figure.axes:
        position = ax.get_position(original=True)
        ax.set_position(Bbox(np.round(position.get_points(), 6)))
    return figure


def draw_panel(
    make_page: Callable[[Sequence[Series[Any]], PageStyle, Options], Page],
    results: Results[Any] | Iterable[Any],
    kind: str,
    ax: Axes | None,
    name: str | None = None,
    options: Options | None = None,
) -> Axes:
    """Draw one panel of a page on a user's own axes, whose fonts are kept, or on those of a new
    figure.

    Args:
        make_page: Makes the page of some series.
        results: Results of a run, or its records.
        kind: Kind of the records drawn; empty for all.
        ax: Axes to draw on; None for those of a new figure.
        name: Name of the panel; default the first. Not used by a page with a panel for this purpose
            (``whole``).
        options: Options of the figure.

    Returns:
        The Axes drawn on.

    Raises:
        UsageError: No record is of the kind, the records cannot be drawn, or there is no panel of
            this name.
    """
    style = PANEL if ax is None else replace(PANEL, text=10, line=1.2)
    with apply_style(PANEL if ax is None else None):
        if ax is None:
            ax = _make_empty_figure(style).subplots()
        series = single_series(results, kind)
        if not series.records:
            raise UsageError(f"no {kind or 'such'} records to draw; give results that have some")
        page = make_page((series,), style, options or Options())
        named = [panel for panel in page.panels if name in {None, panel.name}]
        if page.whole is None and not named:
            known = ", ".join(panel.name for panel in page.panels)
            raise UsageError(f"{name}: unknown; use one of {known}")
        panel = page.whole or named[0]
        panel.draw(ax, style)
        title = wrap_text(panel.title, 0.8 * style.width, style.text)
        ax.set_title(title, loc="left", parse_math=False)
        ax.tick_params(labelbottom=True)
        ax.set(xlabel=panel.xlabel or ax.get_xlabel(), ylabel=panel.ylabel or ax.get_ylabel())
        if page.scale is not None:
            add_scale(ax.figure, [ax], page.scale, page.scale_label or page.title)
        keys = collect_keys([ax]) if page.keys is None else page.keys
        if keys:
            handles, labels = [key.handle for key in keys], [key.label for key in keys]
            for text in ax.legend(handles, labels, fontsize="small").get_texts():
                text.set_parse_math(False)
    return ax


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
    first = [row.name for row in order]
    names = [name for name in dict.fromkeys([*first, *highest]) if name in highest]
    shown = [row for name in names for row in rows if row.name == name]
    short = crop_names(names, fit_chars(NAMES * style.width / columns, style.ticks))

    def draw(ax: Axes, style: PageStyle) -> None:
        ax.axvline(0, color=INK, lw=0.8 * style.line, ls=DASHED, zorder=1)
        colors = list(dict.fromkeys(row.color for row in shown))
        for row in shown:
            shared = len(names) < len(shown)
            offset = (
                _SPREAD * ((colors.index(row.color) + 0.5) / len(colors) - 0.5) if shared else 0.0
            )
            bar: dict[str, Any] = {
                "color": row.color,
                "ms": 4 * style.line,
                "elinewidth": 1.4 * style.line,
            }
            place = row.value, names.index(row.name) + offset
            ax.errorbar(
                *place, xerr=row.error or 0.0, ls="", marker="o", label=f"_{row.name}", **bar
            )
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_yticks(range(len(names)), [short[name] for name in names], parse_math=False)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        ax.margins(x=0.08)

    # Rows shared by several runs need room for all bars.
    height = max(style.panel, (max(len(names), 0.6 * len(shown)) + 3.5) * 1.55 * style.ticks / 72)
    indent = max(map(len, short.values()), default=0)
    return Panel(title, draw, xlabel, height=height, indent=indent, name=name)


def run_keys(series: Sequence[Series[Any]], **line_style: Any) -> list[Key]:
    """Return the legend of the colours of several runs; empty for a single run."""
    if len(series) == 1:
        return []
    return [
        key(item.label, color=category(number), **line_style) for number, item in enumerate(series)
    ]


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
        about: First sentence of its caption, without its full stop.
        xlabel: Label of the x axes.
        notes: Notes of the page.
        ordered: Whether all panels have the order of the first.
    """
    rows_by_set: dict[str, list[Row]] = {}
    for name in sets:
        for number, item in enumerate(series):
            for row in rows_of(item, name, category(number)):
                rows_by_set.setdefault(name, []).append(row)
    columns = choose_columns(min(len(rows_by_set), 2), style)
    order: list[Row] = []
    panels = []
    most = 0
    for name, rows in rows_by_set.items():
        if ordered:
            order = order or sorted(rows, key=lambda row: -row.value)
        panel = make_rows_panel(
            sets[name], rows, style, xlabel=xlabel, columns=columns, order=order, name=name
        )
        panels.append(panel)
        most = max(most, len({row.name for row in rows}))
    limit = [f"The {ROWS} highest of {most}."] if most > ROWS else []
    keys = run_keys(series, ls="", marker="o", ms=4 * style.line)
    return Page(title, panels, about, (*notes, *limit), keys, columns=columns, low=True)
