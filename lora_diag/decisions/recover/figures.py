"""`recovery`: C(r) of the files and of the update before rounding, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lora_diag.decisions.recover.record import Recovery
from lora_diag.records.names import module_type_of
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.pages import multiples_of
from lora_diag.rendering.figures.series import Options, Series
from lora_diag.rendering.figures.sheet import MAX_PANELS, FigureText, Key
from lora_diag.rendering.figures.style import CATEGORIES, QUIET, PageStyle

ESTIMATE = CATEGORIES[0]


def find_obstacle(records: Sequence[Any], options: Options) -> str | None:
    """Return why records cannot be drawn; None if they can."""
    if any(record.energy_estimate is not None for record in records):
        return None
    return "no layer was recovered: there is no estimated C(r) to draw"


def recovery(records: Iterable[Recovery], ax: Axes | None = None) -> Axes:
    """Draw C(r) of D and of the estimated X with its interval, the median over layers.

    Args:
        records: Records of ``recover``; those without an estimate are not drawn.
        ax: Where to draw; a new figure's if not given.

    Returns:
        The Axes drawn on.
    """
    with panel_axes(ax) as (axes, _):
        _draw(axes, [record for record in records if record.energy_estimate is not None])
        axes.set(xlabel="rank r", ylabel="energy fraction C(r)")
        axes.legend([key.handle for key in _make_keys()], [key.label for key in _make_keys()], fontsize="small")
    return axes


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw the figure, one panel per module type."""
    estimated = [
        record for series_item in series for record in series_item.records if record.energy_estimate is not None
    ]
    records_by_type: dict[str, list[Recovery]] = {}
    for record in estimated:
        records_by_type.setdefault(module_type_of(record.layer), []).append(record)
    shown = dict(sorted(records_by_type.items(), key=lambda item: -len(item[1]))[:MAX_PANELS])
    without_curve = sum(len(series_item.records) for series_item in series) - len(estimated)
    omitted = [
        f"{number} {name}"
        for number, name in (
            (without_curve, "layers without an estimate"),
            (len(records_by_type) - len(shown), "module types"),
        )
        if number
    ]
    text = FigureText(
        title="Energy fraction C(r) before rounding, estimated, and in the files",
        about=" · ".join(series_item.label for series_item in series if series_item.label),
        notes=(
            "Median over the layers of a type; band: median ends of the layers' intervals (about 95% under the model).",
            *([f"Not drawn: {', '.join(omitted)}."] if omitted else []),
        ),
        keys=_make_keys(),
    )
    panels = {name: (lambda ax, inches, subset=records: _draw(ax, subset)) for name, records in shown.items()}
    return multiples_of(panels, text, style, "rank r", "C(r)")


def _draw(ax: Axes, records: Sequence[Recovery]) -> None:
    limit = min(min(record.shape) for record in records)
    ranks = [int(r) for r in records[0].energy if int(r) <= limit]

    def median_over_layers(values: list[list[float]]) -> Any:
        return np.median(np.array(values), axis=0)

    file_curve = median_over_layers([[record.energy[str(r)] or 0.0 for r in ranks] for record in records])
    estimate = median_over_layers([[(record.energy_estimate or {})[str(r)] for r in ranks] for record in records])
    ends = [
        median_over_layers([[(record.energy_interval or {})[str(r)][k] for r in ranks] for record in records])
        for k in (0, 1)
    ]
    ax.fill_between(ranks, *ends, color=ESTIMATE, alpha=0.2, linewidth=0)
    ax.plot(ranks, estimate, color=ESTIMATE)
    ax.plot(ranks, file_curve, color=QUIET, linestyle="--")
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks[::2], [str(r) for r in ranks[::2]])
    ax.minorticks_off()
    ax.set_ylim(0, 1.03)


def _make_keys() -> tuple[Key, ...]:
    return (
        Key(Line2D([], [], color=ESTIMATE), "before rounding, estimated"),
        Key(Patch(facecolor=ESTIMATE, alpha=0.2), "its interval"),
        Key(Line2D([], [], color=QUIET, linestyle="--"), "the files' difference"),
    )
