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
    runs = [
        [record for record in item.whole if isinstance(record, Curvature | LossBound)]
        for item in series
    ]
    records = [record for run in runs for record in run]
    curvatures = [record for record in records if isinstance(record, Curvature)]
    sets = list(dict.fromkeys(record.set for record in records if isinstance(record, LossBound)))
    bounded = all(record.matrix == "hessian" for record in curvatures)
    eigen = any(record.layer is not None and record.eigenvalues for record in curvatures)
    columns = pages.choose_columns(min(len(sets) + (eigen or not sets), 2), style)
    panels = []
    for name in sets:
        bounds = [_select_bounds(run, name) for run in runs]
        draw = partial(_draw_gaps, runs=bounds)
        panels.append(
            pages.Panel(name_of(name), draw, "rank r of the update", "loss gap (nats)", name=name)
        )
    if eigen or not sets:
        rows = _make_rows(runs, eigen)
        distinct = len({row.name for row in rows})
        title = (
            "largest eigenvalue" if eigen else "trace ± 2 standard errors, more for few vectors (t)"
        )
        title += f", the {pages.ROWS} highest of {distinct}" if distinct > pages.ROWS else ""
        xlabel = f"{'λ' if eigen else 'trace'} (nats per squared weight)"
        last = pages.make_rows_panel(title, rows, style, xlabel=xlabel, columns=columns)
        panels.append(replace(last, height=max(last.height, 1.9 * style.panel)))
    matrix = "Hessian" if curvatures[0].matrix == "hessian" else "Gauss–Newton matrix"
    about, at = subject_of(series), curvatures[0].at.upper()
    if not sets:
        title = f"Curvature of the loss at {at}: the {matrix} of each layer"
        about += "mean negative log-likelihood of the evaluation set"
        keys = pages.run_keys(series, ls="", marker="o", ms=4 * style.line)
        return pages.Page(title, panels, about, keys=keys, columns=columns)
    width = style.line
    colors = (MEASURED, MODEL, BOUND) if len(series) == 1 else (QUIET,) * 3
    keys = [
        pages.key(
            name if bounded or quantity != "bound" else NO_BOUND,
            color=color,
            lw=1.4 * width,
            ms=3 * width,
            **line,
        )
        for (quantity, name, line), color in zip(STYLES, colors, strict=True)
    ]
    term = (
        "⟨∇L, E⟩ + (λ/2)‖E‖², with E = ΔW_r − ΔW of all layers and λ the largest joint "
        "eigenvalue at TUNED"
    )
    truncations = [record for name in sets for record in _select_bounds(records, name)]
    hidden = sum(record.gap <= 0 or record.predicted <= 0 for record in truncations)
    return pages.Page(
        f"Loss gap of a truncated update: measured, modelled with the {matrix} at "
        f"{at}{', and its bound' * bounded}",
        panels,
        f"{about}loss of the truncated update minus that of TUNED",
        [
            f"Bound: {term}; it holds if the curvature between the two points does not exceed λ."
            if bounded
            else f"λ term: {term}, of the Gauss–Newton matrix, which omits part of the Hessian: "
            "not a bound.",
            "Error bars: two standard errors (t) for other text of this kind; a bar that would "
            "reach zero ends at a tenth of the gap.",
            f"Not drawn on the logarithmic axis: values at or below zero, at {hidden} ranks."
            if hidden
            else "",
        ],
        [*keys, *pages.run_keys(series, lw=1.6 * width)],
        columns=columns,
    )


def _select_bounds(records: Iterable[Curvature | LossBound], name: str) -> list[LossBound]:
    """Return the truncations of a set at the farthest measured point, by rank."""
    of_set = [record for record in records if isinstance(record, LossBound) and record.set == name]
    along = max((record.along for record in of_set), default=1.0)
    return sorted(
        (record for record in of_set if record.along == along), key=lambda record: record.rank
    )


def _draw_gaps(ax: Axes, style: PageStyle, runs: Sequence[Sequence[LossBound]]) -> None:
    """Draw the measured, modelled and bounding gaps of each run over the rank."""
    ax.set_yscale("log")
    drawn_values = []
    for number, records in enumerate(runs):
        ranks = [record.rank for record in records]
        for (quantity, _, line_style), color in zip(STYLES, (MEASURED, MODEL, BOUND), strict=True):
            gaps = [
                r.linear + r.upper if quantity == "bound" else getattr(r, quantity) for r in records
            ]
            values = np.array(
                [gap if gap > 0 else np.nan for gap in gaps]
            )  # a logarithmic axis omits the others
            drawn_values += values[np.isfinite(values)].tolist()
            line: dict[str, Any] = {
                "color": color if len(runs) == 1 else category(number),
                "ms": 3 * style.line,
            }
            line |= {"label": f"_{quantity}", **line_style}
            if quantity == "gap":
                half = np.array([record.gap_half or 0.0 for record in records])
                # A bar that reaches zero has no end on a logarithmic axis: it stops at a tenth of
                # the gap.
                bars = [np.fmin(half, 0.9 * values), half]
                ax.errorbar(
                    ranks,
                    values,
                    yerr=bars,
                    lw=1.6 * style.line,
                    elinewidth=style.line,
                    zorder=2.5,
                    **line,
                )
            else:
                ax.plot(
                    ranks,
                    values,
                    lw=1.3 * style.line,
                    zorder=3 if quantity == "predicted" else 2,
                    **line,
                )
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
            if not isinstance(record, Curvature) or (eigen and not record.eigenvalues):
                continue
            name = "all layers" if record.layer is None else name_of(record.layer)
            value, error = (
                (record.eigenvalues[0], record.residual)
                if eigen
                else (record.trace, record.trace_half)
            )
            rows.append(pages.Row(name, value, error, category(number)))
    return rows
