"""`strength`: gain on the task against loss on other texts by t."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lora_diag.probes.strength.record import Strength
from lora_diag.probes.strength.show import half_of
from lora_diag.rendering.figures.pages import Page, Panel, run_keys
from lora_diag.rendering.figures.panels import set_loss_axis, sets_of
from lora_diag.rendering.figures.series import Options, Series, UndrawableError, subject_of
from lora_diag.rendering.figures.style import DASHED, INK, PageStyle, category, name_of

# Where a label stands from its point: right and above, left and above, and so on.
_SIDES = np.array([[1, 1], [-1, 1], [1, -1], [-1, -1]])


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
        if other and not number:
            labelled = [record.scale for record in points], np.transpose([x, y])
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    ax.margins(0.1)
    set_loss_axis(ax)
    if other:
        _label_points(ax, style, *labelled)


def _label_points(
    ax: Axes, style: PageStyle, scales: Sequence[float], places: NDArray[np.float64]
) -> None:
    """Write t at the points: between the error bars, on the side farthest from the line, the other
    points and their labels.

    Args:
        ax: The axes, with their limits.
        style: The page.
        scales: t of each point.
        places: x and y of each point, ``(points, 2)``.
    """
    at = ax.transData.transform(places) * 72 / ax.figure.dpi
    taken = np.concatenate([at[:-1] + step * np.diff(at, axis=0) for step in np.linspace(0, 1, 9)])
    for scale, place, point in zip(scales, places, at, strict=True):
        size = style.ticks * np.array([0.6 * len(f"{scale:g}"), 1.0])
        centers = point + _SIDES * (size / 2 + 3 * style.line)
        others = taken[np.abs(taken - point).max(axis=1) > 1]
        gaps = np.abs((centers[:, None] - others) / size).max(axis=2).min(axis=1, initial=np.inf)
        best = int(gaps.argmax())
        taken = np.concatenate([taken, centers[best] + size * [[-0.4, 0], [0, 0], [0.4, 0]]])
        ax.annotate(
            f"{scale:g}",
            tuple(place),
            tuple(centers[best] - point),
            textcoords="offset points",
            ha="center",
            va="center",
            size=style.ticks,
            path_effects=[withStroke(linewidth=2 * style.line, foreground="white")],
        )


def _half(record: Strength, of_run: Sequence[Strength]) -> float:
    """Return half the length of the error bar of the difference from BASE."""
    of_set = [each for each in of_run if each.set == record.set]
    return half_of(record.change_error, of_set) or 0.0
