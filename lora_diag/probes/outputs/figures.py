"""`outputs`: held-out loss of each adapter minus the full fine-tune's; `depth`: distance of hidden states by depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lora_diag.records import Probe, Results
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.pages import Draw, Row, draw_rows, figure_of, highest, page_of, run_keys
from lora_diag.rendering.figures.panels import limits, one_set, sets_of
from lora_diag.rendering.figures.series import Options, Series, owner_of, short_names, subject_of
from lora_diag.rendering.figures.sheet import FigureText, Key
from lora_diag.rendering.figures.style import CATEGORIES, INK, QUIET, PageStyle, category
from lora_diag.rendering.losses import gap_half

# Maximum number of rows of a panel.
ROWS = 24
_COLORS = {"adapter": CATEGORIES[0], "reference": CATEGORIES[2], "base": QUIET}


def find_obstacle(records: Sequence[Probe], options: Options) -> str | None:
    """Return why gaps cannot be drawn; None if they can."""
    return None if any(_select_compared(records)) else "no model was compared with a full fine-tune"


def find_depth_obstacle(records: Sequence[Probe], options: Options) -> str | None:
    """Return why depths cannot be drawn; None if they can."""
    if any(value is not None for record in _select_compared(records) for value in record.hidden or ()):
        return None
    return "no hidden states were compared"


def outputs(results: Results[Any] | Iterable[Probe], ax: Axes | None = None, *, name: str | None = None) -> Axes:
    """Draw each model's loss minus that of TUNED, with the interval of paired differences; TUNED is the line at zero.

    Args:
        results: Results of ``probe outputs``, or their records.
        ax: Axes to draw on; default those of a new figure.
        name: Name of the evaluation set; default the first.

    Returns:
        The Axes drawn on.
    """
    records, label = one_set(results, "outputs", name)
    rows = highest(_make_rows(records, _label_models(records)), ROWS)
    with panel_axes(ax) as (axes, style):
        draw_rows(axes, rows, style)
        axes.set_xlabel("loss minus TUNED's (nats)")
        axes.set_title(label, parse_math=False, loc="left")
    return axes


def depth(results: Results[Any] | Iterable[Probe], ax: Axes | None = None, *, name: str | None = None) -> Axes:
    """Draw ‖h_TUNED − h‖ / ‖h_TUNED − h_BASE‖ of the hidden states h at each depth; BASE is 1, TUNED 0.

    Args:
        results: Results of ``probe outputs``, or their records.
        ax: Axes to draw on; default those of a new figure.
        name: Name of the evaluation set; default the first.

    Returns:
        The Axes drawn on.
    """
    records, _ = one_set(results, "outputs", name)
    lines = _make_lines(records, _label_models(records))
    with panel_axes(ax) as (axes, style):
        _draw_depth(axes, lines, style)
        axes.set(xlabel="block (0: embeddings)", ylabel="distance of hidden states")
        axes.legend(*zip(*[(key.handle, key.label) for key in _make_keys(lines, style)], strict=True), fontsize="small")
    return axes


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw the gaps, one panel per set."""
    panels: list[tuple[str, list[Row]]] = []
    sets = sets_of(record for item in series for record in item.records)
    models = _label_models(record for item in series for record in item.records)
    for name, label in sets.items():
        rows: list[Row] = []
        for number, item in enumerate(series):
            color = category(number) if len(series) > 1 else None
            rows += _make_rows([r for r in item.records if r.set == name], models, color)
        panels.append((label, highest(rows, ROWS, panels[0][1] if panels else ())))
    max_rows = max(
        sum(record.set == name for item in series for record in _select_compared(item.records)) for name in sets
    )
    notes = [
        "Error bars: two paired standard errors, more for few sequences (t). A bar that crosses zero: no significant "
        "difference from TUNED."
    ]
    notes.append(f"The {ROWS} largest gaps of {max_rows}." if max_rows > ROWS else "")
    about = subject_of(series)
    text = FigureText(
        "Held-out loss of each model minus that of the full fine-tune",
        f"{about}mean negative log-likelihood, nats; left of the line: better than TUNED",
        (" ".join(filter(None, notes)),),
        run_keys(series, style),
    )
    return figure_of(panels, "loss minus TUNED's (nats)", text, style)


def depth_figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw the distances by depth, one panel per set, of as many models as there are colours."""
    sets = sets_of(record for item in series for record in item.records if not find_depth_obstacle([record], options))
    models = _label_models(record for item in series for record in item.records)
    by_set = {
        name: [
            line
            for item in series
            for line in _make_lines([r for r in item.records if r.set == name], models, owner_of(item, series))
        ]
        for name in sets
    }
    line_names = list(dict.fromkeys(name for lines in by_set.values() for name, _ in lines))
    about = subject_of(series)
    text = FigureText(
        "Distance of the hidden states from those of the full fine-tune",
        f"{about}‖h_TUNED − h‖ / ‖h_TUNED − h_BASE‖ over all tokens; BASE is 1, TUNED 0",
        (
            "Distance measures similarity, not quality; compare models by their loss."
            + (
                f" Not drawn: {len(line_names) - len(CATEGORIES)} more models."
                if len(line_names) > len(CATEGORIES)
                else ""
            ),
        ),
        _make_keys([(name, ()) for name in line_names[: len(CATEGORIES)]], style),
    )
    drawn_names = line_names[: len(CATEGORIES)]
    panels: list[tuple[str, Draw]] = []
    for name, label in sets.items():
        lines = [(model, dict(by_set[name]).get(model, ())) for model in drawn_names]
        panels.append((label, lambda ax, inches, lines=lines: _draw_depth(ax, lines, style)))
    return page_of(panels, text, style, height=1.7, xlabel="block (0: embeddings)", ylabel="distance")


def _select_compared(records: Iterable[Probe]) -> list[Probe]:
    """Return the records of adapters and references that are compared with TUNED."""
    return [record for record in records if record.subject in {"adapter", "reference"} and record.gap is not None]


def _make_rows(of_set: Sequence[Probe], labels: Mapping[tuple[str, str], str], color: str | None = None) -> list[Row]:
    compared = [record for record in of_set if record.subject != "tuned" and record.gap is not None]
    # A distant BASE would compress the axis of all others; its gap is in the table.
    others = _select_compared(compared)
    furthest = max((abs(record.gap or 0.0) for record in others), default=0.0)
    return [
        Row(
            labels[record.subject, record.name],
            record.gap or 0.0,
            gap_half(record),
            color or _COLORS.get(record.subject, INK),
        )
        for record in compared
        if record.subject != "base" or not others or abs(record.gap or 0.0) <= 4 * furthest
    ]


def _label_models(records: Iterable[Probe]) -> dict[tuple[str, str], str]:
    """Return the labels of models by subject and path."""
    models = dict.fromkeys((record.subject, record.name) for record in records)
    short = short_names(path for _, path in models if path)
    return {
        (subject, path): "BASE"
        if subject == "base"
        else short.get(path, "") + " (reference)" * (subject == "reference")
        for subject, path in models
    }


def _make_lines(
    of_set: Sequence[Probe], labels: Mapping[tuple[str, str], str], prefix: str = ""
) -> list[tuple[str, Sequence[float | None]]]:
    return [
        (f"{prefix}{labels[record.subject, record.name]}", record.hidden)
        for record in _select_compared(of_set)
        if record.hidden
    ]


def _draw_depth(ax: Axes, lines: Sequence[tuple[str, Sequence[float | None]]], style: PageStyle | None) -> None:
    width = style.line if style else 1.2
    values = [0.0, 1.0]
    for number, (name, hidden) in enumerate(lines):
        points = [(block, value) for block, value in enumerate(hidden) if value is not None]
        if points:
            line_style: dict[str, Any] = {
                "color": category(number),
                "lw": 1.5 * width,
                "marker": "o",
                "ms": 2.6 * width,
            }
            ax.plot(*zip(*points, strict=True), label=f"_{name}", **line_style)
            values += [value for _, value in points]
    ax.axhline(1, color=INK, lw=0.8 * width, ls=(0, (4, 2)), zorder=1)
    ax.set_ylim(0, limits(values)[1])
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))


def _make_keys(lines: Sequence[tuple[str, Any]], style: PageStyle | None) -> tuple[Key, ...]:
    width = style.line if style else 1.2
    return tuple(
        Key(Line2D([], [], color=category(number), lw=1.5 * width, marker="o", ms=2.6 * width), name)
        for number, (name, _) in enumerate(lines)
    )
