"""`heatmap`: a numeric field of the records by module type and depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lora_diag.records import LayerRecord
from lora_diag.records.names import depth_of
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.fields import Types, format_cell, metric_suffix, numbers_of, title_in, value_of
from lora_diag.rendering.figures.series import Options, Series
from lora_diag.rendering.figures.sheet import FigureText, Key, sheet
from lora_diag.rendering.figures.style import (
    INK,
    QUIET,
    SHARES,
    UNKNOWN,
    PageStyle,
    crop_names,
    log_label,
    width_of,
    wrap_text,
)

# Ratio of the largest to the smallest value from which the colour scale is logarithmic.
_LOG_FROM = 50
# Fraction of the page's width available to row labels.
NAME_FRACTION = 0.38


@dataclass(frozen=True, slots=True)
class Cells:
    """A field by module type and depth.

    Args:
        types: Module types of the rows, from the top.
        depths: Block indices of the columns; None first, if there are layers outside the blocks.
        values: ``(types, depths)``; NaN if the value is null or the layer does not exist.
        layers: Number of layers, ``(types, depths)``; a value is the median of the layers that have one.
    """

    types: tuple[str, ...]
    depths: tuple[int | None, ...]
    values: NDArray[np.float64]
    layers: NDArray[np.int64]


def cells(records: Sequence[LayerRecord], field: str, types: Types | None = None) -> Cells:
    """Return the cells of a heat map.

    Args:
        records: One record per layer.
        field: Dotted name of the field.
        types: Module types of all layers, if ``records`` are a subset.
    """
    types = types or Types(record.layer for record in records)
    present = {types.of(record.layer) for record in records}
    type_names = tuple(name for name in types.names if name in present)
    depths = _sort_depths(depth_of(record.layer) for record in records)
    by_cell: dict[tuple[str, int | None], list[float]] = {}
    layers = np.zeros((len(type_names), len(depths)), dtype=np.int64)
    row_of, column_of = {name: i for i, name in enumerate(type_names)}, {d: i for i, d in enumerate(depths)}
    for record in records:
        cell = types.of(record.layer), depth_of(record.layer)
        layers[row_of[cell[0]], column_of[cell[1]]] += 1
        if (value := value_of(record, field)) is not None:
            by_cell.setdefault(cell, []).append(value)
    values = np.full(layers.shape, np.nan)
    for (name, depth), field_values in by_cell.items():
        values[row_of[name], column_of[depth]] = np.median(field_values)
    return Cells(type_names, depths, values, layers)


def _sort_depths(depths: Iterable[int | None]) -> tuple[int | None, ...]:
    return tuple(sorted(set(depths), key=lambda depth: -1 if depth is None else depth))


def heatmap(records: Iterable[LayerRecord], ax: Axes | None = None, *, field: str | None = None) -> Axes:
    """Draw a field by module type and depth; several matrices of a type in a block (experts) give their median.

    Args:
        records: Records of one diagnostic, one per layer.
        ax: Axes to draw on; default those of a new figure.
        field: Dotted name of a numeric field, such as ``energy.16``; default by the kind of record.

    Returns:
        The Axes drawn on; ``ax.collections`` are the coloured cells.

    Example:
        >>> import lora_diag
        >>> results = lora_diag.spectrum("sample_checkpoints/base", "sample_checkpoints/full_ft", layers="mlp")
        >>> [label.get_text() for label in heatmap(results, field="fro").get_yticklabels()]
        ['mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj']
    """
    records = tuple(records)
    field = field or default_field(records)
    with panel_axes(ax) as (axes, style):
        grid = cells(records, field)
        norm = norm_of([grid])
        draw_cells(axes, grid, norm, style)
        bar = axes.figure.colorbar(ScalarMappable(norm, SHARES), ax=axes)
        bar.set_label(title_in(field, records), parse_math=False)
        _finish_bar(bar, norm)
        axes.set_xlabel(_make_xlabel(grid.depths))
    return axes


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw a heat map of each series, with its own rows and a common depth axis and colour scale."""
    field = options.field or default_field(series[0].records)
    types = Types(record.layer for item in series for record in item.records)
    grids = [cells(item.records, field, types) for item in series]
    depths = _sort_depths(depth for item in grids for depth in item.depths)
    line_height = style.text / 72
    short_names = crop_names(types.names, NAME_FRACTION * style.width, style.ticks)
    inches = style.width * 0.86 - max(width_of(name, style.ticks) for name in short_names.values()) - 2 * line_height
    titles = [wrap_text(item.label, inches, style.text) if len(series) > 1 else "" for item in series]
    row_heights = [
        (1.75 * max(len(item.types), 2) + 1.0 + 1.2 * (title.count("\n") + 1)) * line_height
        for item, title in zip(grids, titles, strict=True)
    ]
    panel = (sum(row_heights) + 2.6 * line_height) / len(series)
    # The panels have different rows, so the y axis is not shared: shared tick labels would be those of the last panel.
    page, axes = sheet(
        style, _make_text(series, grids, field), len(series), 1, panel=panel, ratios=row_heights, share=False, low=True
    )
    norm = norm_of(grids)
    for grid, title, ax in zip(grids, titles, axes, strict=True):
        draw_cells(ax, grid, norm, style, inches=inches, depths=depths)
        ax.set_title(title, parse_math=False)
        ax.tick_params(labelbottom=ax is axes[-1])
    axes[-1].set_xlabel(_make_xlabel(depths))
    bar = page.colorbar(
        ScalarMappable(norm, SHARES), ax=axes, fraction=0.04, aspect=sum(row_heights) / (0.02 * style.width), pad=0.015
    )
    _finish_bar(bar, norm)
    return page


def _make_text(series: Sequence[Series[Any]], grids: Sequence[Cells], field: str) -> FigureText:
    """Return title, subtitle and notes, and the key of the cells without a value."""
    records = [record for item in series for record in item.records]
    title = title_in(field, records)
    layers = len({record.layer for item in series for record in item.records})
    prefix = f"{series[0].label}: " if len(series) == 1 and series[0].label else ""
    max_layers = max(int(item.layers.max(initial=0)) for item in grids)
    has_unknown = any((np.isnan(item.values) & (item.layers > 0)).any() for item in grids)
    return FigureText(
        f"{title[0].upper() if title[1:2].islower() else title[0]}{title[1:]}, by module type and depth",
        f"{prefix}{layers} {'matrix' if layers == 1 else 'matrices'}{metric_suffix(records)}",
        (f"A cell is the median over the matrices of its type in the block (up to {max_layers}).",)
        if max_layers > 1
        else (),
        (Key(_make_hatch(0, 0, 1), "not computed, or ΔW = 0"),) if has_unknown else (),
    )


def _finish_bar(bar: Colorbar, norm: Normalize) -> None:
    bar.outline.set_visible(False)
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_formatter(log_label)
        bar.ax.yaxis.set_minor_formatter("")


def default_field(records: Sequence[LayerRecord]) -> str:
    """Return the default field of records of a kind, judged by the first."""
    fields = numbers_of(records[:1])
    energies = [name for name in fields if re.fullmatch(r"energy\.\d+", name)]
    for name in ("energy.8", *energies[:1], "epsilon", "kappa", "intruders", "cosine", "rank"):
        if name in fields:
            return name
    return fields[0] if fields else "fro"


def norm_of(grids: Sequence[Cells]) -> Normalize:
    """Return the common colour scale; logarithmic if the values are positive and span a factor of ``_LOG_FROM``."""
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
    grid: Cells,
    norm: Normalize,
    style: PageStyle | None,
    inches: float | None = None,
    depths: Sequence[int | None] | None = None,
) -> None:
    """Draw the cells, with their values if all fit, and set up the axes.

    Args:
        ax: Axes to draw on.
        grid: The cells.
        norm: The colour scale.
        style: The page.
        inches: Width of the panel; default 3.
        depths: Depths of all panels, if ``grid`` has a subset.
    """
    font_size = style.ticks if style else 8
    columns = _place_columns(grid.depths if depths is None else depths)
    for index, depth in enumerate(grid.depths):
        left, width = columns[depth]
        column = np.ma.masked_invalid(grid.values[:, index : index + 1])
        missing = np.isnan(grid.values[:, index]) & (grid.layers[:, index] > 0)
        rows = np.arange(len(grid.types) + 1) - 0.5
        # Cells have white gaps, except thin cells, which the gaps would hide.
        has_gaps = len(columns) <= 40
        edge_style: dict[str, Any] = {"edgecolors": "white" if has_gaps else "face", "lw": 0.5 if has_gaps else 0.1}
        ax.pcolormesh(np.array([left, left + width]), rows, column, norm=norm, cmap=SHARES, **edge_style)
        for row in np.flatnonzero(missing):
            ax.add_patch(_make_hatch(left, row - 0.5, width))
    _set_axes(ax, grid, columns, style, font_size)
    column_inches = (inches or 3) / (ax.get_xlim()[1] - ax.get_xlim()[0])
    text_by_cell = {(r, c): format_cell(v) for (r, c), v in np.ndenumerate(grid.values) if np.isfinite(v)}
    if text_by_cell and max(width_of(text, 0.9 * font_size) for text in text_by_cell.values()) < 0.86 * column_inches:
        for (row, index), text in text_by_cell.items():
            color = SHARES(norm(grid.values[row, index]))
            left, width = columns[grid.depths[index]]
            ax.text(
                left + width / 2,
                row,
                text,
                size=0.9 * font_size,
                color="white" if sum(w * c for w, c in zip((0.3, 0.59, 0.11), color, strict=False)) < 0.5 else INK,
                ha="center",
                va="center",
            )


def _place_columns(depths: Sequence[int | None]) -> dict[int | None, tuple[float, float]]:
    """Return start and width of the column of each depth; layers outside the blocks are drawn separately."""
    blocks = [depth for depth in depths if depth is not None]
    if not blocks:
        return dict.fromkeys(depths, (-0.5, 1.0))
    gap = max(1.0, (max(blocks) - min(blocks) + 1) / 14)
    return {d: (min(blocks) - 0.55 - 1.05 * gap, gap) if d is None else (d - 0.5, 1.0) for d in depths}


def _make_hatch(left: float, bottom: float, width: float) -> Patch:
    return Rectangle((left, bottom), width, 1, facecolor=UNKNOWN, edgecolor=QUIET, hatch="////", lw=0)


def _set_axes(
    ax: Axes, grid: Cells, columns: dict[int | None, tuple[float, float]], style: PageStyle | None, font_size: float
) -> None:
    max_width = NAME_FRACTION * style.width if style else 2
    ax.set_yticks(
        range(len(grid.types)),
        list(crop_names(grid.types, max_width, font_size).values()),
        parse_math=False,
        size=font_size,
    )
    ax.set_ylim(len(grid.types) - 0.5, -0.5)
    ax.set_xlim(min(left for left, _ in columns.values()), max(left + width for left, width in columns.values()))
    blocks = [depth for depth in columns if depth is not None]
    ticks = []
    if blocks:
        ticks = [t for t in MaxNLocator(nbins=8, integer=True).tick_values(min(blocks), max(blocks)) if t in blocks]
    outside = [left + width / 2 for depth, (left, width) in columns.items() if depth is None]
    ax.set_xticks([*outside, *ticks], [*("–" for _ in outside), *(f"{t:.0f}" for t in ticks)])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _make_xlabel(depths: Sequence[int | None]) -> str:
    if None not in depths:
        return "depth (block)"
    return "depth (block); –: outside the blocks" if len(depths) > 1 else "outside the blocks"
