"""`intrinsic`: fraction of full fine-tuning's gain by number of trained parameters, with LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from lora_diag.probes.intrinsic.record import Intrinsic
from lora_diag.probes.intrinsic.show import Line, select_lines
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
    runs_by_set = {name: [_select_lines(item.records, name) for item in series] for name in labels}
    sets = [
        name
        for name, runs in runs_by_set.items()
        if any(line.subject != "full" for run in runs for line in run)
    ]
    if not sets:
        raise UndrawableError(
            "no set has a gain of full fine-tuning and a finished subspace or LoRA"
        )
    single, width, run = len(series) == 1, style.line, series[0].run
    share = float(run.settings.get("share", SHARE)) if run else SHARE
    drawn = [
        Panel(
            labels[name],
            partial(_draw, runs=runs_by_set[name], share=share),
            xlabel="trained parameters",
            ylabel="fraction of the full gain",
            name=name,
        )
        for name in sets
    ]
    subspace, lora = (SUBSPACE, LORA) if single else (QUIET, QUIET)
    line: dict[str, Any] = {"lw": 1.5 * width, "ms": 4 * width}
    steps = (
        f"{run.settings['steps']} steps, "
        if single and run is not None and "steps" in run.settings
        else ""
    )
    omitted = ", ".join(labels[name] for name in labels if name not in sets)
    return Page(
        f"Trained parameters that reach {share:.0%} of full fine-tuning's gain",
        drawn,
        f"{subject_of(series)}{steps}(loss of BASE − loss) / (loss of BASE − loss of full "
        "fine-tuning)",
        [
            "The dimension is for this task and number of steps; more steps can give another.",
            f"Not drawn (full fine-tuning has no gain): {omitted}." if omitted else "",
        ],
        [
            key("random subspace of d", color=subspace, marker="o", **line),
            key("LoRA of rank r", color=lora, marker="D", ls=DOTTED, **line),
            key("one seed", color=subspace, ls="", marker="o", ms=2.6 * width, alpha=0.6),
            *run_keys(series, lw=1.6 * width),
        ],
    )


def _select_lines(records: Sequence[Intrinsic], name: str) -> list[Line]:
    """Return the runs of every size at its best rate on a set; none where full fine-tuning has no
    gain.
    """
    seed = min((record.seed for record in records if record.subject != "base"), default=0)
    return (
        [line for line in select_lines(records, name, records[0].set, seed) if line.shares]
        if records
        else []
    )


def _draw(ax: Axes, style: PageStyle, runs: Sequence[Sequence[Line]], share: float) -> None:
    """Draw the fraction of the gain of each size over its parameters, and the fraction to reach."""
    size = style.ticks
    drawn_values = [0.0, 1.0]
    for number, rows in enumerate(runs):
        for subject, subject_color, mark, dashes in (
            ("subspace", SUBSPACE, "o", "-"),
            ("lora", LORA, "D", DOTTED),
        ):
            of_subject = [line for line in rows if line.subject == subject]
            if not of_subject:
                continue
            color = subject_color if len(runs) == 1 else category(number)
            dots = [(line.params, value) for line in of_subject for value in line.shares]
            drawn_values += [value for _, value in dots]
            panels.draw_seeds(ax, dots, style, color, "_seeds", mark)
            means = zip(*[(line.params, line.share) for line in of_subject], strict=True)
            line_style: dict[str, Any] = {
                "color": color,
                "ls": dashes,
                "lw": 1.5 * style.line,
                "ms": 4 * style.line,
            }
            ax.plot(*means, marker=mark, label=f"_{subject}", **line_style)
            for line in of_subject if subject == "lora" and len(runs) == 1 else []:
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
