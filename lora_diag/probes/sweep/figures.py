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
    sets, xlabel = panels.sets_of(records), "rank r, with its learning rate" if single else "rank r"
    settings = [item.run.settings if item.run is not None else {} for item in series]
    by_set = [
        {swept.set: swept for swept in list_swept(item.records, run_settings)}
        for item, run_settings in zip(series, settings, strict=True)
    ]
    drawn = []
    for name, label in sets.items():
        curves = {number: found[name] for number, found in enumerate(by_set) if name in found}
        title = _make_title(label, curves[0]) if single else label
        draw = partial(_draw, curves=curves, single=single)
        drawn.append(Panel(title, draw, xlabel, "loss (nats)", name=name))
    color = category(0) if single else QUIET
    ring: dict[str, Any] = {
        "ls": "",
        "marker": "o",
        "ms": 7 * width,
        "mfc": "none",
        "mew": 1.3 * width,
    }
    keys = [
        *run_keys(series, lw=1.6 * width),
        *([key("mean over seeds", color=color, lw=1.6 * width)] if single else []),
        key("one seed", color=color, ls="", marker="o", ms=2.6 * width, alpha=0.6),
        key("smallest rank shown to be enough", color=color, **ring),
        *(
            [Key(Patch(facecolor=FLOOR, alpha=0.5), "within tolerance of the best")]
            if single
            else []
        ),
    ]
    steps = f"{settings[0]['steps']} steps, " if single and "steps" in settings[0] else ""
    diverged = sum(record.loss is None for record in records)
    return Page(
        "Loss of LoRA trained at each rank, at the rank's own learning rate",
        drawn,
        f"{subject_of(series)}{steps}mean negative log-likelihood of held-out predictions",
        [
            "The learning rate of each rank is the best of the grid on the first set, "
            f"{next(iter(sets.values()))}.",
            f"Not drawn: {diverged} losses of runs that diverged." if diverged else "",
            "With fewer steps than you will train, small ranks may look better than they are.",
        ],
        keys,
    )


def _draw(ax: Axes, style: PageStyle, curves: Mapping[int, Swept], single: bool) -> None:
    """Draw means, seeds, sufficient rank and lines of each sweep, by its number; of a ``single``
    one the tolerance.
    """
    width = style.line
    losses = [loss for curve in curves.values() for row in curve.rows for loss in row.losses]
    if not losses:
        return
    for number, curve in curves.items():
        if not curve.rows:
            continue
        color, means = category(number), [row.mean for row in curve.rows]
        if single and curve.verdict.tolerance > 0:
            grey: dict[str, Any] = {"color": FLOOR, "alpha": 0.35, "lw": 0, "zorder": 1}
            ax.axhspan(min(means), min(means) + curve.verdict.tolerance, label="_tolerance", **grey)
        by_rank = {row.rank or 0: row for row in curve.rows}
        seeds = [(rank, loss) for rank, row in by_rank.items() for loss in row.losses]
        panels.draw_seeds(ax, seeds, style, color, "_seeds")
        ax.plot([*by_rank], means, color=color, lw=1.6 * width, zorder=2.5, label="_mean")
        if curve.verdict.rank is not None:
            ring: dict[str, Any] = {
                "ls": "",
                "marker": "o",
                "ms": 8 * width,
                "mfc": "none",
                "mew": 1.5 * width,
            }
            mean = by_rank[curve.verdict.rank].mean
            ax.plot([curve.verdict.rank], [mean], mec=color, zorder=3, label="_enough", **ring)
    bases = [curve.base.nats for curve in curves.values() if curve.base is not None]
    levels = {("BASE", base): INK for base in bases}
    for number, curve in curves.items():
        for subject, line in curve.lines.items():
            levels[LINES[subject], line.mean] = QUIET if single else category(number)
    others = [loss for word, loss in levels if word != "BASE" and loss <= max([*losses, *bases])]
    ax.set_ylim(panels.axis_limits([*losses, *others], max(bases, default=None)))
    panels.draw_levels(
        ax, [(f"{word} {loss:.3f}", loss, color) for (word, loss), color in levels.items()], style
    )
    rates = {row.rank: f"{row.lr:g}" for row in curves[0].rows} if single else {}
    ranks = [row.rank or 0 for curve in curves.values() for row in curve.rows]
    panels.set_measured_rank_axis(
        ax, ranks, style, lambda rank: f"{rank}\n{rates[rank]}" if rank in rates else str(rank)
    )
    panels.set_loss_axis(ax)


def _make_title(label: str, curve: Swept) -> str:
    """Return the label of a set with the verdict of the sweep."""
    verdict = curve.verdict
    if verdict.best is None:
        return label
    if verdict.rank is not None:
        return f"{label}: r\xa0=\xa0{verdict.rank} is enough, {verdict.outcome}"
    best = verdict.best if verdict.answer is None else verdict.answer
    return f"{label}: {verdict.outcome}, best r\xa0=\xa0{best}"
