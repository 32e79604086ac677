"""`spectrum`: singular values of an update, and the rounding noise of the files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from lora_diag.diagnostics.spectrum.curves import MARKED, Quantity, resolved_to
from lora_diag.diagnostics.spectrum.figure_multiples import small_multiples
from lora_diag.diagnostics.spectrum.figure_panel import draw_series
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.records.vocabulary import METRIC_NAMES
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.fields import changes_of
from lora_diag.rendering.figures.series import Options, Series
from lora_diag.rendering.figures.sheet import Key
from lora_diag.rendering.figures.style import INK, PageStyle, log_label

# Decades below the largest value that are shown: float32 has no more than seven.
DECADES = 7


def _singular_values(record: Spectrum) -> NDArray[np.float64]:
    return np.array(record.s)


SIGMA = Quantity(_singular_values, beyond=0.0)


def spectrum(
    records: Iterable[Spectrum], ax: Axes | None = None, *, ranks: Sequence[int] = MARKED, per: str = "layer"
) -> Axes:
    """Draw the singular values σ_i of ΔW over i, log–log, one line per layer, all in one panel.

    Values above the layer's noise edge are coloured by depth; values below it, which rounding of the files can explain,
    are grey. The dashed line is the median edge. Zeros are not drawn. Experts are joined as in ``energy``.

    Args:
        records: Records of ``spectrum``.
        ax: Axes to draw on; default those of a new figure.
        ranks: Ranks to mark.
        per: ``layer``; or ``type`` for the median and the range of all records.

    Returns:
        The Axes drawn on.
    """
    records = tuple(records)
    with panel_axes(ax) as (axes, style):
        draw_series(axes, (Series("", records),), SIGMA, ranks, per, style)
        _scale(axes, records)
        _draw_edge(axes, records, style)
        axes.set(xlabel="index i", ylabel=f"singular value σᵢ of {changes_of(records)}")
    return axes


def figure(series: Sequence[Series[Spectrum]], style: PageStyle, options: Options) -> Figure:
    """Draw σ_i by module type, one panel each, with common axes."""
    all_records = tuple(record for item in series for record in item.records)
    return small_multiples(
        series,
        SIGMA,
        style,
        options.per,
        title=f"Singular values σᵢ of {changes_of(all_records)}, in descending order",
        xlabel="index i",
        ylabel="σᵢ",
        scale=lambda ax: _scale(ax, all_records),
        also=lambda ax, records: _draw_edge(ax, records, style),
        keys=_make_edge_key(all_records, style),
    )


def _scale(ax: Axes, records: Sequence[Spectrum]) -> None:
    ax.set_yscale("log", nonpositive="mask")
    ax.yaxis.set_major_formatter(log_label)
    ax.yaxis.set_minor_formatter("")
    low, high = _compute_limits(records)
    ax.set_ylim(low, high)


def _compute_limits(records: Sequence[Spectrum]) -> tuple[float, float]:
    """Return the range of the y axis: all resolved values, and the noise edge if it is near."""
    resolved = [value for record in records for value in record.s[: resolved_to(record)] if value > 0]
    values = resolved or [value for record in records for value in record.s if value > 0] or [1.0]
    low, high = min(values), max(values)
    near = [edge for edge in _list_edges(records) if edge > low / 3]
    low = min(low, float(np.median(near)) / 2 if near else low)
    return max(low / 2, high * 10.0**-DECADES), high * 1.6


def _list_edges(records: Sequence[Spectrum]) -> list[float]:
    return [record.resolution.edge for record in records if record.fro > 0 and record.resolution.edge > 0]


def _draw_edge(ax: Axes, records: Sequence[Spectrum], style: PageStyle | None) -> None:
    """Mark the edge of the files' rounding noise for the median layer."""
    if edges := _list_edges(records):
        ax.axhline(float(np.median(edges)), zorder=1.8, label="_edge", **_make_edge_line(style))


def _make_edge_key(records: Sequence[Spectrum], style: PageStyle) -> tuple[Key, ...]:
    edges = _list_edges(records)
    if not edges:
        return ()
    below = " (all below the axis)" if max(edges) < _compute_limits(records)[0] else ""
    return (Key(Line2D([], [], **_make_edge_line(style)), f"noise edge of the files' rounding{below}"),)


def _make_edge_line(style: PageStyle | None) -> dict[str, Any]:
    return {"color": INK, "lw": 0.8 * (style.line if style else 1.2), "ls": (0, (5, 2))}


def no_update_reason(records: Sequence[Spectrum], options: Options) -> str | None:
    """Return why energy cannot be drawn: every update is zero."""
    return None if any(record.fro for record in records) else "ΔW = 0 in every matrix"


def mixed_units_reason(records: Sequence[Spectrum], options: Options) -> str | None:
    """Return why σ cannot be drawn on one axis: different metrics have different units; or every update is zero."""
    metrics = dict.fromkeys(record.metric for record in records)
    if len(metrics) > 1:
        named = " and ".join(METRIC_NAMES[metric] for metric in metrics)
        return f"singular values in {named} have no common axis; draw them separately"
    return no_update_reason(records, options)
