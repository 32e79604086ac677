"""`sweep`: held-out loss of LoRA trained at each rank, with seeds, learning rates and verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from lora_diag.probes.sweep.verdict import (
    TOLERANCE,
    AtRank,
    SweepVerdict,
    best_rates,
    by_rank,
    format_confidence,
    judge,
)
from lora_diag.records import Probe
from lora_diag.records.probe import Subject
from lora_diag.rendering.figures.pages import Key, Page, Panel, key, run_keys
from lora_diag.rendering.figures.panels import (
    axis_limits,
    draw_levels,
    draw_seeds,
    set_loss_axis,
    set_measured_rank_axis,
    sets_of,
)
from lora_diag.rendering.figures.series import Options, Series, UndrawableError, subject_of
from lora_diag.rendering.figures.style import FLOOR, INK, QUIET, PageStyle, category

# Other subjects of training, and the names of their lines.
LINES: tuple[tuple[Subject, str], ...] = (("full", "full"), ("bitfit", "BitFit"))


@dataclass(frozen=True, slots=True)
class SweepCurve:
    """The result of one sweep on one set.

    Args:
        rows: The runs of each rank at its own learning rate.
        base: BASE's loss; None if not measured.
        verdict: The verdict; None without BASE's loss or a run.
        lines: Mean losses of the reference lines by name.
    """

    rows: tuple[AtRank, ...]
    base: float | None
    verdict: SweepVerdict | None
    lines: dict[str, float]

    @property
    def points(self) -> list[tuple[int, AtRank]]:
        """The rows with their ranks."""
        return [(row.rank, row) for row in self.rows if row.rank is not None]

    @property
    def losses(self) -> list[float]:
        """Losses of all runs."""
        return [loss for row in self.rows for loss in row.losses]


def make_curve(records: Sequence[Probe], name: str, tolerance: float = TOLERANCE) -> SweepCurve:
    """Return the curve of a sweep on one set, at the rates with the lowest loss of the first seed on the first set."""
    first, seed = records[0].set, min((r.seed for r in records if r.subject != "base"), default=0)
    rows = tuple(by_rank(records, name, best_rates(records, first, seed)))
    base = next((r.loss for r in records if r.subject == "base" and r.set == name), None)
    lines = {
        word: row.mean
        for subject, word in LINES
        for row in by_rank(records, name, best_rates(records, first, seed, subject), subject)
    }
    return SweepCurve(rows, base, judge(rows, base, tolerance) if rows and base is not None else None, lines)


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return a panel per set; several sweeps differ by colour."""
    records = [record for item in series for record in item.records]
    if not any(record.subject == "lora" and record.loss is not None for record in records):
        raise UndrawableError("no run of the sweep is finished with a loss")
    single, width = len(series) == 1, style.line
    sets, xlabel = sets_of(records), "rank r, with its learning rate" if single else "rank r"
    panels = []
    for name, label in sets.items():
        curves = [make_curve(item.records, name, _read_tolerance(item)) for item in series]
        title = _make_title(label, curves[0]) if single else label
        panels.append(Panel(title, partial(_draw, curves=curves), xlabel, "loss (nats)", name=name))
    color = category(0) if single else QUIET
    ring: dict[str, Any] = {"ls": "", "marker": "o", "ms": 7 * width, "mfc": "none", "mew": 1.3 * width}
    keys = [
        *run_keys(series, lw=1.6 * width),
        *([key("mean over seeds", color=color, lw=1.6 * width)] if single else []),
        key("one seed", color=color, ls="", marker="o", ms=2.6 * width, alpha=0.6),
        key("smallest rank shown to be enough", color=color, **ring),
        *([Key(Patch(facecolor=FLOOR, alpha=0.5), "within tolerance of the best")] if single else []),
    ]
    run = series[0].run
    steps = f"{run.settings['steps']} steps, " if single and run is not None and "steps" in run.settings else ""
    diverged = sum(record.loss is None for record in records)
    return Page(
        "Loss of LoRA trained at each rank, at the rank's own learning rate",
        panels,
        f"{subject_of(series)}{steps}mean negative log-likelihood of held-out predictions",
        [
            f"The learning rate of each rank is the best of the grid on the first set, {next(iter(sets.values()))}.",
            f"Not drawn: {diverged} losses of runs that diverged." if diverged else "",
            "With fewer steps than you will train, small ranks may look better than they are.",
        ],
        keys,
    )


def _read_tolerance(item: Series[Any]) -> float:
    return float(item.run.settings.get("tolerance", TOLERANCE)) if item.run else TOLERANCE


def _draw(ax: Axes, style: PageStyle, curves: Sequence[SweepCurve]) -> None:
    """Draw the curve of each sweep, with seeds, sufficient rank, and reference lines; of one, also the tolerance."""
    width = style.line
    losses = [loss for curve in curves for loss in curve.losses]
    if not losses:
        return
    for number, curve in enumerate(curves):
        if not curve.rows:
            continue
        color, means = category(number), [row.mean for row in curve.rows]
        if len(curves) == 1 and curve.verdict is not None and curve.verdict.tolerance > 0:
            grey: dict[str, Any] = {"color": FLOOR, "alpha": 0.35, "lw": 0, "zorder": 1}
            ax.axhspan(min(means), min(means) + curve.verdict.tolerance, label="_tolerance", **grey)
        draw_seeds(ax, [(rank, loss) for rank, row in curve.points for loss in row.losses], style, color, "_seeds")
        ax.plot([rank for rank, _ in curve.points], means, color=color, lw=1.6 * width, zorder=2.5, label="_mean")
        for rank, row in curve.points:
            if curve.verdict is not None and rank == curve.verdict.rank:
                ring: dict[str, Any] = {"ls": "", "marker": "o", "ms": 8 * width, "mfc": "none", "mew": 1.5 * width}
                ax.plot([rank], [row.mean], mec=color, zorder=3, label="_enough", **ring)
    bases = [curve.base for curve in curves if curve.base is not None]
    levels = {("BASE", base): INK for base in bases}
    for number, curve in enumerate(curves):
        for word, loss in curve.lines.items():
            levels[word, loss] = category(number) if len(curves) > 1 else QUIET
    others = [loss for word, loss in levels if word != "BASE" and loss <= max([*losses, *bases])]
    ax.set_ylim(axis_limits([*losses, *others], max(bases, default=None)))
    draw_levels(ax, [(f"{word} {loss:.3f}", loss, color) for (word, loss), color in levels.items()], style)
    rates = {rank: f"{row.lr:g}" for rank, row in curves[0].points} if len(curves) == 1 else {}
    ranks = [rank for curve in curves for rank, _ in curve.points]
    set_measured_rank_axis(ax, ranks, style, lambda rank: f"{rank}\n{rates[rank]}" if rank in rates else str(rank))
    set_loss_axis(ax)


def _make_title(label: str, curve: SweepCurve) -> str:
    """Return the label of a set with the verdict of the sweep."""
    verdict = curve.verdict
    if verdict is None:
        return label
    if verdict.rank is not None:
        return f"{label}: r\xa0=\xa0{verdict.rank} is enough, {verdict.outcome}"
    confidence = "" if verdict.confidence is None else f", {format_confidence(verdict.confidence)} confidence"
    endings = {
        "not resolved": f"best answer r\xa0=\xa0{verdict.answer}{confidence}",
        "no gain": "every rank is worse than BASE",
        "no verdict": f"lowest at r\xa0=\xa0{verdict.best}, no verdict",
    }
    return f"{label}: {endings.get(verdict.outcome, verdict.outcome)}"
