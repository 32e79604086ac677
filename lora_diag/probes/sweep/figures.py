"""`sweep`: held-out loss of LoRA trained at each rank, with seeds, learning rates and verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from lora_diag.probes.sweep.verdict import LINES, Swept, list_swept
from lora_diag.rendering.figures import panels
from lora_diag.rendering.figures.pages import Key, Page, Panel, key, run_keys
from lora_diag.rendering.figures.series import Options, Series, UndrawableError, subject_of
from lora_diag.rendering.figures.style import FLOOR, INK, QUIET, PageStyle, category


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return a panel per set; several sweeps differ by colour.

    Raises:
        UndrawableError: No run of a LoRA is finished with a loss.
    """
    records = [record for item in series for record in item.records]
    if not any(record.subject == "lora" and record.loss is not None for record in records):
        raise UndrawableError("no run of the sweep is finished with a loss")
    single, width = len(series) == 1, style.line
    settings = [item.run.settings if item.run is not None else {} for item in series]
    by_set = []
    for item, run_settings in zip(series, settings, strict=True):
        by_set.append({swept.set: swept for swept in list_swept(item.records, run_settings)})
    color, xlabel, about = QUIET, "rank r", subject_of(series)
    mean_keys, tolerance_keys = [], []
    if single:
        color = category(0)
        xlabel += ", with its learning rate"
        mean_keys = [key("mean over seeds", color=color, lw=1.6 * width)]
        area = Patch(facecolor=FLOOR, alpha=0.5)
        tolerance_keys = [Key(area, "within tolerance of the best")]
        if "steps" in settings[0]:
            about += f"{settings[0]['steps']} steps, "
    sets = panels.sets_of(records)
    drawn = []
    for name, label in sets.items():
        curves = {number: found[name] for number, found in enumerate(by_set) if name in found}
        title = _make_title(label, curves[0]) if single else label
        draw = partial(_draw, curves=curves, single=single)
        drawn.append(Panel(title, draw, xlabel, "loss (nats)", name=name))
    ring = {"ls": "", "marker": "o", "ms": 7 * width, "mfc": "none", "mew": 1.3 * width}
    keys = [
        *run_keys(series, lw=1.6 * width),
        *mean_keys,
        key("one seed", color=color, ls="", marker="o", ms=2.6 * width, alpha=0.6),
        key("smallest rank shown to be enough", color=color, **ring),
        *tolerance_keys,
    ]
    first_set = next(iter(sets.values()))
    notes = [
        f"The learning rate of each rank is the best of the grid on the first set, {first_set}.",
        "With fewer steps than you will train, small ranks may look better than they are.",
    ]
    if diverged := sum(record.loss is None for record in records):
        notes.insert(1, f"Not drawn: {diverged} losses of runs that diverged.")
    title = "Loss of LoRA trained at each rank, at the rank's own learning rate"
    about += "mean negative log-likelihood of held-out predictions"
    return Page(title, drawn, about, notes, keys)


def _draw(ax: Axes, style: PageStyle, curves: Mapping[int, Swept], single: bool) -> None:
    """Draw means, seeds, sufficient rank and lines of each sweep, by its number; of a ``single``
    one the tolerance.
    """
    losses = [loss for curve in curves.values() for row in curve.rows for loss in row.losses]
    if not losses:
        return
    levels: dict[tuple[str, float], str] = {}
    for number, curve in curves.items():
        if curve.rows:
            _draw_curve(ax, style, curve, category(number), single)
        if curve.base is not None:
            levels["BASE", curve.base.nats] = INK
    bases = [loss for _, loss in levels]
    for number, curve in curves.items():
        for subject, line in curve.lines.items():
            levels[LINES[subject], line.mean] = QUIET if single else category(number)
    others = [loss for word, loss in levels if word != "BASE" and loss <= max([*losses, *bases])]
    ax.set_ylim(panels.axis_limits([*losses, *others], max(bases, default=None)))
    drawn = [(f"{word} {loss:.3f}", loss, color) for (word, loss), color in levels.items()]
    panels.draw_levels(ax, drawn, style)
    rates = {}
    if single:
        rates = {row.rank: f"\n{row.lr:g}" for row in curves[0].rows}
    ranks = [row.rank or 0 for curve in curves.values() for row in curve.rows]
    panels.set_measured_rank_axis(ax, ranks, style, lambda rank: f"{rank}{rates.get(rank, '')}")
    panels.set_loss_axis(ax)


def _draw_curve(ax: Axes, style: PageStyle, curve: Swept, color: str, tolerance: bool) -> None:
    """Draw means, seeds and the sufficient rank of a sweep, and its ``tolerance`` above the best
    mean.
    """
    width, verdict = style.line, curve.verdict
    by_rank = {row.rank or 0: row for row in curve.rows}
    means = [row.mean for row in curve.rows]
    if tolerance and verdict.tolerance > 0:
        grey: dict[str, Any] = {"color": FLOOR, "alpha": 0.35, "lw": 0, "zorder": 1}
        ax.axhspan(min(means), min(means) + verdict.tolerance, label="_tolerance", **grey)
    seeds = [(rank, loss) for rank, row in by_rank.items() for loss in row.losses]
    panels.draw_seeds(ax, seeds, style, color, "_seeds")
    ax.plot([*by_rank], means, color=color, lw=1.6 * width, zorder=2.5, label="_mean")
    if verdict.rank is not None:
        ring: dict[str, Any] = {"ls": "", "marker": "o", "ms": 8 * width, "mew": 1.5 * width}
        mean = by_rank[verdict.rank].mean
        ax.plot([verdict.rank], [mean], mfc="none", mec=color, zorder=3, label="_enough", **ring)


def _make_title(label: str, curve: Swept) -> str:
    """Return the label of a set with the verdict of the sweep."""
    verdict = curve.verdict
    if verdict.best is None:
        return label
    if verdict.rank is not None:
        return f"{label}: r\xa0=\xa0{verdict.rank} is enough, {verdict.outcome}"
    best = verdict.best if verdict.answer is None else verdict.answer
    return f"{label}: {verdict.outcome}, best r\xa0=\xa0{best}"
