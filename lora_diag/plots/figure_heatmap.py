"""`heatmap`: any number of the records, module type against depth."""

from __future__ import annotations

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
from lora_diag.rendering.figures.fields import metric_said, numbers_of, title_in, value_of, written
from lora_diag.rendering.figures.groups import Types
from lora_diag.rendering.figures.series import Options, Series
from lora_diag.rendering.figures.sheet import Key, Words, sheet
from lora_diag.rendering.figures.style import (
    INK,
    QUIET,
    SHARES,
    UNKNOWN,
    Look,
    cropped,
    cropped_all,
    log_label,
    styled,
    width_of,
)

# From this ratio of the largest to the smallest value on, colours are logarithmic.
_LOG_FROM = 50


@dataclass(frozen=True, slots=True)
class Cells:
    """A field by module type and depth.

    Args:
        types: Of the rows, from the top.
        depths: Of the columns; None first, if there are layers outside the blocks.
        values: ``(types, depths)``; NaN where it is null or there is no such layer.
        layers: How many there are, ``(types, depths)``; the value is the median of those that have one.
    """

    types: tuple[str, ...]
    depths: tuple[int | None, ...]
    values: NDArray[np.float64]
    layers: NDArray[np.int64]


def cells(records: Sequence[LayerRecord], field: str) -> Cells:
    """Return the cells of a heat map."""
    types = Types(record.layer for record in records)
    depths = sorted({depth_of(record.layer) for record in records}, key=lambda d: -1 if d is None else d)
    found: dict[tuple[str, int | None], list[float]] = {}
    layers = np.zeros((len(types.names), len(depths)), dtype=np.int64)
    row, column = {t: i for i, t in enumerate(types.names)}, {d: i for i, d in enumerate(depths)}
    for record in records:
        where = types.of(record.layer), depth_of(record.layer)
        layers[row[where[0]], column[where[1]]] += 1
        if (value := value_of(record, field)) is not None:
            found.setdefault(where, []).append(value)
    values = np.full(layers.shape, np.nan)
    for (name, depth), numbers in found.items():
        values[row[name], column[depth]] = np.median(numbers)
    return Cells(types.names, tuple(depths), values, layers)


def heatmap(records: Iterable[LayerRecord], ax: Axes | None = None, *, field: str | None = None) -> Axes:
    """Draw a field by module type and depth; where a block has several matrices of a type (experts), their median.

    Args:
        records: Of one diagnostic, one a layer.
        ax: Where to draw; a new figure's if not given.
        field: Dotted name of a number in the records, such as ``energy.16``; by the kind of record if not given.

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
    with panel_axes(ax) as (axes, look):
        shown = cells(records, field)
        norm = norm_of([shown])
        draw_cells(axes, shown, norm, look, inches=None)
        bar = axes.figure.colorbar(ScalarMappable(norm, SHARES), ax=axes)
        bar.set_label(title_in(field, records), parse_math=False)
        _finish_bar(bar, norm)
        axes.set_xlabel(_xlabel(shown))
    return axes


def figure(series: Sequence[Series[Any]], look: Look, options: Options) -> Figure:
    """Return the heat map of each series, all on one scale of colours."""
    field = options.field or default_field(series[0].records)
    shown = [cells(one.records, field) for one in series]
    line = look.text / 72
    rows = [1.75 * line * max(len(one.types), 2) + 2.2 * line for one in shown]
    panel = (sum(rows) + 2.6 * line) / len(series)
    with styled(look):
        figure, axes = sheet(look, _words(series, shown, field), len(series), 1, panel=panel, ratios=rows, low=True)
        norm = norm_of(shown)
        names = [cropped(name, 0.3 * look.width, look.ticks) for one in shown for name in one.types]
        inches = look.width * 0.86 - max(width_of(name, look.ticks) for name in names) - 2 * line
        for one, drawn, ax in zip(series, shown, axes, strict=True):
            draw_cells(ax, drawn, norm, look, inches=inches)
            if len(series) > 1:
                ax.set_title(cropped(one.label, inches, look.text), parse_math=False)
        axes[-1].set_xlabel(_xlabel(shown[-1]))
        bar = figure.colorbar(ScalarMappable(norm, SHARES), ax=axes, fraction=0.04, aspect=25, pad=0.015)
        _finish_bar(bar, norm)
    return figure


def _words(series: Sequence[Series[Any]], shown: Sequence[Cells], field: str) -> Words:
    """Return the text around the panels."""
    records = [record for one in series for record in one.records]
    title = title_in(field, records)
    layers = len({record.layer for one in series for record in one.records})
    whose = f"{series[0].label}: " if len(series) == 1 and series[0].label else ""
    count = max(int(one.layers.max(initial=0)) for one in shown)
    unknown = any((np.isnan(one.values) & (one.layers > 0)).any() for one in shown)
    return Words(
        f"{title[0].upper() if title[1:2].islower() else title[0]}{title[1:]}, by module type and depth",
        f"{whose}{layers} {'matrix' if layers == 1 else 'matrices'}{metric_said(records)}",
        (f"Where a block has several matrices of a type (up to {count}), the cell is their median.",)
        if count > 1
        else (),
        (Key(_unknown(0, 0, 1), "null: not computed, or ΔW = 0"),) if unknown else (),
    )


def _finish_bar(bar: Colorbar, norm: Normalize) -> None:
    bar.outline.set_visible(False)
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_formatter(log_label)
        bar.ax.yaxis.set_minor_formatter("")


def default_field(records: Sequence[LayerRecord]) -> str:
    """Return the field that says most of the records of their kind."""
    fields = numbers_of(records[:1])
    energies = [name for name in fields if name.startswith("energy.")]
    for name in ("energy.8", *energies[:1], "epsilon", "kappa", "intruders", "cosine", "rank"):
        if name in fields:
            return name
    return fields[0] if fields else "fro"


def norm_of(shown: Sequence[Cells]) -> Normalize:
    """Return the scale of colours of all values: logarithmic where they span decades."""
    values = np.concatenate([one.values.ravel() for one in shown])
    values = values[np.isfinite(values)]
    if not len(values):
        return Normalize(0, 1)
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low >= _LOG_FROM:
        return LogNorm(low, high)
    if low == high:  # one colour, and a scale from nothing to it
        return Normalize(min(0.0, low), max(0.0, high) if high else 1.0)
    return Normalize(low, high)


def draw_cells(ax: Axes, shown: Cells, norm: Normalize, look: Look | None, inches: float | None) -> None:
    """Draw the cells; with their numbers where they have room."""
    size = look.ticks if look else 8
    blocks = [depth for depth in shown.depths if depth is not None]
    inside = (min(blocks), max(blocks)) if blocks else (0, 0)
    gap = max(1.0, (inside[1] - inside[0] + 1) / 14) if blocks else 0.0
    left = {depth: inside[0] - 0.55 - 1.05 * gap if depth is None else depth - 0.5 for depth in shown.depths}
    width = {depth: gap if depth is None and blocks else 1.0 for depth in shown.depths}
    for number, depth in enumerate(shown.depths):
        edges = np.array([left[depth], left[depth] + width[depth]])
        column = np.ma.masked_invalid(shown.values[:, number : number + 1])
        missing = np.isnan(shown.values[:, number]) & (shown.layers[:, number] > 0)
        rows = np.arange(len(shown.types) + 1) - 0.5
        # Cells with white between them; where they are thin, it would be all that is seen.
        wide = len(shown.depths) <= 40
        between: dict[str, Any] = {"edgecolors": "white" if wide else "face", "lw": 0.5 if wide else 0.1}
        ax.pcolormesh(edges, rows, column, norm=norm, cmap=SHARES, **between)
        for row in np.flatnonzero(missing):
            ax.add_patch(_unknown(left[depth], row - 0.5, width[depth]))
    _scale(ax, shown, left, width, look, size)
    room = (inches or 3) / (max(left[d] + width[d] for d in shown.depths) - min(left.values())) if shown.depths else 0
    texts = {(r, c): written(v) for (r, c), v in np.ndenumerate(shown.values) if np.isfinite(v)}
    if texts and max(width_of(text, 0.9 * size) for text in texts.values()) < 0.86 * room:
        for (row, number), text in texts.items():
            color = SHARES(norm(shown.values[row, number]))
            depth = shown.depths[number]
            ax.text(
                left[depth] + width[depth] / 2,
                row,
                text,
                size=0.9 * size,
                color="white" if sum(w * c for w, c in zip((0.3, 0.59, 0.11), color, strict=False)) < 0.5 else INK,
                ha="center",
                va="center",
            )


def _unknown(left: float, bottom: float, width: float) -> Patch:
    return Rectangle((left, bottom), width, 1, facecolor=UNKNOWN, edgecolor=QUIET, hatch="////", lw=0)


def _scale(
    ax: Axes,
    shown: Cells,
    left: dict[int | None, float],
    width: dict[int | None, float],
    look: Look | None,
    size: float,
) -> None:
    most = 0.3 * look.width if look else 2
    ax.set_yticks(
        range(len(shown.types)), list(cropped_all(shown.types, most, size).values()), parse_math=False, size=size
    )
    ax.set_ylim(len(shown.types) - 0.5, -0.5)
    ax.set_xlim(min(left.values()), max(left[depth] + width[depth] for depth in shown.depths))
    blocks = [depth for depth in shown.depths if depth is not None]
    ticks = []
    if blocks:
        ticks = [t for t in MaxNLocator(nbins=8, integer=True).tick_values(min(blocks), max(blocks)) if t in blocks]
    if None in left:
        ax.set_xticks([left[None] + width[None] / 2, *ticks], ["–", *(f"{t:.0f}" for t in ticks)])
    else:
        ax.set_xticks(ticks, [f"{t:.0f}" for t in ticks])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _xlabel(shown: Cells) -> str:
    if None not in shown.depths:
        return "depth (block)"
    return "depth (block); –: outside the blocks" if len(shown.depths) > 1 else "outside the blocks"
