"""`intrinsic`: fraction of full fine-tuning's gain by number of trained parameters, with LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from lora_diag.probes.intrinsic.record import Intrinsic
from lora_diag.probes.intrinsic.show import SizeLine, select_lines
from lora_diag.rendering.figures import panels
from lora_diag.rendering.figures.pages import Page, Panel, key, run_keys
from lora_diag.rendering.figures.series import Options, Series, UndrawableError, subject_of
from lora_diag.rendering.figures.style import CATEGORIES, DOTTED, INK, QUIET, PageStyle, category

# Colours of the lines.
SUBSPACE, LORA = CATEGORIES[0], CATEGORIES[1]
# Fraction that defines the dimension if the run does not record it: the command's default.
SHARE = 0.9


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return a panel for each set with a gain of full fine-tuning and a subspace or LoRA; runs
    differ by colour.

    Raises:
        UndrawableError: There is no such set.
    """
    labels = panels.sets_of(record for item in series for record in item.records)
    single, width, run = len(series) == 1, style.line, series[0].run
    settings = run.settings if run is not None else {}
    share = float(settings.get("share", SHARE))
    xlabel, ylabel = "trained parameters", "fraction of the full gain"
    drawn = []
    omitted = []
    for name, label in labels.items():
        runs = [_select_lines(item.records, name) for item in series]
        if any(line.subject != "full" for rows in runs for line in rows):
            draw = partial(_draw, runs=runs, share=share)
            drawn.append(Panel(label, draw, xlabel, ylabel, name=name))
        else:
            omitted.append(label)
    if not drawn:
        raise UndrawableError(
            "no set has a gain of full fine-tuning and a finished subspace or LoRA"
        )
    notes = ["The dimension is for this task and number of steps; more steps can give another."]
    if omitted:
        notes.append(f"Not drawn (full fine-tuning has no gain): {', '.join(omitted)}.")
    about = subject_of(series)
    if single and "steps" in settings:
        about += f"{settings['steps']} steps, "
    about += "(loss of BASE − loss) / (loss of BASE − loss of full fine-tuning)"
    subspace, lora = (SUBSPACE, LORA) if single else (QUIET, QUIET)
    line: dict[str, Any] = {"lw": 1.5 * width, "ms": 4 * width}
    keys = [
        key("random subspace of d", color=subspace, marker="o", **line),
        key("LoRA of rank r", color=lora, marker="D", ls=DOTTED, **line),
        key("one seed", color=subspace, ls="", marker="o", ms=2.6 * width, alpha=0.6),
        *run_keys(series, lw=1.6 * width),
    ]
    title = f"Trained parameters that reach {share:.0%} of full fine-tuning's gain"
    return Page(title, drawn, about, notes, keys)


def _select_lines(records: Sequence[Intrinsic], name: str) -> list[SizeLine]:
    """Return the runs of every size at its best rate on a set; none where full fine-tuning has no
    gain.
    """
    if not records:
        return []
    seed = min((record.seed for record in records if record.subject != "base"), default=0)
    return [line for line in select_lines(records, name, records[0].set, seed) if line.shares]


def _draw(ax: Axes, style: PageStyle, runs: Sequence[Sequence[SizeLine]], share: float) -> None:
    """Draw the fraction of the gain of each size over its parameters, and the fraction to reach."""
    size = style.ticks
    drawn_values = [0.0, 1.0]
    subjects = (("subspace", SUBSPACE, "o", "-"), ("lora", LORA, "D", DOTTED))
    for number, rows in enumerate(runs):
        for subject, subject_color, mark, dashes in subjects:
            of_subject = [line for line in rows if line.subject == subject]
            if not of_subject:
                continue
            color = subject_color if len(runs) == 1 else category(number)
            dots = [(line.params, value) for line in of_subject for value in line.shares]
            drawn_values += [value for _, value in dots]
            panels.draw_seeds(ax, dots, style, color, "_seeds", mark)
            params = [line.params for line in of_subject]
            means = [line.share for line in of_subject]
            drawing: dict[str, Any] = {"lw": 1.5 * style.line, "ms": 4 * style.line, "ls": dashes}
            ax.plot(params, means, marker=mark, color=color, label=f"_{subject}", **drawing)
            if subject != "lora" or len(runs) > 1:
                continue
            for line in of_subject:
                ax.annotate(
                    f"r\xa0=\xa0{line.size}",
                    (line.params, line.share),
                    xytext=(0.45 * size, -0.45 * size),
                    textcoords="offset points",
                    size=size,
                    color=color,
                    va="top",
                )
    # A diverged run is below the axis.
    ax.set_ylim(panels.axis_limits(max(value, -0.5) for value in drawn_values))
    panels.set_params_axis(ax, [line.params for rows in runs for line in rows], above=1.3)
    panels.draw_levels(ax, [("full", 1.0, INK), (f"{share:.0%}", share, QUIET)], style)
    panels.set_loss_axis(ax)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
