"""`heatmap`: a numeric field of the records by module type and depth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
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
from lora_diag.rendering.figures.pages import Key, Page, Panel, draw_panel
from lora_diag.rendering.figures.series import Options, Series, UndrawableError, split_series
from lora_diag.rendering.figures.style import INK, QUIET, SHARES, UNKNOWN, PageStyle, crop_names, width_of, wrap_text

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
    groups: dict[tuple[int, int], list[float | None]] = {}
    for record in records:
        cell = type_names.index(types.of(record.layer)), depths.index(depth_of(record.layer))
        groups.setdefault(cell, []).append(value_of(record, field))
    values = np.full((len(type_names), len(depths)), np.nan)
    layers = np.zeros(values.shape, dtype=np.int64)
    for cell, found in groups.items():
        layers[cell] = len(found)
        if numbers := [value for value in found if value is not None]:
            values[cell] = np.median(numbers)
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
    axes = draw_panel(make_page, records, "", ax, options=Options(field=field))
    axes.figure.axes[-1].set_ylabel(title_in(field or default_field(records), records))
    return axes


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return a heat map of each series, with its own rows and a common depth axis and colour scale."""
    series = _select_series(series, options)
    records = [record for item in series for record in item.records]
    field = options.field or default_field(series[0].records)
    types = Types(record.layer for record in records)
    grids = [cells(item.records, field, types) for item in series]
    depths = _sort_depths(depth for item in grids for depth in item.depths)
    line = style.text / 72
    names = crop_names(types.names, NAME_FRACTION * style.width, style.ticks)
    width = style.width * 0.86 - max(width_of(name, style.ticks) for name in names.values()) - 2 * line
    norm = norm_of(grids)
    panels = []
    for item, grid in zip(series, grids, strict=True):
        title = item.label if len(series) > 1 else ""
        lines = 1.75 * max(len(grid.types), 2) + 1.0 + 1.2 * (wrap_text(title, width, style.text).count("\n") + 1)
        last = grid is grids[-1]
        panels.append(
            Panel(
                title,
                partial(draw_cells, grid=grid, norm=norm, names=names, depths=depths, labels=last),
                xlabel=_make_xlabel(depths) if last else "",
                height=(lines + 2.6 / len(series)) * line,
                width=width,
            )
        )
    title = title_in(field, records)
    prefix = f"{series[0].label}: " if len(series) == 1 and series[0].label else ""
    most = max(int(grid.layers.max(initial=0)) for grid in grids)
    unknown = any((np.isnan(grid.values) & (grid.layers > 0)).any() for grid in grids)
    return Page(
        f"{title[0].upper() if title[1:2].islower() else title[0]}{title[1:]}, by module type and depth",
        panels,
        f"{prefix}{count_matrices(records)}{metric_suffix(records)}",
        [f"A cell is the median over the matrices of its type in the block (up to {most})."] if most > 1 else (),
        [Key(_make_hatch(0, 0, 1), "not computed, or ΔW = 0")] if unknown else (),
        columns=1,
        low=True,
        scale=ScalarMappable(norm, SHARES),
    )


def _select_series(series: Sequence[Series[Any]], options: Options) -> tuple[Series[Any], ...]:
    """Return the series of the first kind of layer records that has the field, split by what they measure of a layer.

    Raises:
        UndrawableError: There are no layer records, or none has the field.
    """
    layered = [
        item
        for item in series
        if isinstance(item.records[0], LayerRecord) and "layer" in item.records[0].__class__.model_fields
    ]
    for kind in dict.fromkeys(type(item.records[0]) for item in layered):
        of_kind = [item for item in layered if type(item.records[0]) is kind]
        values = (value_of(record, options.field or "") for item in of_kind for record in item.records)
        if options.field is None or any(value is not None for value in values):
            return split_series(of_kind, options)
    if options.field is None or not series:
        raise UndrawableError("no records", "records")
    fields = dict.fromkeys(name for item in series for name in numbers_of(item.records[:20]))
    raise UndrawableError(f"no record has a numeric field {options.field}; use one of {', '.join(fields)}", "")


def default_field(records: Sequence[LayerRecord]) -> str:
    """Return the default field of records of a kind, judged by the first: an energy fraction, else the main value."""
    fields = numbers_of(records[:1])
    energies = [name for name in fields if re.fullmatch(r"energy\.\d+", name)]
    shown = sorted(records[0].shown, key=lambda column: not column.main)
    names = ["energy.8", *energies, *(column.path for column in shown), *fields]
    return next((name for name in names if name in fields), "fro")


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
    style: PageStyle,
    grid: Cells,
    norm: Normalize,
    names: dict[str, str],
    depths: Sequence[int | None],
    labels: bool,
) -> None:
    """Draw the cells, with their values if all fit, and set up the axes.

    Args:
        ax: Axes to draw on.
        style: The page, of the panel's width.
        grid: The cells.
        norm: The colour scale.
        names: Names of the rows as shown.
        depths: Depths of all panels.
        labels: Whether to label the depths.
    """
    columns = _place_columns(depths)
    # Cells have white gaps, except thin cells, which the gaps would hide.
    gaps = len(columns) <= 40
    edge_style: dict[str, Any] = {"edgecolors": "white" if gaps else "face", "lw": 0.5 if gaps else 0.1}
    rows = np.arange(len(grid.types) + 1) - 0.5
    for index, depth in enumerate(grid.depths):
        left, width = columns[depth]
        column = np.ma.masked_invalid(grid.values[:, index : index + 1])
        ax.pcolormesh(np.array([left, left + width]), rows, column, norm=norm, cmap=SHARES, **edge_style)
        for row in np.flatnonzero(np.isnan(grid.values[:, index]) & (grid.layers[:, index] > 0)):
            ax.add_patch(_make_hatch(left, row - 0.5, width))
    _set_axes(ax, grid, columns, names, style, labels)
    column_inches = style.width / (ax.get_xlim()[1] - ax.get_xlim()[0])
    texts = {cell: format_cell(value) for cell, value in np.ndenumerate(grid.values) if np.isfinite(value)}
    if max((width_of(text, 0.9 * style.ticks) for text in texts.values()), default=0.0) < 0.86 * column_inches:
        for cell, text in texts.items():
            red, green, blue, _ = SHARES(norm(grid.values[cell]))
            left, width = columns[grid.depths[cell[1]]]
            color = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK
            ax.text(left + width / 2, cell[0], text, size=0.9 * style.ticks, color=color, ha="center", va="center")


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
    ax: Axes,
    grid: Cells,
    columns: dict[int | None, tuple[float, float]],
    names: dict[str, str],
    style: PageStyle,
    labels: bool,
) -> None:
    ax.set_yticks(range(len(grid.types)), [names[name] for name in grid.types], parse_math=False, size=style.ticks)
    ax.set_ylim(len(grid.types) - 0.5, -0.5)
    ax.set_xlim(min(left for left, _ in columns.values()), max(left + width for left, width in columns.values()))
    blocks = [depth for depth in columns if depth is not None]
    ticks = []
    if blocks:
        ticks = [t for t in MaxNLocator(nbins=8, integer=True).tick_values(min(blocks), max(blocks)) if t in blocks]
    outside = [left + width / 2 for depth, (left, width) in columns.items() if depth is None]
    ax.set_xticks([*outside, *ticks], [*("–" for _ in outside), *(f"{t:.0f}" for t in ticks)])
    ax.tick_params(length=0, labelbottom=labels)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _make_xlabel(depths: Sequence[int | None]) -> str:
    if None not in depths:
        return "depth (block)"
    return "depth (block); –: outside the blocks" if len(depths) > 1 else "outside the blocks"
