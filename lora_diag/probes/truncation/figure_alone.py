"""`alone`: layers or module types with the largest cost of truncation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_diag.records import Probe, Results
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.losses import probes, sets_of
from lora_diag.rendering.figures.ranked import Row, draw_rows, figure_of, highest, run_keys
from lora_diag.rendering.figures.series import Options, Series, subject_of
from lora_diag.rendering.figures.sheet import FigureText
from lora_diag.rendering.figures.style import PageStyle, category, name_of
from lora_diag.rendering.losses import gap_half

# Maximum number of rows of a panel.
ROWS = 24


def find_obstacle(records: Sequence[Probe], options: Options) -> str | None:
    """Return why nothing can be drawn; None if it can."""
    known = _list_ranks(records)
    if not known:
        return "no layer or module type was truncated alone (--granularity layer or type)"
    if options.rank in {None, *known}:
        return None
    return f"rank {options.rank} was not measured; use one of {', '.join(map(str, known))}"


def alone(results: Results[Any] | Iterable[Probe], ax: Axes | None = None, *, name: str | None = None) -> Axes:
    """Draw the loss minus TUNED's with one layer or module type truncated, with the interval of Student's t.

    Args:
        results: Results of ``probe truncation --granularity layer`` or ``type``, or their records.
        ax: Axes to draw on; default those of a new figure.
        name: Name of the evaluation set; default the first.

    Returns:
        The Axes drawn on: at the smallest rank measured, the costliest first.
    """
    records = probes(results, "truncation")
    sets = sets_of(records)
    chosen = name if name is not None else next(iter(sets))
    rank = _smallest_rank(records)
    rows = highest(_make_rows([record for record in records if record.set == chosen], rank, 0), ROWS)
    with panel_axes(ax) as (axes, style):
        draw_rows(axes, rows, style)
        axes.set_xlabel("loss minus TUNED's (nats)")
        axes.set_title(f"{sets[chosen]}: each part alone to r\xa0=\xa0{rank}", parse_math=False, loc="left")
    return axes


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw the layers or types with the largest cost at the smallest measured rank, one panel per set."""
    records = [record for item in series for record in item.records]
    rank = options.rank if options.rank is not None else _smallest_rank(records)
    panels = []
    for name, label in sets_of(records).items():
        rows = []
        for number, item in enumerate(series):
            rows += _make_rows([record for record in item.records if record.set == name], rank, number)
        if rows:
            panels.append((label, highest(rows, ROWS)))
    max_rows = len({_cell_name(record) for record in records if record.rank == rank and _cell_name(record)})
    notes = ["All others are as in TUNED. Error bars: two paired standard errors, more for few sequences (t)."]
    if max_rows > ROWS:
        notes.append(f"The {ROWS} with the highest cost, of {max_rows}.")
    if others := [other_rank for other_rank in _list_ranks(records) if other_rank != rank]:
        notes.append(f"Also measured, not drawn: r = {', '.join(map(str, others))}.")
    about = subject_of(series)
    text = FigureText(
        f"Cost of truncating one part alone to r\xa0=\xa0{rank}",
        f"{about}held-out loss minus that of TUNED, nats; right of the line: worse",
        (" ".join(notes),),
        run_keys(series, style),
    )
    return figure_of(panels, "loss minus TUNED's (nats)", text, style)


def _cell_name(record: Probe) -> str:
    return record.layer or record.module_type or ""


def _list_ranks(records: Iterable[Probe]) -> list[int]:
    return sorted({record.rank for record in records if _cell_name(record) and record.rank is not None})


def _smallest_rank(records: Iterable[Probe]) -> int:
    return _list_ranks(records)[0]


def _make_rows(of_set: Sequence[Probe], rank: int, number: int) -> list[Row]:
    return [
        Row(
            name_of(_cell_name(record)),
            record.gap,
            gap_half(record),
            category(number),
        )
        for record in of_set
        if _cell_name(record) and record.rank == rank and record.gap is not None
    ]
