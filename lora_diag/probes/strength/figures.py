"""`strength`: gain on the task against loss on other texts by t; `parts`: loss without one part of the update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lora_diag.metrics.statistics import paired_half
from lora_diag.probes.strength.record import Strength
from lora_diag.rendering.figures.pages import Page, Panel, Row, make_rows_page, run_keys
from lora_diag.rendering.figures.panels import set_loss_axis, sets_of
from lora_diag.rendering.figures.series import Options, Series, UndrawableError, subject_of
from lora_diag.rendering.figures.style import DASHED, INK, PageStyle, category, name_of


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return a panel per pair of a task and another text; without other texts, the gain over t per task.

    Raises:
        UndrawableError: The whole update was measured at fewer than three strengths.
    """
    runs = [[r for r in item.records if isinstance(r, Strength) and r.part is None] for item in series]
    if not any(len({record.scale for record in records}) > 2 for records in runs):
        raise UndrawableError("the whole update was measured at fewer than three strengths (--by all)")
    records = [record for of_run in runs for record in of_run]
    labels, shifted = sets_of(records), {record.set for record in records if record.shifted}
    tasks, others = ([name for name in labels if (name in shifted) == side] for side in (False, True))
    pairs = [(task, other) for task in tasks for other in others] or [(task, "") for task in tasks]
    panels = [
        Panel(
            labels[task] + (f" against {labels[other]}" if other else ""),
            partial(_draw, runs=runs, task=task, other=other),
            f"loss on {name_of(other)} minus BASE's (nats)" if other else "strength t of the update",
            f"gain on {name_of(task)} (nats)",
            name=task,
        )
        for task, other in pairs
    ]
    about = "gain: loss of BASE minus that at t, per prediction; numbers at the points are t"
    bars = "Error bars: two paired standard errors, more for few sequences (t)."
    best = "Higher is better on the task, left is better on the other text." if others else ""
    title = "Gain on the task against loss on other texts" if others else "Gain by strength of the update"
    return Page(title, panels, f"{subject_of(series)}{about}", [bars, best], run_keys(series, marker="o"))


def _draw(ax: Axes, style: PageStyle, runs: Sequence[Sequence[Strength]], task: str, other: str) -> None:
    """Draw the gain on the task over the loss on the other text, or over t without one; a point per t."""
    ax.axhline(0, color=INK, lw=0.8 * style.line, ls=DASHED, zorder=1)
    if other:
        ax.axvline(0, color=INK, lw=0.8 * style.line, ls=DASHED, zorder=1)
    for number, of_run in enumerate(runs):
        costs = {record.scale: record for record in of_run if record.set == other}
        points = [
            (record, costs[record.scale] if other else None)
            for record in sorted(of_run, key=lambda record: record.scale)
            if record.set == task and (not other or record.scale in costs)
        ]
        if not points:
            continue
        x = [record.scale if cost is None else cost.change for record, cost in points]
        y = [-record.change for record, _ in points]
        bars: dict[str, Any] = {"yerr": [_half(record) for record, _ in points]}
        if other:
            bars["xerr"] = [_half(cost) for _, cost in points if cost is not None]
        line: dict[str, Any] = {"color": category(number), "lw": 1.2 * style.line, "elinewidth": 0.9 * style.line}
        ax.errorbar(x, y, **bars, **line, marker="o", ms=3.2 * style.line, zorder=2.5, label="_strength")
        for (record, _), place in zip(points, zip(x, y, strict=True), strict=True) if other else ():
            offset = (4 * style.line, -7 * style.line)
            ax.annotate(f"{record.scale:g}", place, offset, textcoords="offset points", size=style.ticks, color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    ax.margins(0.1)
    set_loss_axis(ax)


def _half(record: Strength) -> float:
    """Return half the length of the error bar of the difference from BASE."""
    return paired_half(record.change_error, len(record.nll)) or 0.0


def make_parts_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the loss minus TUNED's with each part at its smallest strength, one panel per set.

    Raises:
        UndrawableError: No part was varied alone.
    """
    records = [r for item in series for r in item.records if isinstance(r, Strength) and r.part is not None]
    if not records:
        raise UndrawableError("no part of the update was varied alone (--by block or type)")
    scale = min(record.scale for record in records)

    def rows_of(item: Series[Any], name: str, color: str) -> list[Row]:
        return [
            Row(name_of(record.part or ""), record.gap, paired_half(record.gap_error, len(record.nll)), color)
            for record in item.records
            if isinstance(record, Strength) and record.part and (record.set, record.scale) == (name, scale)
        ]

    return make_rows_page(
        series,
        rows_of,
        sets_of(records),
        style,
        title=f"Loss with one part of the update at t = {scale:g}",
        about=f"{subject_of(series)}held-out loss minus that of TUNED, nats; left of the line: better than TUNED",
        xlabel="loss minus TUNED's (nats)",
        notes=["All other parts are as in TUNED. Error bars: two paired standard errors, more for few sequences (t)."],
    )
