"""`recovery`: C(r) of the files and of the update before rounding, the median over the layers of
each module type.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lora_diag.decisions.recover.record import Recovery
from lora_diag.records.names import module_type_of
from lora_diag.rendering.figures.pages import MAX_PANELS, Page, Panel
from lora_diag.rendering.figures.series import Options, Series, UndrawableError
from lora_diag.rendering.figures.style import CATEGORIES, QUIET, PageStyle

ESTIMATE = CATEGORIES[0]


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return a page with a panel per module type, of those with most layers if there are too many.

    Raises:
        UndrawableError: No layer was recovered.
    """
    records = [record for item in series for record in item.records]
    recovered = [record for record in records if record.energy_estimate is not None]
    by_type: dict[str, list[Recovery]] = {}
    for record in recovered:
        by_type.setdefault(module_type_of(record.layer), []).append(record)
    if not by_type:
        raise UndrawableError("no layer was recovered: there is no estimated C(r) to draw")
    shown = sorted(by_type.items(), key=lambda item: -len(item[1]))[:MAX_PANELS]
    notes = [
        "Median over the layers of a type; band: median ends of the layers' intervals (about 95% "
        "under the model)."
    ]
    omitted = []
    if len(recovered) < len(records):
        omitted.append(f"{len(records) - len(recovered)} layers without an estimate")
    if len(shown) < len(by_type):
        omitted.append(f"{len(by_type) - len(shown)} module types")
    if omitted:
        notes.append(f"Not drawn: {', '.join(omitted)}.")
    return Page(
        "Energy fraction C(r) before rounding, estimated, and in the files",
        [Panel(name, partial(_draw, records=of_type), "rank r", "C(r)") for name, of_type in shown],
        " · ".join(item.label for item in series if item.label),
        notes,
        share=True,
        whole=Panel("", partial(_draw, records=recovered), "rank r", "energy fraction C(r)"),
    )


def _draw(ax: Axes, style: PageStyle, records: Sequence[Recovery]) -> None:
    limit = min(min(record.shape) for record in records)
    ranks = [int(r) for r in records[0].energy if int(r) <= limit]
    estimates = [[(record.energy_estimate or {})[str(r)] for r in ranks] for record in records]
    intervals = np.median(
        [[(record.energy_interval or {})[str(r)] for r in ranks] for record in records], axis=0
    )
    in_files = [[record.energy[str(r)] or 0.0 for r in ranks] for record in records]
    ax.plot(ranks, np.median(estimates, axis=0), color=ESTIMATE, label="before rounding, estimated")
    ax.fill_between(
        ranks, *intervals.T, color=ESTIMATE, alpha=0.2, linewidth=0, label="its interval"
    )
    ax.plot(
        ranks,
        np.median(in_files, axis=0),
        color=QUIET,
        linestyle="--",
        label="the files' difference",
    )
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks[::2], [str(r) for r in ranks[::2]])
    ax.minorticks_off()
    ax.set_ylim(0, 1.03)
