"""`curvature`: loss gaps of truncations, their second-order model and upper bound; eigenvalues or
traces of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lora_diag.probes.curvature.record import Curvature, LossBound
from lora_diag.rendering.figures import pages
from lora_diag.rendering.figures.panels import set_measured_rank_axis
from lora_diag.rendering.figures.series import Options, Series, subject_of
from lora_diag.rendering.figures.style import (
    CATEGORIES,
    DASHED,
    DOTTED,
    QUIET,
    PageStyle,
    category,
    log_label,
    name_of,
)

# Colours of the lines.
MEASURED, MODEL, BOUND = CATEGORIES[0], CATEGORIES[1], QUIET
# Quantities, names and styles of the lines.
STYLES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("gap", "measured", {"marker": "o"}),
    ("predicted", "linear + quadratic model", {"ls": DASHED, "marker": "s"}),
    ("bound", "upper bound", {"ls": DOTTED}),
)
# Name of the last line if λ is of the Gauss–Newton matrix, which omits part of the Hessian and so
# gives no bound.
NO_BOUND = "λ term, no bound"


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> pages.Page:
    """Return a panel of gaps for each set, and one of the largest eigenvalues of layers; without
    both, of traces.
    """
    runs = [[r for r in item.whole if isinstance(r, Curvature | LossBound)] for item in series]
    records = [record for run in runs for record in run]
    curvatures = [record for record in records if isinstance(record, Curvature)]
    bounds = [record for record in records if isinstance(record, LossBound)]
    sets = list(dict.fromkeys(bound.set for bound in bounds))
    eigen = any(record.layer is not None and record.eigenvalues for record in curvatures)
    columns = pages.choose_columns(min(len(sets) + (eigen or not sets), 2), style)
    xlabel, ylabel = "rank r of the update", "loss gap (nats)"
    panels = []
    for name in sets:
        draw = partial(_draw_gaps, runs=[_select_bounds(run, name) for run in runs])
        panels.append(pages.Panel(name_of(name), draw, xlabel, ylabel, name=name))
    if eigen or not sets:
        panels.append(_make_layers_panel(runs, eigen, style, columns))
    matrix = "Hessian" if curvatures[0].matrix == "hessian" else "Gauss–Newton matrix"
    about, at = subject_of(series), curvatures[0].at.upper()
    if not sets:
        title = f"Curvature of the loss at {at}: the {matrix} of each layer"
        about += "mean negative log-likelihood of the evaluation set"
        keys = pages.run_keys(series, ls="", marker="o", ms=4 * style.line)
        return pages.Page(title, panels, about, keys=keys, columns=columns)
    title = f"Loss gap of a truncated update: measured, modelled with the {matrix} at {at}"
    term = (
        "⟨∇L, E⟩ + (λ/2)‖E‖², with E = ΔWᵣ − ΔW of all layers and λ the largest joint eigenvalue "
        "at TUNED"
    )
    bounded = all(record.matrix == "hessian" for record in curvatures)
    if bounded:
        title += ", and its bound"
        term_note = (
            f"Bound: {term}; it holds if the curvature between the two points does not exceed λ."
        )
    else:
        term_note = (
            f"λ term: {term}, of the Gauss–Newton matrix, which omits part of the Hessian: "
            "not a bound."
        )
    notes = [
        term_note,
        "Error bars: two standard errors (t) for other text of this kind; a bar that would reach "
        "zero ends at a tenth of the gap.",
    ]
    truncations = [bound for name in sets for bound in _select_bounds(records, name)]
    if hidden := sum(bound.gap <= 0 or bound.predicted <= 0 for bound in truncations):
        notes.append(
            f"Not drawn on the logarithmic axis: values at or below zero, at {hidden} ranks."
        )
    about += "loss of the truncated update minus that of TUNED"
    keys = _make_keys(len(series) == 1, bounded, style.line)
    keys += pages.run_keys(series, lw=1.6 * style.line)
    return pages.Page(title, panels, about, notes, keys, columns=columns)


def _make_layers_panel(
    runs: Sequence[Sequence[Curvature | LossBound]], eigen: bool, style: PageStyle, columns: int
) -> pages.Panel:
    """Return the panel of the layers' traces, or with ``eigen`` of their largest eigenvalues."""
    rows = _make_rows(runs, eigen)
    title, quantity = "trace ± 2 standard errors, more for few vectors (t)", "trace"
    if eigen:
        title, quantity = "largest eigenvalue", "λ"
    distinct = len({row.name for row in rows})
    if distinct > pages.ROWS:
        title += f", the {pages.ROWS} highest of {distinct}"
    xlabel = f"{quantity} (nats per squared weight)"
    panel = pages.make_rows_panel(title, rows, style, xlabel=xlabel, columns=columns)
    return replace(panel, height=max(panel.height, 1.9 * style.panel))


def _make_keys(single: bool, bounded: bool, width: float) -> list[pages.Key]:
    """Return the legend of the lines; in grey if several runs differ by colour."""
    keys = []
    for (quantity, name, line), color in zip(STYLES, (MEASURED, MODEL, BOUND), strict=True):
        if quantity == "bound" and not bounded:
            name = NO_BOUND
        if not single:
            color = QUIET
        keys.append(pages.key(name, color=color, lw=1.4 * width, ms=3 * width, **line))
    return keys


def _select_bounds(records: Iterable[Curvature | LossBound], name: str) -> list[LossBound]:
    """Return the truncations of a set at the farthest measured point, by rank."""
    of_set = [record for record in records if isinstance(record, LossBound) and record.set == name]
    along = max((record.along for record in of_set), default=1.0)
    farthest = [record for record in of_set if record.along == along]
    return sorted(farthest, key=lambda record: record.rank)


def _draw_gaps(ax: Axes, style: PageStyle, runs: Sequence[Sequence[LossBound]]) -> None:
    """Draw the measured, modelled and bounding gaps of each run over the rank."""
    ax.set_yscale("log")
    drawn_values = []
    for number, records in enumerate(runs):
        ranks = [record.rank for record in records]
        for (quantity, _, line_style), color in zip(STYLES, (MEASURED, MODEL, BOUND), strict=True):
            if quantity == "bound":
                gaps = np.array([record.linear + record.upper for record in records])
            else:
                gaps = np.array([getattr(record, quantity) for record in records])
            values = np.where(gaps > 0, gaps, np.nan)  # a logarithmic axis omits the others
            drawn_values += values[np.isfinite(values)].tolist()
            line: dict[str, Any] = {
                "color": color if len(runs) == 1 else category(number),
                "ms": 3 * style.line,
                "label": f"_{quantity}",
                **line_style,
            }
            if quantity != "gap":
                order = 3 if quantity == "predicted" else 2
                ax.plot(ranks, values, lw=1.3 * style.line, zorder=order, **line)
                continue
            half = np.array([record.gap_half or 0.0 for record in records])
            # A bar that reaches zero has no end on a logarithmic axis: it stops at a tenth of
            # the gap.
            line |= {"yerr": [np.fmin(half, 0.9 * values), half], "elinewidth": style.line}
            ax.errorbar(ranks, values, lw=1.6 * style.line, zorder=2.5, **line)
    ax.set_ylim(min(drawn_values, default=1.0) / 2.5, max(drawn_values, default=1.0) * 2.5)
    ax.yaxis.set_major_formatter(log_label)
    set_measured_rank_axis(ax, [record.rank for records in runs for record in records], style)


def _make_rows(runs: Sequence[Sequence[Curvature | LossBound]], eigen: bool) -> list[pages.Row]:
    """Return a row of each curvature: its trace, or with ``eigen`` its largest eigenvalue, if that
    was computed.
    """
    rows = []
    for number, records in enumerate(runs):
        for record in records:
            if not isinstance(record, Curvature):
                continue
            name = "all layers" if record.layer is None else name_of(record.layer)
            if not eigen:
                row = pages.Row(name, record.trace, record.trace_half, category(number))
                rows.append(row)
            elif record.eigenvalues:
                value, error = record.eigenvalues[0], record.residual
                rows.append(pages.Row(name, value, error, category(number)))
    return rows
