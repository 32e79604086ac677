"""Figure of ``overlap``: fraction of the gradients in an update's subspaces over the steps, with
random baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.rendering.figures.fields import Types, count_matrices
from lora_diag.rendering.figures.pages import MAX_PANELS, Key, Page, Panel, key, run_keys
from lora_diag.rendering.figures.panels import label_ticks
from lora_diag.rendering.figures.series import Options, Series, choose_rank, subject_of
from lora_diag.rendering.figures.style import CATEGORIES, DOTTED, INK, QUIET, PageStyle, category

# The measures drawn: name, field, field of the baseline, colour, and dashes for when colours
# distinguish runs.
MEASURES = (
    ("κ", "kappa", "kappa_random", CATEGORIES[0], (0, ())),
    ("tangent", "tangent", "tangent_random", CATEGORIES[1], (0, (3, 1.2))),
)


def curve_over_steps(
    records: Sequence[Overlap], field: str, baseline_field: str
) -> tuple[list[int], NDArray[np.float64]]:
    """Return the steps at which any layer has a measure, and there its median, range and median
    baseline.

    The second is ``(4, steps)``: median, smallest and largest value over the layers, median of the
    random baseline.
    """
    by_step: dict[int, list[tuple[float, float]]] = {}
    for record in records:
        if (value := getattr(record, field)) is not None:
            by_step.setdefault(record.step, []).append((value, getattr(record, baseline_field)))
    curves = []
    for _, pairs in sorted(by_step.items()):
        values, baselines = zip(*pairs, strict=True)
        curves.append((median(values), min(values), max(values), median(baselines)))
    return sorted(by_step), np.array(curves).reshape(-1, 4).T


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the page of κ = ‖UᵀGV‖_F / ‖G‖_F and tangent overlap ‖P_T G‖_F / ‖G‖_F, one panel per
    module type.

    Of more than ``MAX_PANELS`` types, the first are drawn.
    """
    ranks = {record.rank for item in series for record in item.records}
    rank = choose_rank(ranks, options)
    shown = _select(series, lambda record: record.rank, rank)
    records = [record for item in shown for record in item.records]
    types = Types(record.layer for record in records)
    draw = partial(_draw, page_records=records)
    panels = []
    for name in types.names[:MAX_PANELS]:
        part = _select(shown, lambda record: types.of(record.layer), name)
        panels.append(Panel(name, partial(draw, series=part), "training step", "fraction of ‖G‖"))
    notes = []
    if others := ", ".join(map(str, sorted(ranks - {rank}))):
        notes.append(f"Also measured, not drawn: r = {others} (--show-rank).")
    if more := len(types.names) - len(panels):
        notes.append(f"Not drawn: {more} more module types (--layers).")
    return Page(
        f"Overlap of gradients with the update's rank-{rank} subspaces: κ and tangent",
        panels,
        f"{subject_of(series)}{count_matrices(records)}; κ\xa0=\xa0‖UᵀGV‖_F\xa0/\xa0‖G‖_F, "
        "tangent\xa0=\xa0‖P_T\xa0G‖_F\xa0/\xa0‖G‖_F",
        notes,
        _make_keys(shown, style),
        share=True,
        whole=Panel(
            "", partial(draw, series=shown), "training step", f"fraction of ‖G‖_F, r = {rank}"
        ),
    )


def _select(
    series: Sequence[Series[Any]], key_of: Callable[[Overlap], object], wanted: object
) -> list[Series[Any]]:
    """Return the runs, each with only the records whose key is the wanted one."""
    selected = []
    for item in series:
        records = tuple(record for record in item.records if key_of(record) == wanted)
        selected.append(replace(item, records=records))
    return selected


def _draw(
    ax: Axes, style: PageStyle, series: Sequence[Series[Overlap]], page_records: Sequence[Overlap]
) -> None:
    """Draw the median of each measure over the layers with its baseline; of a single run also the
    range of the layers.

    Args:
        ax: Axes to draw on.
        style: The page.
        series: The records of each run, at one rank.
        page_records: Records of all panels, which share axes.
    """
    single = len(series) == 1
    width = style.line
    for number, item in enumerate(series):
        for name, field, baseline_field, measure_color, dashes in MEASURES:
            steps, (middle, low, high, random) = curve_over_steps(
                item.records, field, baseline_field
            )
            if not steps:
                continue
            color = measure_color if single else category(number)
            if single:
                ax.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
            line: dict[str, Any] = {"lw": 1.5 * width, "ls": "-" if single else dashes}
            line |= {"marker": "o", "ms": 2.6 * width}
            ax.plot(steps, middle, label=f"_{name}", color=color, **line)
            random_line: dict[str, Any] = {"lw": 0.9 * width, "ls": DOTTED}
            if len(steps) == 1:
                random_line |= {"marker": "_", "ms": 6 * width}
            ax.plot(steps, random, label=f"_random {name}", color=color, **random_line)
    highest = max(
        max(record.kappa or 0.0, record.tangent or 0.0, record.tangent_random)
        for record in page_records
    )
    ax.set_ylim(0, min(1.02, 1.08 * highest))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    ordered = sorted({record.step for record in page_records})
    margin = 0.06 * (ordered[-1] - ordered[0]) or 1
    ax.set_xlim(ordered[0] - margin, ordered[-1] + margin)
    label_ticks(ax, (ordered[0], ordered[-1], *ordered), style)


def _make_keys(series: Sequence[Series[Overlap]], style: PageStyle) -> list[Key]:
    """Return the legend entries of the runs, the measures, the range of the layers and the
    baseline.
    """
    width, single = style.line, len(series) == 1
    keys = run_keys(series, lw=2 * width)
    for name, _, _, color, dashes in MEASURES:
        line: dict[str, Any] = {"color": color} if single else {"color": INK, "ls": dashes}
        keys.append(key(f"{name}, median layer", lw=1.5 * width, **line))
    if single:
        keys.append(key("range of the layers", color=QUIET, lw=4 * width, alpha=0.4))
    return [*keys, key("random subspaces", color=QUIET, lw=1.2 * width, ls=DOTTED)]
