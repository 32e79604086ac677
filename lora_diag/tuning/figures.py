"""`tune`: held-out loss against trained parameters: all runs, the frontier, and the choice with its
error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes

from lora_diag.rendering.figures import panels
from lora_diag.rendering.figures.pages import Page, Panel
from lora_diag.rendering.figures.series import Options, Series, UndrawableError, subject_of
from lora_diag.rendering.figures.style import CATEGORIES, INK, QUIET, PageStyle
from lora_diag.rendering.text import quantity
from lora_diag.tuning.record import Tune, TuneTrial

RUN, FRONTIER, CHOSEN = QUIET, CATEGORIES[0], CATEGORIES[1]


@dataclass(frozen=True, slots=True)
class Point:
    """One configuration at one learning rate.

    Args:
        variant: Its name.
        params: Trainable parameters.
        losses: Losses of its seeds.
    """

    variant: str
    params: int
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean loss over seeds."""
        return fmean(self.losses)


def points_of(records: Iterable[TuneTrial], name: str) -> list[Point]:
    """Return the trained configurations with a loss on one set, by parameters, each at one of its
    learning rates.

    That is the one with the most losses; of several, the one with the lowest mean loss.

    Args:
        records: Records of a search.
        name: The set.
    """
    groups: dict[str, dict[float | None, list[TuneTrial]]] = {}
    for record in records:
        if record.set == name and record.params and record.loss is not None:
            groups.setdefault(record.variant, {}).setdefault(record.lr, []).append(record)
    points = []
    for variant, rates in groups.items():
        of_rates = [
            Point(variant, runs[0].params, tuple(run.loss for run in runs if run.loss is not None))
            for runs in rates.values()
        ]
        points.append(max(of_rates, key=lambda point: (len(point.losses), -point.mean)))
    return sorted(points, key=lambda point: point.params)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the configurations with a lower loss than all with as few or fewer parameters,
    ascending.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda candidate: (candidate.params, candidate.mean)):
        if not best or point.mean < best[-1].mean:
            best.append(point)
    return best


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the page: a panel for each set of the first run.

    Raises:
        UndrawableError: No run is finished with a loss.
    """
    trials = [record for record in series[0].whole if isinstance(record, TuneTrial)]
    choice = next((record for record in series[0].whole if isinstance(record, Tune)), None)
    if not any(trial.params and trial.loss is not None for trial in trials):
        raise UndrawableError("no run is finished with a loss")
    of_sets = []
    for name, title in panels.sets_of(trials).items():
        draw = partial(_draw, trials=trials, name=name, choice=choice)
        of_sets.append(Panel(title, draw, "trained parameters", "loss (nats)", name=name))
    return Page(
        "Held-out loss against trained parameters",
        of_sets,
        f"{subject_of(series)}mean negative log-likelihood of held-out predictions",
        [
            "The frontier has each configuration at the learning rate that was trained with the "
            "most seeds.",
            "Only the first run is drawn." if len(series) > 1 else "",
        ],
    )


def _draw(
    ax: Axes, style: PageStyle, trials: Sequence[TuneTrial], name: str, choice: Tune | None
) -> None:
    """Draw all runs on one set, the frontier, the choice with its error, and the loss of BASE."""
    width = style.line
    points = points_of(trials, name)
    runs = [
        (run.params, run.loss)
        for run in trials
        if run.set == name and run.params and run.loss is not None
    ]
    panels.set_params_axis(ax, [point.params for point in points])
    panels.draw_seeds(ax, runs, style, RUN, "one run")
    best = frontier(points)
    line: dict[str, Any] = {"lw": 1.5 * width, "marker": "o", "ms": 3.5 * width}
    ax.plot(
        [point.params for point in best],
        [point.mean for point in best],
        color=FRONTIER,
        label="frontier, mean over seeds",
        **line,
    )
    for chosen in points:
        if choice is None or chosen.variant != choice.variant:
            continue
        n = len(chosen.losses)
        error = 2 * stdev(chosen.losses) / math.sqrt(n) if n > 1 else 0.0
        diamond: dict[str, Any] = {
            "marker": "D",
            "ms": 5 * width,
            "lw": 1.5 * width,
            "capsize": 3 * width,
            "zorder": 3,
        }
        label = "chosen, ± 2 standard errors"
        ax.errorbar(chosen.params, chosen.mean, yerr=error, color=CHOSEN, label=label, **diamond)
    base = next(
        (trial.loss for trial in trials if trial.variant == "base" and trial.set == name), None
    )
    ax.set_ylim(panels.axis_limits([loss for _, loss in runs], base))
    if above := sum(loss > ax.get_ylim()[1] for _, loss in runs):
        ax.text(
            0.02,
            0.98,
            f"↑ {quantity(above, 'run')} above",
            transform=ax.transAxes,
            va="top",
            size=style.ticks,
        )
    panels.draw_levels(ax, [] if base is None else [(f"BASE {base:.3f}", base, INK)], style)
    panels.set_loss_axis(ax)
