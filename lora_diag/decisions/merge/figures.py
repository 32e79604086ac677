"""`merge`: what each update keeps in the merge, layer by layer, with random updates and the mean as
references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lora_diag.decisions.merge.record import Merged, MergedLoss
from lora_diag.decisions.merge.show import name_model
from lora_diag.metrics.statistics import paired_half
from lora_diag.rendering.figures.fields import count_matrices
from lora_diag.rendering.figures.pages import MAX_PANELS, ROWS, Page, Panel, Row, make_rows_page
from lora_diag.rendering.figures.panels import (
    Slot,
    draw_bars,
    make_slots,
    median_of,
    sets_of,
    stack_panels,
)
from lora_diag.rendering.figures.series import (
    Options,
    Series,
    UndrawableError,
    owner_of,
    subject_of,
)
from lora_diag.rendering.figures.style import CATEGORIES, DOTTED, INK, QUIET, PageStyle
from lora_diag.rendering.statements import short_paths

KEPT, MEAN = CATEGORIES[:2]


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return a page with one panel per update and run, of the first ones if there are too many.

    Raises:
        UndrawableError: No update was merged.
    """
    by_update: dict[tuple[int, str], list[Merged]] = {}
    for number, item in enumerate(series):
        for record in item.records:
            by_update.setdefault((number, record.update), []).append(record)
    if not by_update:
        raise UndrawableError("no update was merged: there is nothing to draw")
    shown = dict(list(by_update.items())[:MAX_PANELS])
    runs = make_slots(list(shown.values()), options.per)
    owners = [owner_of(series[number], series) for number, _ in shown]
    names = map(str.__add__, owners, short_paths([update for _, update in shown]))
    low = min(0.0, *(record.kept for records in shown.values() for record in records))
    panels = [
        Panel(name, partial(_draw, slots=slots, low=low), "", "kept", style.panel, name=name)
        for name, slots in zip(names, runs, strict=True)
    ]
    notes = [
        "Blocks run from left to right in each module type. Weights alone do not show the loss of "
        "a merge."
    ]
    joined = max(slot.joined for slots in runs for slot in slots)
    if joined > 1:
        notes.append(f"A bar is the median of up to {joined} layers.")
    if hidden := len(by_update) - len(shown):
        notes.append(f"Not drawn: {hidden} more updates.")
    return Page(
        "Factor with which each update is in the merge, ⟨M, ΔW⟩/‖ΔW‖²",
        stack_panels(panels, runs, style),
        f"{count_matrices(next(iter(shown.values())))}; 1: the whole update, 0: none of it",
        notes,
        columns=1,
        low=True,
        share=True,
    )


def make_loss_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the losses of merges minus those of the updates alone, or of BASE, one panel per text.

    Raises:
        UndrawableError: No merge was judged.
    """
    records = [record for item in series for record in item.records]
    if not records:
        raise UndrawableError("no merge was judged by its loss")

    def rows_of(item: Series[MergedLoss], name: str, color: str) -> list[Row]:
        owner = owner_of(item, series)
        of_set = [_make_row(record, owner) for record in item.records if record.set == name]
        rows = [row for row in of_set if row is not None]
        return sorted(rows, key=lambda row: row.value)[:ROWS]

    page = make_rows_page(
        series,
        rows_of,
        sets_of(records),
        style,
        title="Held-out loss of each merge minus that of the update alone",
        about=f"{subject_of(series)}on a text of no update: minus that of BASE; mean negative "
        "log-likelihood, nats",
        xlabel="loss minus the reference (nats)",
        notes=[
            "Error bars: two paired standard errors, more for few sequences (t). In colour: what "
            "was written.",
            f"Up to {ROWS} models of each run, those with the lowest losses.",
        ],
        ordered=True,
    )
    return replace(page, keys=())  # names of rows, not colours, distinguish runs


def _make_row(record: MergedLoss, owner: str) -> Row | None:
    """Return the row of a model of a run; None for the one that others are compared with."""
    if record.update is None:
        reference, value, error = "base", record.change, record.change_error
    else:
        reference, value, error = "alone", record.gap, record.gap_error
    if value is None or record.method == reference:
        return None
    half = paired_half(error, len(record.nll) - record.skipped)
    label = f"{owner}{name_model(record.method, record.scale)}"
    return Row(label, value, half, KEPT if record.chosen else QUIET)


def _draw(ax: Axes, style: PageStyle, slots: Sequence[Slot[Merged]], low: float) -> None:
    look: dict[str, Any] = {"label": "kept", "color": KEPT, "fill": True, "baseline": 0, "lw": 0}
    draw_bars(ax, slots, median_of(lambda r: r.kept), **look)
    look = {"label": "mean of the updates", "color": MEAN, "lw": 1.3 * style.line}
    draw_bars(ax, slots, median_of(lambda r: r.kept_mean), **look)
    look = {"label": "random updates", "color": INK, "ls": DOTTED, "lw": 1.3 * style.line}
    draw_bars(ax, slots, median_of(lambda r: r.kept_random), **look)
    ax.set_ylim(bottom=low)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
