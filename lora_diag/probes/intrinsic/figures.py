"""`intrinsic`: fraction of full fine-tuning's gain by number of trained parameters, with LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from lora_diag.probes.intrinsic.record import Intrinsic
from lora_diag.probes.intrinsic.show import Line, find_reached, lines
from lora_diag.records import Results
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.pages import page_of
from lora_diag.rendering.figures.panels import GROUND, levels, limits, loss_axis, sets_of
from lora_diag.rendering.figures.series import Options, Series, subject_of
from lora_diag.rendering.figures.sheet import FigureText, Key
from lora_diag.rendering.figures.style import CATEGORIES, INK, QUIET, PageStyle, category, log_label

# Colours of the lines.
SUBSPACE, LORA = CATEGORIES[0], CATEGORIES[1]
# Fraction that defines the dimension if the run does not record it: the command's default.
SHARE = 0.9


def find_obstacle(records: Sequence[Intrinsic], options: Options) -> str | None:
    """Return why nothing can be drawn; None if it can."""
    if any(line.subject != "full" for name in sets_of(records) for line in _select_lines(records, name)):
        return None
    return "no set has a gain of full fine-tuning and a finished subspace or LoRA"


def intrinsic(results: Results[Any] | Iterable[Intrinsic], ax: Axes | None = None, *, name: str | None = None) -> Axes:
    """Draw the fraction of full fine-tuning's gain over the number of trained parameters, each size at its best rate.

    Args:
        results: Results of ``probe intrinsic``, or their records.
        ax: Axes to draw on; default those of a new figure.
        name: Name of the evaluation set; default the first on which full fine-tuning gains.

    Returns:
        The Axes drawn on: subspaces as a line over d, LoRAs over their parameters with their ranks.
    """
    all_records = results.whole if isinstance(results, Results) else results
    records = [record for record in all_records if isinstance(record, Intrinsic)]
    share = results.run.settings.get("share", SHARE) if isinstance(results, Results) else SHARE
    sets = sets_of(records)
    chosen = (
        name
        if name is not None
        else next((set_name for set_name in sets if _select_lines(records, set_name)), next(iter(sets)))
    )
    rows = _select_lines(records, chosen)
    with panel_axes(ax) as (axes, style):
        _draw(axes, [rows], share, style)
        axes.set(xlabel="trained parameters", ylabel="fraction of the full gain")
        axes.set_title(_make_title(sets[chosen], [rows], share), parse_math=False, loc="left")
    return axes


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw a panel for each set with a gain of full fine-tuning and a subspace or LoRA; runs differ by colour."""
    labels = sets_of(record for item in series for record in item.records)
    runs_by_set = {name: [_select_lines(item.records, name) for item in series] for name in labels}
    sets = [name for name, runs in runs_by_set.items() if any(line.subject != "full" for run in runs for line in run)]
    share = float(series[0].run.settings.get("share", SHARE)) if series[0].run else SHARE
    omitted = [labels[name] for name in labels if name not in sets]
    panels = [
        (
            _make_title(labels[name], runs_by_set[name], share),
            lambda ax, inches, runs=runs_by_set[name]: _draw(ax, runs, share, style),
        )
        for name in sets
    ]
    text = _make_text(series, share, omitted, style)
    return page_of(panels, text, style, xlabel="trained parameters", ylabel="fraction of the full gain")


def _select_lines(records: Sequence[Intrinsic], name: str) -> list[Line]:
    """Return the runs of every size, at the rate chosen on the first set; none where full fine-tuning has no gain."""
    seed = min((record.seed for record in records if record.subject != "base"), default=0)
    return [line for line in lines(records, name, records[0].set, seed) if line.shares] if records else []


def _draw(ax: Axes, runs: Sequence[Sequence[Line]], share: float, style: PageStyle | None) -> None:
    width, size = (style.line, style.ticks) if style else (1.2, 9.0)
    ax.set_xscale("log")
    drawn_values = [0.0, 1.0]
    for number, rows in enumerate(runs):
        for subject, marker_color, mark in (("subspace", SUBSPACE, "o"), ("lora", LORA, "D")):
            of_subject = [line for line in rows if line.subject == subject]
            if not of_subject:
                continue
            color = marker_color if len(runs) == 1 else category(number)
            dots = [(line.params, value) for line in of_subject for value in line.shares]
            drawn_values += [value for _, value in dots]
            small: dict[str, Any] = {"ls": "", "marker": mark, "ms": 2.6 * width, "mew": 0, "alpha": 0.55}
            ax.plot(*zip(*dots, strict=True), color=color, label="_seeds", **small)
            line_style: dict[str, Any] = {"ls": "-" if subject == "subspace" else (0, (1, 1.5)), "lw": 1.5 * width}
            sizes = [line.params for line in of_subject]
            ax.plot(
                sizes,
                [line.share for line in of_subject],
                color=color,
                marker=mark,
                ms=4 * width,
                label=f"_{subject}",
                **line_style,
            )
            for line in of_subject if subject == "lora" and len(runs) == 1 else []:
                ax.annotate(
                    f"r\xa0=\xa0{line.size}",
                    (line.params, line.share),
                    xytext=(0.45 * size, -0.45 * size),
                    textcoords="offset points",
                    size=size,
                    color=color,
                    va="top",
                    bbox=GROUND,
                )
    ax.set_ylim(limits(drawn_values))
    levels(ax, [("full fine-tuning", 1.0, INK)], style)
    ax.axhline(share, color=QUIET, lw=0.8 * width, ls=(0, (4, 2)), zorder=1.5, label="_share")
    ax.annotate(
        f"{share:.0%}",
        (0, share),
        xycoords=("axes fraction", "data"),
        xytext=(2, -1.5),
        textcoords="offset points",
        va="top",
        size=size,
        color=QUIET,
    )
    params = [line.params for rows in runs for line in rows]
    ax.set_xlim(min(params) / 1.8, max(params) * 1.3)
    loss_axis(ax)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.xaxis.set_major_locator(LogLocator(numticks=8))
    ax.xaxis.set_major_formatter(log_label)
    ax.xaxis.set_minor_formatter(NullFormatter())


def _make_title(label: str, runs: Sequence[Sequence[Line]], share: float) -> str:
    """Return the label of a set, for one run with the smallest sufficient sizes, else the largest ones."""
    if len(runs) > 1:
        return label
    lines = []
    for subject, word in (("subspace", "d"), ("lora", "LoRA r")):
        answer = find_reached(runs[0], subject, share)  # type: ignore[arg-type]
        if answer.line is not None:
            lines.append(f"{word}\xa0=\xa0{_format_size(answer.line)} reaches {share:.0%}")
        elif answer.below is not None:
            lines.append(
                f"{word}\xa0=\xa0{_format_size(answer.below)} reaches {_format_below(answer.below.share, share)}"
            )
    return f"{label}: {', '.join(lines)}" if lines else label


def _format_below(fraction: float, share: float) -> str:
    """Return a fraction in percent, with one more digit if it would round to the missed threshold."""
    return f"{fraction:.0%}" if f"{fraction:.0%}" != f"{share:.0%}" else f"{fraction:.1%}"


def _format_size(line: Line) -> str:
    return f"{line.size or 0:,}".replace(",", "\u202f")


def _make_text(series: Sequence[Series[Any]], share: float, omitted: Sequence[str], style: PageStyle) -> FigureText:
    width, single = style.line, len(series) == 1
    colors = (SUBSPACE, LORA) if single else (QUIET, QUIET)
    line_style: dict[str, Any] = {"lw": 1.5 * width, "ms": 4 * width}
    keys = [
        Key(Line2D([], [], color=colors[0], marker="o", **line_style), "random subspace of d"),
        Key(Line2D([], [], color=colors[1], marker="D", ls=(0, (1, 1.5)), **line_style), "LoRA of rank r"),
        Key(Line2D([], [], color=colors[0], ls="", marker="o", ms=2.6 * width, alpha=0.6), "one seed"),
    ]
    if not single:
        keys += [Key(Line2D([], [], color=category(i), lw=1.6 * width), item.label) for i, item in enumerate(series)]
    about = subject_of(series)
    run = series[0].run
    if single and run is not None and "steps" in run.settings:
        about += f"{run.settings['steps']} steps, "
    notes = ["The dimension is for this task and number of steps; more steps can give another."]
    notes += [f"Not drawn (full fine-tuning has no gain): {', '.join(omitted)}."] if omitted else []
    return FigureText(
        f"Trained parameters that reach {share:.0%} of full fine-tuning's gain",
        f"{about}(loss of BASE − loss) / (loss of BASE − loss of full fine-tuning)",
        (" ".join(notes),),
        tuple(keys),
    )
