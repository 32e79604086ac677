"""`sensitivity`: held-out loss gain of each layer, block or module type adapted alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_diag.probes.sensitivity.gains import gains_of
from lora_diag.probes.sensitivity.record import Sensitivity
from lora_diag.records import Results
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.pages import Row, draw_rows, figure_of, highest, run_keys
from lora_diag.rendering.figures.panels import sets_of
from lora_diag.rendering.figures.series import Options, Series, subject_of
from lora_diag.rendering.figures.sheet import FigureText
from lora_diag.rendering.figures.style import PageStyle, category, name_of

# Maximum number of rows of a panel.
ROWS = 24


def find_obstacle(records: Sequence[Sensitivity], options: Options) -> str | None:
    """Return why nothing can be drawn; None if it can."""
    return None if _make_rows(records, _first_set(records), 0) else "no unit is finished with a gain"


def sensitivity(
    results: Results[Any] | Iterable[Sensitivity], ax: Axes | None = None, *, name: str | None = None
) -> Axes:
    """Draw BASE's loss minus that of each unit adapted alone, at its best learning rate, with its interval.

    Args:
        results: Results of ``probe sensitivity``, or their records.
        ax: Axes to draw on; default those of a new figure.
        name: Name of the evaluation set; default the first.

    Returns:
        The Axes drawn on: at the smallest trained rank, the highest gain first.
    """
    all_records = results.whole if isinstance(results, Results) else results
    records = [record for record in all_records if isinstance(record, Sensitivity)]
    chosen = name if name is not None else _first_set(records)
    rows = highest(_make_rows(records, chosen, 0), ROWS)
    with panel_axes(ax) as (axes, style):
        draw_rows(axes, rows, style)
        axes.set_xlabel("loss of BASE minus loss (nats)")
        axes.set_title(sets_of(records)[chosen], parse_math=False, loc="left")
    return axes


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw the gains, one panel per set, the highest first."""
    panels, max_rows = [], 0
    for name, label in sets_of(record for item in series for record in item.records).items():
        rows = []
        for number, item in enumerate(series):
            rows += _make_rows(item.records, name, number)
        max_rows = max(max_rows, len({row.name for row in rows}))
        panels.append((label, highest(rows, ROWS)))
    ranks = sorted({_smallest_rank(item.records) for item in series})
    notes = [
        "Error bars: two paired standard errors, more for few sequences (t). Gains of parts adapted alone do not "
        "add up to that of all."
    ]
    notes += [f"The {ROWS} highest of {max_rows}."] if max_rows > ROWS else []
    about = subject_of(series)
    text = FigureText(
        f"Gain of each part adapted alone, r\xa0=\xa0{', '.join(map(str, ranks))}",
        f"{about}loss of BASE minus loss on held-out text, nats; right of the line: better",
        (" ".join(notes),),
        run_keys(series, style),
    )
    return figure_of(panels, "loss of BASE minus loss (nats)", text, style)


def _first_set(records: Sequence[Sensitivity]) -> str:
    return records[0].set


def _smallest_rank(records: Sequence[Sensitivity]) -> int:
    return min((record.rank for record in records if record.rank is not None), default=0)


def _make_rows(records: Sequence[Sensitivity], name: str, number: int) -> list[Row]:
    seed = min((record.seed for record in records if record.unit), default=0)
    return [
        Row(name_of(gain.unit), gain.gain, gain.half, category(number))
        for gain in gains_of(records, name, _first_set(records), _smallest_rank(records), seed)
    ]
