"""The page of a figure: title, subtitle, legend, panels, notes. Text is measured to avoid overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from lora_diag.rendering.figures.style import DEPTH, INK, QUIET, PageStyle, width_of, wrap_text

# Line height relative to font size; gap between blocks of text in lines.
LEADING, GAP = 1.28, 0.55

# Maximum number of readable panels; the smallest types share the last one.
MAX_PANELS = 24


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of the legend."""

    handle: Artist
    label: str


@dataclass(frozen=True, slots=True)
class FigureText:
    """The text around the panels.

    Args:
        title: Quantity and norm of the figure.
        about: Subtitle: the data shown.
        notes: Notes: aggregation, data not drawn.
        keys: The legend.
    """

    title: str
    about: str = ""
    notes: tuple[str, ...] = ()
    keys: tuple[Key, ...] = field(default=())


def grid_of(panels: int, style: PageStyle) -> tuple[int, int]:
    """Return rows and columns of small multiples: about as many columns as fit the page, with few empty places.

    >>> from lora_diag.rendering.figures.style import COLUMN, SLIDE
    >>> grid_of(9, COLUMN), grid_of(7, COLUMN), grid_of(7, SLIDE), grid_of(1, SLIDE)
    ((3, 3), (4, 2), (2, 4), (1, 1))
    """
    if panels <= style.columns:
        return 1, max(panels, 1)
    columns = min((style.columns, style.columns + 1), key=lambda columns: -panels % columns)
    return math.ceil(panels / columns), columns


def sheet(
    style: PageStyle,
    text: FigureText,
    rows: int = 1,
    columns: int = 1,
    *,
    panel: float | None = None,
    ratios: Sequence[float] | None = None,
    share: bool = True,
    low: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Return a new figure with its text placed, and its panels row by row.

    Args:
        style: The page; the figure may be taller if its panels need it.
        text: The text.
        rows: Rows of panels.
        columns: Columns of panels.
        panel: Minimum height of a panel with its title, in inches; default by the page.
        ratios: Relative heights of the rows.
        share: Whether all panels have the same axes.
        low: Whether the figure may be shorter than its page.
    """
    if style.plain:
        text = replace(text, title="", about="", notes=())
    above = _Block(style, style.width - 2 * _compute_margin(style))
    above.add(text.title, style.title, INK, "bold")
    above.add(text.about, style.ticks, QUIET)
    key_rows = _break_legend(text.keys, above.width, style)
    below = _Block(style, above.width)
    for note in text.notes:
        below.add(note, style.ticks, QUIET)
    keys_height = sum(map(_count_lines, key_rows)) * LEADING * style.ticks / 72 * 1.15 + (
        GAP * style.ticks / 72 if key_rows else 0
    )
    text_height = above.height + keys_height + below.height + 2 * _compute_margin(style)
    height = max(0.0 if low else style.height, text_height + rows * (panel or style.panel))
    figure = Figure(figsize=(style.width, height), dpi=style.dpi, facecolor="white")
    figure.set_layout_engine(
        "constrained",
        rect=(
            _compute_margin(style) / style.width / 2,
            (below.height + _compute_margin(style) / 2) / height,
            1 - _compute_margin(style) / style.width,
            1 - (text_height - _compute_margin(style)) / height,
        ),
        w_pad=0.04 * style.text / 10,
        h_pad=0.06 * style.text / 10,
        wspace=0.02,
        hspace=0.02,
    )
    above.write(figure, height - _compute_margin(style))
    _write_keys(figure, key_rows, height - _compute_margin(style) - above.height, style)
    below.write(figure, below.height + _compute_margin(style) / 2)
    axes = figure.subplots(
        rows,
        columns,
        sharex=share,
        sharey=share,
        squeeze=False,
        gridspec_kw={"height_ratios": ratios} if ratios else None,
    )
    return figure, [axis for row in np.asarray(axes) for axis in row]


def _compute_margin(style: PageStyle) -> float:
    return 0.6 * style.text / 72


class _Block:
    """Lines of text from top to bottom, as wide as the figure."""

    def __init__(self, style: PageStyle, width: float) -> None:
        self.style, self.width, self.height = style, width, 0.0
        self._parts: list[tuple[str, float, str, str]] = []

    def add(self, text: str, size: float, color: str, weight: str = "normal") -> None:
        if text:
            # Bold text is one ninth wider than the measured regular text.
            lines = wrap_text(text, self.width / (1.12 if weight == "bold" else 1), size)
            self._parts.append((lines, size, color, weight))
            self.height += ((lines.count("\n") + 1) * LEADING + GAP) * size / 72

    def write(self, figure: Figure, top: float) -> None:
        left, height = _compute_margin(self.style) / self.style.width, figure.get_figheight()
        for lines, size, color, weight in self._parts:
            figure.text(
                left,
                top / height,
                lines,
                size=size,
                color=color,
                weight=weight,
                va="top",
                linespacing=LEADING,
                parse_math=False,
                in_layout=False,
            )
            top -= ((lines.count("\n") + 1) * LEADING + GAP) * size / 72


def _break_legend(keys: Sequence[Key], width: float, style: PageStyle) -> list[list[Key]]:
    """Break the legend into rows that fit; a name longer than a row is wrapped."""
    rows: list[list[Key]] = []
    room = 0.0
    handle = 4.2 * style.ticks / 72
    for key in (Key(key.handle, wrap_text(key.label, width - handle, style.ticks)) for key in keys):
        needed = width_of(key.label, style.ticks) + handle
        if not rows or needed > room:
            rows.append([])
            room = width
        rows[-1].append(key)
        room -= needed
    return rows


def _count_lines(row: Sequence[Key]) -> int:
    return max(key.label.count("\n") + 1 for key in row)


def _write_keys(figure: Figure, rows: Sequence[Sequence[Key]], top: float, style: PageStyle) -> None:
    height = figure.get_figheight()
    for row in rows:
        legend = figure.legend(
            [key.handle for key in row],
            [key.label for key in row],
            loc="upper left",
            bbox_to_anchor=Bbox.from_bounds(_compute_margin(style) / style.width, top / height, 0, 0),
            ncols=len(row),
            borderpad=0,
            borderaxespad=0,
            handlelength=1.9,
            handletextpad=0.5,
            columnspacing=1.4,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        legend.set_in_layout(False)
        top -= _count_lines(row) * 1.15 * LEADING * style.ticks / 72


def finish_grid(axes: Sequence[Axes], used: int, columns: int, xlabel: str, ylabel: str) -> None:
    """Label the outer panels, and remove unused ones."""
    for number, ax in enumerate(axes):
        if number >= used:
            ax.remove()
            continue
        if number + columns >= used:
            ax.tick_params(labelbottom=True)
        if number // columns == (used - 1) // columns:
            ax.set_xlabel(xlabel)
        if number % columns == 0:
            ax.set_ylabel(ylabel)


def depth_bar(figure: Figure, axes: Sequence[Axes], deepest: int, style: PageStyle) -> None:
    """Add the depth scale at the side of all panels."""
    scale = ScalarMappable(Normalize(0, deepest), DEPTH)
    bar = figure.colorbar(scale, ax=list(axes), fraction=0.03, aspect=30, pad=0.015)
    bar.set_label("depth (block)", size=style.text)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(nbins=6, integer=True)
    bar.update_ticks()


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
