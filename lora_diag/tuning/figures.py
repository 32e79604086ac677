"""`tune`: held-out loss against trained parameters: all runs, the frontier, and the choice with its error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from lora_diag.records import Results
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.panels import levels, limits, loss_axis, panel_width, panels_of, sets_of
from lora_diag.rendering.figures.series import Options, Series, subject_of
from lora_diag.rendering.figures.sheet import FigureText, Key, sheet
from lora_diag.rendering.figures.style import CATEGORIES, INK, QUIET, PageStyle, apply_style, log_label, wrap_text
from lora_diag.tuning.record import Tune, TuneTrial

RUN, FRONTIER, CHOSEN = QUIET, CATEGORIES[0], CATEGORIES[1]


@dataclass(frozen=True, slots=True)
class Point:
    """One configuration at its best learning rate.

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
        """Over seeds."""
        return fmean(self.losses)


def find_obstacle(records: Sequence[TuneTrial], options: Options) -> str | None:
    """Return why there is nothing to draw; None if there is something."""
    return (
        None
        if any(record.params and record.loss is not None for record in records)
        else "no run is finished with a loss"
    )


def points_of(records: Iterable[TuneTrial], name: str) -> list[Point]:
    """Return every configuration on one set: of its learning rates, the one with the most seeds, then the lowest loss.

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
        best = max(rates.values(), key=lambda runs: (len(runs), -fmean(run.loss or 0.0 for run in runs)))
        points.append(Point(variant, best[0].params, tuple(run.loss for run in best if run.loss is not None)))
    return sorted(points, key=lambda point: point.params)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the configurations with a lower loss than all with as few or fewer parameters, ascending."""
    best: list[Point] = []
    for point in sorted(points, key=lambda candidate: (candidate.params, candidate.mean)):
        if not best or point.mean < best[-1].mean:
            best.append(point)
    return best


def tune(results: Results[Any] | Iterable[Any], ax: Axes | None = None, *, name: str | None = None) -> Axes:
    """Draw held-out loss against trained parameters.

    Args:
        results: Results of ``tune``, or its records.
        ax: Axes to draw on; default those of a new figure.
        name: Name of the evaluation set; default the deciding one, or that of the first record without a choice.

    Returns:
        The Axes drawn on.
    """
    records = list(results.whole if isinstance(results, Results) else results)
    choice = next((record for record in records if isinstance(record, Tune)), None)
    trials = [record for record in records if isinstance(record, TuneTrial)]
    set_name = name if name is not None else choice.set if choice is not None else trials[0].set
    with panel_axes(ax) as (axes, style):
        _draw(axes, trials, set_name, choice, style)
        axes.set(xlabel="trained parameters", ylabel="loss (nats)")
        axes.set_title(set_name, parse_math=False, loc="left")
    return axes


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw a panel for each set of the first run."""
    run = series[0]
    trials = [record for record in run.whole if isinstance(record, TuneTrial)]
    choice = next((record for record in run.whole if isinstance(record, Tune)), None)
    sets = sets_of(trials)
    rows, columns = panels_of(len(sets), style)
    inches = panel_width(style, columns)
    with apply_style(style):
        page, axes = sheet(style, _make_text(series, style), rows, columns, panel=1.9 * style.panel, share=False)
        for (name, title), ax in zip(sets.items(), axes, strict=False):
            _draw(ax, trials, name, choice, style)
            ax.set_title(wrap_text(title, inches, style.text), parse_math=False)
            ax.set(xlabel="trained parameters", ylabel="loss (nats)")
        for ax in axes[len(sets) :]:
            ax.remove()
    return page


def _draw(ax: Axes, trials: Sequence[TuneTrial], name: str, choice: Tune | None, style: PageStyle | None) -> None:
    """Draw all runs on one set, the frontier, the choice with its error, and the loss of BASE."""
    width = style.line if style else 1.2
    points = points_of(trials, name)
    runs = [
        (trial.params, trial.loss) for trial in trials if trial.set == name and trial.params and trial.loss is not None
    ]
    ax.set_xscale("log")
    losses = [loss for _, loss in runs]
    marker_style: dict[str, Any] = {"ls": "", "marker": "o", "ms": 2.6 * width, "mew": 0, "alpha": 0.55}
    ax.plot(*zip(*runs, strict=True), color=RUN, label="_runs", **marker_style)
    best = frontier(points)
    ax.plot(
        [point.params for point in best],
        [point.mean for point in best],
        color=FRONTIER,
        lw=1.5 * width,
        marker="o",
        ms=3.5 * width,
        label="_frontier",
    )
    chosen_point = next((point for point in points if choice is not None and point.variant == choice.variant), None)
    if chosen_point is not None:
        n = len(chosen_point.losses)
        error = stdev(chosen_point.losses) / math.sqrt(n) if n > 1 else 0.0
        ax.errorbar(
            [chosen_point.params],
            [chosen_point.mean],
            yerr=[2 * error],
            color=CHOSEN,
            marker="D",
            ms=5 * width,
            lw=1.5 * width,
            capsize=3 * width,
            zorder=3,
            label="_chosen",
        )
    base_loss = next((trial.loss for trial in trials if trial.variant == "base" and trial.set == name), None)
    labelled = [] if base_loss is None else [(f"BASE {base_loss:.3f}", base_loss, INK)]
    drawn_losses = [*losses, *(loss for _, loss, _ in labelled)]
    ax.set_ylim(limits(drawn_losses))
    params = [point.params for point in points]
    ax.set_xlim(min(params) / 1.8, max(params) * 1.8)  # before labels are placed: one configuration spans no range
    levels(ax, labelled, style)
    loss_axis(ax)
    ax.xaxis.set_major_locator(LogLocator(numticks=8))
    ax.xaxis.set_major_formatter(log_label)
    ax.xaxis.set_minor_formatter(NullFormatter())


def _make_text(series: Sequence[Series[Any]], style: PageStyle) -> FigureText:
    width = style.line
    keys = (
        Key(Line2D([], [], color=RUN, ls="", marker="o", ms=2.6 * width, alpha=0.6), "one run"),
        Key(Line2D([], [], color=FRONTIER, marker="o", ms=3.5 * width, lw=1.5 * width), "frontier, mean over seeds"),
        Key(Line2D([], [], color=CHOSEN, ls="", marker="D", ms=5 * width), "chosen, ± 2 standard errors"),
    )
    notes = ["The frontier has each configuration at the learning rate that was trained with the most seeds."]
    if len(series) > 1:
        notes.append("Only the first run is drawn.")
    about = f"{subject_of(series)}mean negative log-likelihood of held-out predictions"
    return FigureText("Held-out loss against trained parameters", about, (" ".join(notes),), keys)
