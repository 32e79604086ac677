"""`strength`: gain on the task against loss on other texts by t."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lora_diag.probes.strength.record import Strength
from lora_diag.probes.strength.show import half_of
from lora_diag.rendering.figures.pages import Page, Panel, run_keys
from lora_diag.rendering.figures.panels import set_loss_axis, sets_of
from lora_diag.rendering.figures.series import Options, Series, UndrawableError, subject_of
from lora_diag.rendering.figures.style import DASHED, INK, PageStyle, category, name_of


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return a panel per pair of a task and another text; without other texts, the gain over t per
    task.

    Raises:
        UndrawableError: The whole update was measured at fewer than three strengths.
    """
    runs = [
        [r for r in item.records if isinstance(r, Strength) and r.part is None] for item in series
    ]
    records = [record for of_run in runs for record in of_run]
    if len({record.scale for record in records}) < 3:
        raise UndrawableError(
            "the whole update was measured at fewer than three strengths (--by all)"
        )
    labels, shifted = sets_of(records), {record.set for record in records if record.shifted}
    others = [name for name in labels if name in shifted] or [""]
    panels = [
        Panel(
            labels[task] + (f" against {labels[other]}" if other else ""),
            partial(_draw, runs=runs, task=task, other=other),
            f"loss on {name_of(other)} minus BASE's (nats)"
            if other
            else "strength t of the update",
            f"gain on {name_of(task)} (nats)",
            name=task,
        )
        for task in labels
        if task not in shifted
        for other in others
    ]
    about = f"{subject_of(series)}gain: loss of BASE minus that at t; t = 0 is BASE, 1 is TUNED"
    notes = ["Error bars: paired intervals, of 95% for all t together (t, Bonferroni)."]
    notes += (
        ["Numbers at the points are t, of the first run. Higher and further left is better."]
        if shifted
        else []
    )
    return Page(
        "Gain by strength of the update", panels, about, notes, run_keys(series, marker="o")
    )


def _draw(
    ax: Axes, style: PageStyle, runs: Sequence[Sequence[Strength]], task: str, other: str
) -> None:
    """Draw the gain on the task over the loss on the other text, or over t without one; a point per
    t.
    """
    ax.axhline(0, color=INK, lw=0.8 * style.line, ls=DASHED, zorder=1)
    for number, of_run in enumerate(runs):
        costs = {
            r.scale: (r.change, _half(r, of_run)) if other else (r.scale, 0.0)
            for r in of_run
            if r.set == (other or task)
        }
        points = sorted(
            (r for r in of_run if r.set == task and r.scale in costs),
            key=lambda record: record.scale,
        )
        x, widths = zip(*(costs[record.scale] for record in points), strict=True)
        y, heights = zip(
            *((-record.change, _half(record, of_run)) for record in points), strict=True
        )
        line: dict[str, Any] = {
            "color": category(number),
            "lw": 1.2 * style.line,
            "elinewidth": 0.9 * style.line,
        }
        ax.errorbar(
            x, y, heights, widths, **line, marker="o", ms=3.2 * style.line, label="_strength"
        )
        for record, *place in zip(points, x, y, strict=True) if other and not number else ():
            offset, size = (4 * style.line, -7 * style.line), style.ticks
            ax.annotate(
                f"{record.scale:g}",
                (place[0], place[1]),
                offset,
                textcoords="offset points",
                size=size,
            )
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    ax.margins(0.1)
    set_loss_axis(ax)


def _half(record: Strength, of_run: Sequence[Strength]) -> float:
    """Return half the length of the error bar of the difference from BASE."""
    of_set = [each for each in of_run if each.set == record.set]
    return half_of(record.change_error, of_set) or 0.0
