"""`curvature`: loss gaps of truncations, their second-order model and upper bound; eigenvalues or traces of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_diag.probes.curvature.record import Curvature, LossBound
from lora_diag.records import Results
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.pages import NAMES, Row, draw_rows, highest, run_keys
from lora_diag.rendering.figures.panels import measured_axis, panel_width
from lora_diag.rendering.figures.series import Options, Series, subject_of
from lora_diag.rendering.figures.sheet import FigureText, Key, sheet
from lora_diag.rendering.figures.style import (
    CATEGORIES,
    INK,
    QUIET,
    PageStyle,
    category,
    crop_names,
    log_label,
    name_of,
    wrap_text,
)

# Colours of the lines.
MEASURED, MODEL, BOUND = CATEGORIES[0], CATEGORIES[1], QUIET
# Quantities, names and styles of the lines.
STYLES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("gap", "measured", {"marker": "o"}),
    ("predicted", "linear + quadratic model", {"ls": (0, (4, 2)), "marker": "s"}),
    ("bound", "upper bound", {"ls": (0, (1, 1.5))}),
)
# Name of the last line if λ is of the Gauss–Newton matrix, which omits part of the Hessian and so gives no bound.
NO_BOUND = "λ term, no bound"
# Maximum number of rows of eigenvalues or traces.
ROWS = 24


def curvature(
    results: Results[Any] | Iterable[Curvature | LossBound], ax: Axes | None = None, *, name: str | None = None
) -> Axes:
    """Draw the gap of each truncation on a logarithmic axis: measured, predicted, and bounded from above.

    Args:
        results: Results of ``probe curvature``, or their records.
        ax: Axes to draw on; default those of a new figure.
        name: Name of the evaluation set; default the first.

    Returns:
        The Axes drawn on; a run at BASE, without truncations, shows the largest eigenvalues of the layers, or
            their traces if no eigenvalue of a layer was computed.
    """
    records = list(results.whole if isinstance(results, Results) else results)
    sets = _list_sets(records)
    with panel_axes(ax) as (axes, style):
        if sets:
            chosen = name if name is not None else sets[0]
            _draw_gaps(
                axes, [_select_bounds(records, chosen)], float(axes.get_window_extent().width) / axes.figure.dpi, style
            )
            axes.set(xlabel="rank r of the update", ylabel="loss gap (nats)")
            axes.set_title(
                _make_title(chosen, [_select_bounds(records, chosen)], _is_bound(records)),
                parse_math=False,
                loc="left",
            )
        else:
            rows, title, label = _make_rows([("", records)])
            draw_rows(axes, rows, style)
            axes.set_xlabel(label)
            axes.set_title(title, parse_math=False, loc="left")
    return axes


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw the gaps, one panel per set, and largest eigenvalues of layers if computed; without gaps, else traces."""
    runs = [(item.label, [r for r in item.whole if isinstance(r, Curvature | LossBound)]) for item in series]
    all_records = [record for _, records in runs for record in records]
    sets = _list_sets(all_records)
    eigen = any(isinstance(r, Curvature) and r.layer is not None and r.eigenvalues for r in all_records)
    rows, title, label = _make_rows(runs) if eigen or not sets else ([], "", "")
    panels = len(sets) + bool(rows)
    columns = 1 if style.columns < 3 else min(panels, 2)
    inches = panel_width(style, columns)
    if rows and (columns == 1 or panels > columns):  # align the panels of a column after the longest name
        inches *= 1 - NAMES
    short = crop_names(sorted({row.name for row in rows}), NAMES * style.width / columns, style.ticks)
    panel_height = max(1.9 * style.panel, (len(rows) + 3.5) * 1.55 * style.ticks / 72 if rows else 0)
    text = _make_text(series, all_records, bool(sets), style)
    figure, axes = sheet(style, text, -(-panels // columns), columns, panel=panel_height, share=False)
    for name, ax in zip(sets, axes, strict=False):
        bounds = [_select_bounds(records, name) for _, records in runs]
        _draw_gaps(ax, bounds, inches, style)
        ax.set_title(wrap_text(_make_title(name, bounds, _is_bound(all_records)), inches, style.text), parse_math=False)
        ax.set(xlabel="rank r of the update", ylabel="loss gap (nats)")
    if rows:
        ax = axes[len(sets)]
        draw_rows(ax, rows, style, short)
        ax.set_title(
            wrap_text(title, style.width / columns * (1 - NAMES) - style.text / 72, style.text), parse_math=False
        )
        ax.set_xlabel(label)
    for ax in axes[panels:]:
        ax.remove()
    return figure


def _list_sets(records: Iterable[Curvature | LossBound]) -> list[str]:
    return list(dict.fromkeys(record.set for record in records if isinstance(record, LossBound)))


def _is_bound(records: Iterable[Curvature | LossBound]) -> bool:
    return not any(isinstance(record, Curvature) and record.matrix == "ggn" for record in records)


def _select_bounds(records: Iterable[Curvature | LossBound], name: str) -> list[LossBound]:
    """Return the truncations of a set at the farthest measured point, by rank."""
    of_set = [record for record in records if isinstance(record, LossBound) and record.set == name]
    along = max((record.along for record in of_set), default=1.0)
    return sorted((record for record in of_set if record.along == along), key=lambda record: record.rank)


def _quantity_values(records: Sequence[LossBound], quantity: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a quantity of each truncation; NaN where it is not positive, so that the logarithmic axis omits it."""
    values = [r.linear + r.upper if quantity == "bound" else float(getattr(r, quantity)) for r in records]
    return np.array([value if value > 0 else np.nan for value in values])


def _draw_gaps(ax: Axes, runs: Sequence[Sequence[LossBound]], inches: float, style: PageStyle | None) -> None:
    width = style.line if style else 1.2
    ax.set_yscale("log")
    drawn_values = []
    for number, records in enumerate(runs):
        ranks = [record.rank for record in records]
        for (quantity, _, line_style), color in zip(STYLES, (MEASURED, MODEL, BOUND), strict=True):
            values = _quantity_values(records, quantity)
            drawn_values += values[np.isfinite(values)].tolist()
            line_options: dict[str, Any] = {
                "color": color if len(runs) == 1 else category(number),
                "ms": 3 * width,
                **line_style,
            }
            if quantity == "gap":
                half = np.array([record.gap_half or 0.0 for record in records])
                # A bar that reaches zero has no end on a logarithmic axis: it stops at a tenth of the gap.
                bars = [np.fmin(half, 0.9 * values), half]
                ax.errorbar(
                    ranks, values, yerr=bars, lw=1.6 * width, elinewidth=width, zorder=2.5, label="_gap", **line_options
                )
            else:
                ax.plot(
                    ranks,
                    values,
                    lw=1.3 * width,
                    zorder=3 if quantity == "predicted" else 2,
                    label=f"_{quantity}",
                    **line_options,
                )
    low, high = min(drawn_values, default=1.0), max(drawn_values, default=1.0)
    ax.set_ylim(low / 2.5, high * 2.5)
    ax.yaxis.set_major_formatter(log_label)
    measured_axis(ax, [record.rank for records in runs for record in records], inches, style)


def _make_title(name: str, runs: Sequence[Sequence[LossBound]], bounded: bool) -> str:
    """Return the label of a set, for one run with the ratios of model and bound to the measured gap."""
    label = name_of(name)
    positive = [record for records in runs for record in records if record.gap > 0]
    if len(runs) > 1 or not positive:
        return label
    model = [record.predicted / record.gap for record in positive]
    bound = [(record.linear + record.upper) / record.gap for record in positive]
    return (
        f"{label}: model {_format_range(model)}, {'bound' if bounded else 'λ term'} {_format_range(bound)} times "
        "the measured gap"
    )


def _format_range(ratios: Sequence[float]) -> str:
    """Return the range of the ratios, to two digits."""
    low, high = (_format_ratio(ratio) for ratio in (min(ratios), max(ratios)))
    return low if low == high else f"{low} to {high}"


def _format_ratio(ratio: float) -> str:
    rounded = float(f"{ratio:.2g}")
    return f"{rounded:,.0f}".replace(",", "\u202f") if abs(rounded) >= 10 else f"{rounded:g}"


def _make_rows(runs: Sequence[tuple[str, Sequence[Curvature | LossBound]]]) -> tuple[list[Row], str, str]:
    """Return rows of largest eigenvalues, or traces if no layer has eigenvalues; the panel's title; the axis label."""
    named = [
        (category(number), record)
        for number, (_, records) in enumerate(runs)
        for record in records
        if isinstance(record, Curvature)
    ]
    eigen = any(record.layer is not None and record.eigenvalues for _, record in named)
    rows = []
    for color, record in named:
        label = "all layers" if record.layer is None else name_of(record.layer)
        color = INK if record.layer is None and len(runs) == 1 else color
        if eigen and record.eigenvalues:
            rows.append(Row(label, record.eigenvalues[0], record.residual, color))
        elif not eigen:
            rows.append(Row(label, record.trace, record.trace_half or 0.0, color))
    distinct = len({row.name for row in rows})
    limit = f", the {ROWS} highest of {distinct}" if distinct > ROWS else ""
    title = "largest eigenvalue" if eigen else "trace ± 2 standard errors, more for few vectors (t)"
    return highest(rows, ROWS), f"{title}{limit}", f"{'λ' if eigen else 'trace'} (nats per squared weight)"


def _make_text(
    series: Sequence[Series[Any]], records: Sequence[Curvature | LossBound], truncated: bool, style: PageStyle
) -> FigureText:
    first = next(record for record in records if isinstance(record, Curvature))
    matrix = "Hessian" if first.matrix == "hessian" else "Gauss–Newton matrix"
    about = subject_of(series)
    if not truncated:
        return FigureText(
            f"Curvature of the loss at {first.at.upper()}: the {matrix} of each layer",
            f"{about}mean negative log-likelihood of the evaluation set",
            keys=run_keys(series, style),
        )
    width = style.line
    bounded = _is_bound(records)
    colors = (MEASURED, MODEL, BOUND) if len(series) == 1 else (QUIET,) * 3
    keys = [
        Key(
            Line2D([], [], color=color, lw=1.4 * width, ms=3 * width, **line_style),
            name if bounded or quantity != "bound" else NO_BOUND,
        )
        for (quantity, name, line_style), color in zip(STYLES, colors, strict=True)
    ]
    if len(series) > 1:
        keys += [Key(Line2D([], [], color=category(i), lw=1.6 * width), item.label) for i, item in enumerate(series)]
    term = "⟨∇L, E⟩ + (λ/2)‖E‖², with E = ΔW_r − ΔW of all layers and λ the largest joint eigenvalue at TUNED"
    notes = [
        f"Bound: {term}; it holds if the curvature between the two points does not exceed λ."
        if bounded
        else f"λ term: {term}, of the Gauss–Newton matrix, which omits part of the Hessian: not a bound.",
        "Error bars: two standard errors (t) for other text of this kind; a bar that would reach zero ends at a tenth "
        "of the gap.",
    ]
    truncations = [record for name in _list_sets(records) for record in _select_bounds(records, name)]
    if hidden := sum(record.gap <= 0 or record.predicted <= 0 for record in truncations):
        notes.append(f"Not drawn on the logarithmic axis: values at or below zero, at {hidden} ranks.")
    return FigureText(
        f"Loss gap of a truncated update: measured, modelled with the {matrix} at "
        f"{first.at.upper()}{', and its bound' * bounded}",
        f"{about}loss of the truncated update minus that of TUNED",
        (" ".join(notes),),
        tuple(keys),
    )
