"""`heatmap`: a numeric field of the records by module type and depth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from lora_diag.records import LayerRecord
from lora_diag.records.names import depth_of
from lora_diag.rendering.figures.fields import (
    Types,
    count_matrices,
    format_cell,
    metric_suffix,
    numbers_of,
    title_in,
    value_of,
)
from lora_diag.rendering.figures.pages import Key, Page, Panel
from lora_diag.rendering.figures.series import (
    Options,
    Series,
    UndrawableError,
    split_series,
    subject_of,
)
from lora_diag.rendering.figures.style import (
    INK,
    QUIET,
    SHARES,
    UNKNOWN,
    PageStyle,
    crop_names,
    fit_chars,
    wrap_text,
)

# Ratio of the largest to the smallest value from which the colour scale is logarithmic.
_LOG_FROM = 50
# Fraction of the page's width available to row labels.
NAME_FRACTION = 0.38


@dataclass(frozen=True, slots=True)
class DepthField:
    """A field by module type and depth.

    Args:
        types: Module types of the rows, from the top.
        values: ``(types, depths)``; NaN if the value is null or the layer does not exist.
        layers: Number of layers, ``(types, depths)``; a value is the median of the layers that have
            one.
    """

    types: tuple[str, ...]
    values: NDArray[np.float64]
    layers: NDArray[np.int64]


def cells(
    records: Sequence[LayerRecord], field: str, types: Types, depths: Sequence[int | None]
) -> DepthField:
    """Return the cells of a heat map.

    Args:
        records: One record per layer.
        field: Dotted name of the field.
        types: Module types of all layers; those of ``records`` are rows.
        depths: Block indices of the columns; None for layers outside the blocks.
    """
    present = {types.of(record.layer) for record in records}
    names = tuple(name for name in types.names if name in present)
    groups: dict[tuple[int, int], list[float | None]] = {}
    for record in records:
        cell = names.index(types.of(record.layer)), depths.index(depth_of(record.layer))
        groups.setdefault(cell, []).append(value_of(record, field))
    values = np.full((len(names), len(depths)), np.nan)
    layers = np.zeros(values.shape, dtype=np.int64)
    for cell, found in groups.items():
        layers[cell] = len(found)
        numbers = [value for value in found if value is not None]
        if numbers:
            values[cell] = np.median(numbers)
    return DepthField(names, values, layers)


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return a page with a heat map of each series, with its own rows and a common depth axis and
    colour scale.
    """
    series = _select_series(series, options)
    records = [record for item in series for record in item.records]
    field = options.field or default_field(series[0].records)
    types = Types(record.layer for record in records)
    # Layers outside the blocks come first.
    depths = sorted(
        {depth_of(record.layer) for record in records},
        key=lambda depth: -1 if depth is None else depth,
    )
    grids = [cells(item.records, field, types, depths) for item in series]
    norm = norm_of(grids)
    names = crop_names(types.names, fit_chars(NAME_FRACTION * style.width, style.ticks))
    indent = max(map(len, names.values()))
    room = (1 - NAME_FRACTION) * style.width
    panels = []
    for item, grid in zip(series, grids, strict=True):
        title = item.label if len(series) > 1 else ""
        title_lines = wrap_text(title, room, style.text).count("\n") + 1
        lines = 1.75 * max(len(grid.types), 2) + 1.0 + 1.2 * title_lines + 2.6 / len(series)
        height = lines * style.text / 72
        draw = partial(draw_cells, grid=grid, norm=norm, names=names, depths=depths)
        panels.append(Panel(title, draw, height=height, indent=indent))
    xlabel = "depth (block)"
    if None in depths:
        xlabel += "; –: outside the blocks"
    panels[-1] = replace(panels[-1], xlabel=xlabel)
    title = title_in(field, records)
    if title[1:2].islower():
        title = title[0].upper() + title[1:]
    notes = []
    most = max(int(grid.layers.max(initial=0)) for grid in grids)
    if most > 1:
        notes.append(
            f"A cell is the median over the matrices of its type in the block (up to {most})."
        )
    keys = []
    if any((np.isnan(grid.values) & (grid.layers > 0)).any() for grid in grids):
        keys.append(Key(_make_hatch(0, 0), "not computed, or ΔW = 0"))
    return Page(
        f"{title}, by module type and depth",
        panels,
        f"{subject_of(series)}{count_matrices(records)}{metric_suffix(records)}",
        notes,
        keys,
        columns=1,
        low=True,
        scale=ScalarMappable(norm, SHARES),
    )


def _select_series(series: Sequence[Series[Any]], options: Options) -> tuple[Series[Any], ...]:
    """Return the series of the first kind of layer records that has the field, split by what they
    measure of a layer.

    Raises:
        UndrawableError: There are no layer records, none has the field, or the requested rank was
            not measured.
    """
    by_kind: dict[type[Any], list[Series[Any]]] = {}
    for item in series:
        kind = type(item.records[0])
        if issubclass(kind, LayerRecord) and "layer" in kind.model_fields:
            by_kind.setdefault(kind, []).append(item)
    for of_kind in by_kind.values():
        if options.field is None:
            return split_series(of_kind, options)
        records = [record for item in of_kind for record in item.records]
        if any(value_of(record, options.field) is not None for record in records):
            return split_series(of_kind, options)
    if options.field is None or not series:
        raise UndrawableError("no records", "records")
    fields = dict.fromkeys(name for item in series for name in numbers_of(item.records[:20]))
    raise UndrawableError(
        f"no record has a numeric field {options.field}; use one of {', '.join(fields)}", ""
    )


def default_field(records: Sequence[LayerRecord]) -> str:
    """Return the default field of records of a kind, judged by the first: an energy, else a main
    column, else any.
    """
    fields = numbers_of(records[:1])
    energies = [name for name in fields if re.fullmatch(r"energy\.\d+", name)]
    shown = sorted(records[0].shown, key=lambda column: not column.main)
    names = ["energy.8", *energies, *(column.path for column in shown), *fields]
    return next((name for name in names if name in fields), "fro")


def norm_of(grids: Sequence[DepthField]) -> Normalize:
    """Return the common colour scale; logarithmic if the values are positive and span a factor of
    ``_LOG_FROM``.
    """
    values = np.concatenate([grid.values.ravel() for grid in grids])
    values = values[np.isfinite(values)]
    if not len(values):
        return Normalize(0, 1)
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low >= _LOG_FROM:
        return LogNorm(low, high)
    if low == high:  # a single value: the scale starts at zero
        return Normalize(min(0.0, low), max(0.0, high) if high else 1.0)
    return Normalize(low, high)


def draw_cells(
    ax: Axes,
    style: PageStyle,
    grid: DepthField,
    norm: Normalize,
    names: dict[str, str],
    depths: Sequence[int | None],
) -> None:
    """Draw the cells, with their values if all fit, and set up the axes.

    Args:
        ax: Axes to draw on.
        style: The page.
        grid: The cells.
        norm: The colour scale.
        names: Names of the rows as shown.
        depths: Depths of the columns.
    """
    rows, columns = grid.values.shape
    # Cells have white gaps, except thin cells, which the gaps would hide.
    edges: dict[str, Any] = {"edgecolors": "white", "lw": 0.5}
    if columns > 40:
        edges = {"edgecolors": "face", "lw": 0.1}
    corners = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    ax.pcolormesh(*corners, np.ma.masked_invalid(grid.values), norm=norm, cmap=SHARES, **edges)
    for row, column in np.argwhere(np.isnan(grid.values) & (grid.layers > 0)):
        ax.add_patch(_make_hatch(column, row))
    row_names = [names[name] for name in grid.types]
    ax.set_yticks(range(rows), row_names, parse_math=False, size=style.ticks)
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    every = -(-columns // 9)
    ticks = [place for place, depth in enumerate(depths) if depth is None or depth % every == 0]
    ax.set_xticks(ticks, ["–" if depths[place] is None else str(depths[place]) for place in ticks])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    # Names and colour scale leave about two thirds of the axes' width before the layout.
    column_inches = 0.65 * ax.get_window_extent().width / ax.figure.dpi / columns
    finite = [(cell, value) for cell, value in np.ndenumerate(grid.values) if np.isfinite(value)]
    texts = {cell: format_cell(value) for cell, value in finite}
    if max(map(len, texts.values()), default=0) * 0.6 * style.ticks / 72 < column_inches:
        for (row, column), text in texts.items():
            red, green, blue, _ = SHARES(norm(grid.values[row, column]))
            color = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK
            size = 0.9 * style.ticks
            ax.text(column, row, text, size=size, color=color, ha="center", va="center")


def _make_hatch(column: float, row: float) -> Patch:
    """Return the mark of a cell without a value."""
    return Rectangle(
        (column - 0.5, row - 0.5), 1, 1, facecolor=UNKNOWN, edgecolor=QUIET, hatch="////", lw=0
    )
