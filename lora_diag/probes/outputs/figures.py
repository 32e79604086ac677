"""`outputs`: held-out loss of each adapter minus the full fine-tune's; `depth`: distance of hidden
states by depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lora_diag.records import Probe
from lora_diag.rendering.figures.pages import Page, Panel, Row, make_rows_page
from lora_diag.rendering.figures.panels import axis_limits, draw_levels, sets_of
from lora_diag.rendering.figures.series import (
    Options,
    Series,
    UndrawableError,
    owner_of,
    short_names,
    subject_of,
)
from lora_diag.rendering.figures.style import CATEGORIES, INK, QUIET, PageStyle, category
from lora_diag.rendering.losses import gap_half

_COLORS = {"adapter": CATEGORIES[0], "reference": CATEGORIES[2], "base": QUIET}


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the gaps of models to TUNED, one panel per set.

    Raises:
        UndrawableError: No model was compared with TUNED.
    """
    records = [record for item in series for record in item.records]
    if not _select_compared(records):
        raise UndrawableError("no model was compared with a full fine-tune")
    models = _label_models(records)

    def rows_of(item: Series[Probe], name: str, color: str) -> list[Row]:
        of_set = [record for record in item.records if record.set == name]
        return _make_rows(of_set, models, color if len(series) > 1 else None)

    return make_rows_page(
        series,
        rows_of,
        sets_of(records),
        style,
        title="Held-out loss of each model minus that of the full fine-tune",
        about=f"{subject_of(series)}mean negative log-likelihood, nats; left of the line: better "
        "than TUNED",
        xlabel="loss minus TUNED's (nats)",
        notes=[
            "Error bars: two paired standard errors, more for few sequences (t). A bar that "
            "crosses zero: no significant difference from TUNED."
        ],
        ordered=True,
    )


def make_depth_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the distances by depth, one panel per set, of as many models as there are colours.

    Raises:
        UndrawableError: No hidden states were compared.
    """
    models = _label_models(record for item in series for record in item.records)
    labels = sets_of(record for item in series for record in item.records)
    by_set: dict[str, dict[str, Sequence[float | None]]] = {name: {} for name in labels}
    for item in series:
        for record in _select_compared(item.records):
            if record.hidden and any(value is not None for value in record.hidden):
                model = f"{owner_of(item, series)}{models[record.subject, record.name]}"
                by_set[record.set][model] = record.hidden
    by_set = {name: lines for name, lines in by_set.items() if lines}
    if not by_set:
        raise UndrawableError("no hidden states were compared")
    found = dict.fromkeys(model for lines in by_set.values() for model in lines)
    colors = {model: category(number) for number, model in enumerate([*found][: len(CATEGORIES)])}
    xlabel, ylabel = "block (0: embeddings)", "distance of hidden states"
    panels = [
        Panel(
            labels[name],
            partial(_draw_depth, lines=lines, colors=colors),
            xlabel,
            ylabel,
            name=name,
        )
        for name, lines in by_set.items()
    ]
    return Page(
        "Distance of the hidden states from those of the full fine-tune",
        panels,
        f"{subject_of(series)}‖h_TUNED − h‖ / ‖h_TUNED − h_BASE‖ over all tokens; BASE is 1, TUNED "
        "0",
        [
            "Distance measures similarity, not quality; compare models by their loss.",
            f"Not drawn: {len(found) - len(colors)} more models."
            if len(found) > len(colors)
            else "",
        ],
    )


def _select_compared(records: Iterable[Probe]) -> list[Probe]:
    """Return the records of adapters and references that are compared with TUNED."""
    return [
        record
        for record in records
        if record.subject in {"adapter", "reference"} and record.gap is not None
    ]


def _make_rows(
    of_set: Sequence[Probe], labels: Mapping[tuple[str, str], str], color: str | None
) -> list[Row]:
    """Return the rows of one run on a set, without a distant BASE; in a common colour if given,
    else by subject.
    """
    # A distant BASE would compress the axis of all others; its gap is in the table.
    limit = 4 * max(
        (abs(record.gap or 0.0) for record in _select_compared(of_set)), default=math.inf
    )
    return [
        Row(labels[r.subject, r.name], r.gap, gap_half(r), color or _COLORS.get(r.subject, INK))
        for r in of_set
        if r.subject != "tuned"
        and r.gap is not None
        and (r.subject != "base" or abs(r.gap) <= limit)
    ]


def _label_models(records: Iterable[Probe]) -> dict[tuple[str, str], str]:
    """Return the labels of models by subject and path."""
    models = dict.fromkeys((record.subject, record.name) for record in records)
    short = short_names(path for _, path in models if path)
    return {
        (subject, path): "BASE"
        if subject == "base"
        else short.get(path, "") + " (reference)" * (subject == "reference")
        for subject, path in models
    }


def _draw_depth(
    ax: Axes,
    style: PageStyle,
    lines: Mapping[str, Sequence[float | None]],
    colors: Mapping[str, str],
) -> None:
    """Draw the distance of each coloured model at each depth; depths without a distance are
    skipped.
    """
    values = [1.0]
    for model, color in colors.items():
        points = [
            (block, value) for block, value in enumerate(lines.get(model, ())) if value is not None
        ]
        if points:
            line: dict[str, Any] = {"lw": 1.5 * style.line, "marker": "o", "ms": 2.6 * style.line}
            ax.plot(*zip(*points, strict=True), label=model, color=color, **line)
            values += [value for _, value in points]
    ax.set_ylim(axis_limits(values))
    draw_levels(ax, [("BASE", 1.0, INK)], style)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
