"""Terminal output of ``probe gain``: measured losses with a part of the update.

Uses records only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_diag.feature import Hint
from lora_diag.metrics.statistics import paired_half
from lora_diag.probes.gain.choice import SUFFICIENT, Chosen, find_best_drop, half_of
from lora_diag.probes.gain.record import Gain, GainLoss, LayerGain
from lora_diag.records import Results
from lora_diag.records.names import module_type_of
from lora_diag.rendering.losses import caption_of
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Column, Grid, columns_of
from lora_diag.rendering.text import quantity, short, with_limits

_ABOUT = (
    "Loss with a part of the update: r leading directions of every layer, or the directions with "
    "the largest gain per parameter. All else as in TUNED."
)
_ABOUT_DROPPED = (
    "Loss without the directions whose gain is at most 0 to 1 times (≤) what they cost on the "
    "shifted text."
)


def format_share(share: float, half: float | None = None) -> str:
    """Return a fraction, and half of its interval, in percent."""
    limits = "" if half is None else f" ±{100 * half:.1f}"
    return f"{100 * share:.1f}{limits}%"


def format_kept(record: GainLoss) -> str:
    """Return the fraction of the gain that is kept, and half of its interval."""
    if record.kept is None:
        return "-"
    return format_share(record.kept, paired_half(record.kept_error, record.sequences))


def smallest_of(records: Sequence[GainLoss], subject: str) -> GainLoss | None:
    """Return the smallest uniform rank, or number of directions, that keeps enough of the gain."""
    sufficient = [
        record
        for record in records
        if record.subject == subject and not record.shifted and (record.kept or 0.0) >= SUFFICIENT
    ]
    return min(sufficient, key=lambda record: record.amount, default=None)


def group_columns(results: Results[Any], rows: Sequence[Sequence[LayerGain]]) -> list[Column]:
    """Return the columns of the measured loss without each row's update, and with it alone, as
    fractions of the gain; none if they were not measured for these rows.
    """
    found = {(r.subject, r.name): r for r in reversed(results.whole_of(GainLoss)) if not r.shifted}
    columns = []
    for subject, title in (("without", "lost without"), ("alone", "alone")):
        cells = []
        for group in rows:
            names = (group[0].layer, module_type_of(group[0].layer))
            keys = ((subject, name) for name in names if len(group) == 1 or name == names[1])
            record = next((found[key] for key in keys if key in found), None)
            if record is not None and record.kept is not None and subject == "without":
                record = record.model_copy(update={"kept": 1 - record.kept})
            cells.append("-" if record is None else format_kept(record))
        if set(cells) != {"-"}:
            columns.append(Column(title, tuple(cells)))
    return columns


def choice_grids(results: Results[Any]) -> list[Grid]:
    """Return the tables of measured choices on both texts, if any: of what is dropped, and, as a
    detail, of the search.
    """
    dropped: dict[str, list[GainLoss]] = {}
    searched: dict[str, list[GainLoss]] = {}
    for record in sorted(results.whole_of(GainLoss), key=lambda record: record.amount):
        if record.subject == "dropped":
            name = f"{record.amount} (≤ {record.name})"
            dropped.setdefault(name, []).append(record)
        elif record.subject == "directions":
            searched.setdefault(quantity(record.amount, "direction"), []).append(record)
        elif record.subject == "uniform":
            searched.setdefault(f"r={record.amount}", []).append(record)
    grids = []
    for title, rows in (("dropped", dropped), ("kept", searched)):
        if rows:
            caption = caption_of(results, *next(iter(rows.values())))
            about = _ABOUT if title == "kept" else _ABOUT_DROPPED
            columns = _list_columns(rows)
            is_detail = title == "kept"
            grids.append(Grid(caption, title, tuple(rows), columns, about, detail=is_detail))
    return grids


def _list_columns(rows: Mapping[str, Sequence[GainLoss]]) -> tuple[Column, ...]:
    """Return the columns of each text; a fraction of the gain only where it is one."""
    columns: list[Column] = []
    for first in next(iter(rows.values())):
        groups = [(row, [r for r in group if r.set == first.set]) for row, group in rows.items()]
        shown = [
            replace(field, head=short(first.set) if field.path == "loss" else field.head)
            for field in GainLoss.shown
            if not (first.shifted and field.path in {"params", "kept"})
        ]
        columns += columns_of(shown, groups)
    return tuple(columns)


def choice_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: the smallest choices that are enough, and what can be dropped."""
    records = results.whole_of(GainLoss)
    searched = [record for record in records if record.subject in {"uniform", "directions"}]
    statements = []
    chose = {gain.set for gain in results.whole_of(Gain)}
    for base in records:
        is_judge = base.subject == "base" and not base.shifted and base.set not in chose
        if is_judge and base.gap <= half_of(base):
            text = "no significant gain, so nothing is searched: "
            text += with_limits(base.gap, half_of(base))
            statements.append(make_statement("enough", f"Gain on {short(base.set)}", text))
    if searched:
        label = f"Enough on {short(searched[0].set)}"
        text = "; ".join(_describe_enough(searched))
        statements.append(make_statement("enough", label, text, priority=0))
    if any(record.subject == "dropped" for record in records):
        line = _describe_drop(find_best_drop(results))
        statements.append(make_statement("drop", "Drop", line, priority=0))
    return statements


def _describe_enough(searched: Sequence[GainLoss]) -> list[str]:
    """State the smallest uniform rank and number of directions, by measured losses."""
    lines = []
    for subject, name in (
        ("uniform", "uniform r={}"),
        ("directions", "the first {} directions by gain per parameter"),
    ):
        own = sorted((r for r in searched if r.subject == subject), key=lambda r: r.amount)
        if not own:
            continue
        record = smallest_of(own, subject)
        only = "only " if record is None else ""
        shown = record or own[-1]
        kept = f"{only}{format_kept(shown)} of the gain"
        lines.append(f"{kept} with {name.format(shown.amount)} ({shown.params:,} params)")
    return lines


def _describe_drop(best: Sequence[GainLoss]) -> str:
    """State what is best dropped, with the losses on both texts."""
    if not best:
        return (
            "nothing to gain by dropping directions: no measured choice lowers the loss on the "
            f"shifted text significantly and keeps {SUFFICIENT:.0%} of the gain"
        )
    own, other = best
    return (
        f"without the {quantity(own.amount, 'direction')} that gain at most {own.name} "
        f"times what they cost: loss on {short(other.set)} "
        f"{with_limits(other.gap, half_of(other))}, on {short(own.set)} "
        f"{with_limits(own.gap, half_of(own))}"
    )


def describe_chosen(chosen: Chosen) -> str:
    """Return how directions were chosen by their gain, and the measured losses, for a model
    card.
    """
    text = f"Its {quantity(len(chosen.directions), 'direction')} were chosen by gain in loss"
    if not chosen.measured:
        return f"{text}, of which no loss was measured."
    parts = [
        f"{record.amount} {record.subject}: loss {record.loss:.4f} on {short(record.set)}, "
        f"{format_kept(record)} of the change by the whole update"
        for record in chosen.measured
    ]
    doubt = "" if chosen.is_exact else " for the nearest numbers"
    return f"{text}. Measured{doubt}, with all other weights as in TUNED: {'; '.join(parts)}."


def suggest_next(results: Results[Any], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step: the adapter of the smaller choice that is enough; None without one."""
    found = [smallest_of(results.whole_of(GainLoss), each) for each in ("uniform", "directions")]
    best = min(filter(None, found), key=lambda record: record.params or 0, default=None)
    if best is None:
        return None
    how = f"--rank {best.amount}"
    if best.subject == "directions":
        if values["output"] is None:
            return None
        how = f"--directions {{output}} --keep {SUFFICIENT:g}"
    return Hint(f"extract {{base}} {{tuned}} {how} -o chosen/", "an adapter that keeps 90% of it")
