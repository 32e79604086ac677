"""Table and summary of ``probe strength``: the strength to use, its cost on other texts, and the
parts that hurt.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_diag.feature import Hint
from lora_diag.metrics.statistics import paired_half
from lora_diag.probes.strength.curve import SUFFICIENT_SHARE
from lora_diag.probes.strength.record import Strength, StrengthChoice
from lora_diag.records import Results
from lora_diag.records.probe import set_names
from lora_diag.rendering.losses import on_set, probe_summary
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Column, Grid, columns_of
from lora_diag.rendering.text import plus_minus, short

_ENDS = {0.0: " (BASE)", 1.0: " (TUNED)"}
_READING = (
    "significance is of paired differences, at 95% for all strengths or parts together; errors "
    "allow for dependence of nearby sequences only; not significantly worse does not mean equal"
)


def strength_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table, if any: for every strength, or part of the update, its losses
    on every set.
    """
    records = results.whole_of(Strength)
    rows: dict[str, list[Strength]] = {}
    for record in sorted(records, key=lambda record: (record.part is not None, record.scale)):
        name = f"{record.scale:g}{_ENDS.get(record.scale, '')}"
        rows.setdefault(
            name if record.part is None else f"{short(record.part)} at {record.scale:g}", []
        ).append(record)
    columns: list[Column] = []
    for name in set_names(records):
        groups = [
            (row, [record for record in group if record.set == name]) for row, group in rows.items()
        ]
        hidden = {"to_tuned", "kept"} if groups[0][1][0].shifted else {"to_base"}
        shown = (
            replace(field, head=short(name)) if field.path == "loss" else field
            for field in Strength.shown
        )
        columns += columns_of((field for field in shown if field.path not in hidden), groups)
    return [Grid("", "t", tuple(rows), tuple(columns))] if rows else []


def strength_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: the strength to use, or the parts that hurt; and what it costs on
    other texts.
    """
    records, choices = results.whole_of(Strength), results.whole_of(StrengthChoice)
    has_parts = any(record.part is not None for record in records)
    answers = [_answer_parts(records)] if has_parts else list(map(_answer, choices))
    statements = [make_statement("strength", "Strength", *answers, priority=0)]
    for name in set_names(records):
        of_set = [record for record in records if record.set == name]
        lines = _describe_parts(of_set) if has_parts else _describe_cost(of_set, choices)
        lines = next((_describe_choice(choice) for choice in choices if choice.set == name), lines)
        statements.append(on_set(name, *lines, shifted=of_set[0].shifted))
    return probe_summary(results, *statements, reading=_READING)


def suggest_next(results: Results[Any], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step: write what is better than TUNED; None if t = 1 is fine, or ``merge``
    cannot write it.
    """
    recommended = {choice.recommended for choice in results.whole_of(StrengthChoice)}
    words, suffix = [], ""
    if len(recommended) == 1 and not recommended & {0.0, 1.0}:
        suffix = f"{recommended.pop():.10g}"
        words = ["--scale", suffix]
    elif pattern := _match_part(results):
        suffix = "part"
        words = ["--exclude", pattern]
    if not words:
        return None
    if not results.run.settings.get("factored"):
        words.append("--checkpoint")
    if values["alpha"] is not None:
        words += ["--alpha", str(values["alpha"])]
    if values["alpha_is_rank"]:
        words.append("--alpha-is-rank")
    name = re.sub(r"[{}]", "", Path(str(values["tuned"])).name)
    words += ["-o", f"{name or 'update'}-{suffix}"]
    return Hint(f"merge {{base}} {{tuned}} {shlex.join(words)}", "writes it")


def _match_part(results: Results[Any]) -> str:
    """Return a pattern of the layers of the part without which the loss is lowest; empty if none is
    better, or matches.

    A block's layers are those whose names begin with its name, a type's those whose names end with
    it, unless it is the end of another type.
    """
    records = results.whole_of(Strength)
    parts = {record.part for record in records if record.part is not None}
    better = _find_better_parts(records)
    if not better or better[0].scale != 0 or len(parts) == 1:
        return ""
    part = str(better[0].part)
    if results.run.settings["by"] == "block":
        return rf"^{re.escape(part)}\." if re.search(r"\.\d+$", part) else ""
    if "*" in part or any(other.endswith(f".{part}") for other in parts):
        return ""
    return rf"(^|\.){re.escape(part)}(\.weight)?(\[\d+\])?$"


def _answer(choice: StrengthChoice) -> str:
    """State which strength to use by the losses on a set."""
    answer = "t = 1 is fine: no other measured t is significantly better"
    if choice.best_gap_error is None:
        answer = "t = 1, not tested: one sequence has no error; use more text"
    elif choice.recommended != 1:
        answer = f"use t = {choice.recommended:g}, which is significantly better than t = 1"
    return answer if choice.gain > 0 else f"{answer}; but the update does not improve on BASE"


def _describe_choice(choice: StrengthChoice) -> list[str]:
    """State the best strength on a set, those not significantly worse, and the smallest sufficient
    one.
    """
    lead = f"lowest loss at t = {choice.best:g}"
    if choice.low is not None:
        lead += f"; not significantly worse: {choice.low:.2f} to {choice.high:.2f}"
    if choice.sufficient is not None:
        high = "?" if choice.sufficient_high is None else f"{choice.sufficient_high:.2f}"
        interval = f"{choice.sufficient:.2f} [{choice.sufficient_low:.2f}, {high}]"
        lead += f"; {SUFFICIENT_SHARE:.0%} of the gain at t = {interval}"
    fit = _FITS[choice.fit]
    if choice.optimum is not None:
        fit += f"t = {choice.optimum:.3f} [{choice.optimum_low:.3f}, {choice.optimum_high:.3f}]"
    if choice.checked is not None:
        fit += f"; measured at t = {choice.checked:g}: {choice.checked_gap:+.4f} from it"
    gain = f"gain of t = {choice.recommended:g}: {choice.gain:.4f}{_error(choice.gain_error)} nats"
    best = f"t = {choice.best:g} minus t = 1: {choice.best_gap:+.4f}{_error(choice.best_gap_error)}"
    return [lead, gain, best if choice.best != 1 else "", fit]


_FITS = {
    "quadratic": "optimum of a parabola: ",
    "poor": "no fitted optimum: a parabola does not fit the losses",
    "flat": "no fitted optimum: the curvature of the losses is not significant",
    "edge": "no fitted optimum: the best t is the last of its side; extend --scales",
    "few": "",
}


def _describe_cost(of_set: Sequence[Strength], choices: Sequence[StrengthChoice]) -> list[str]:
    """State what the strength to use, and the smallest sufficient one, cost on a shifted set."""
    targets = [
        t for choice in choices for t in (choice.sufficient, choice.recommended) if t is not None
    ]
    ordered = sorted(of_set, key=lambda record: record.scale)
    costs = [r for r in ordered if r.scale and any(abs(r.scale - t) < 0.011 for t in targets)]
    named = ", ".join(f"{r.change:+.4f}{_error(r.change_error)} at t = {r.scale:g}" for r in costs)
    lowest = min(of_set, key=lambda record: record.loss)
    return [f"{named}, from BASE" if named else "", f"lowest loss at t = {lowest.scale:g}"]


def _error(error: float | None) -> str:
    return "" if error is None else plus_minus(error)


def _answer_parts(records: Sequence[Strength]) -> str:
    """State whether any part of the update is better at another strength, on the sets that are not
    shifted.
    """
    better = _find_better_parts(records)
    if not better:
        return "t = 1 is fine: no part is significantly better at another t"
    return (
        f"{_name(better[0])}: significantly "
        f"better{f'; so are {len(better) - 1} more' if better[1:] else ''}"
    )


def _find_better_parts(records: Sequence[Strength]) -> list[Strength]:
    """Return the parts whose loss is significantly lower than TUNED's, of each set that is not
    shifted.
    """
    better = []
    for name in set_names(record for record in records if not record.shifted):
        better += _find_changed([record for record in records if record.set == name], -1)
    return better


def _find_changed(of_set: Sequence[Strength], sign: int) -> list[Strength]:
    """Return the parts whose loss is significantly higher (1) or lower (−1) than TUNED's, the
    largest change first.
    """
    parts = sorted(
        (record for record in of_set if record.part is not None),
        key=lambda record: -sign * record.gap,
    )
    changed = []
    for record in parts:
        half = paired_half(record.gap_error, len(record.nll), len(parts))
        if half is not None and sign * record.gap > half:
            changed.append(record)
    return changed


def _name(record: Strength) -> str:
    """Return a part, its strength and the change of the loss."""
    return (
        f"{short(record.part or '')} at {record.scale:g} "
        f"{record.gap:+.4f}{_error(record.gap_error)}"
    )


def _describe_parts(of_set: Sequence[Strength]) -> list[str]:
    """State which parts raise and lower the loss of a set, and whether their effects add up."""
    lines = []
    for word, sign in _SIGNS.items():
        named = ", ".join(map(_name, _find_changed(of_set, sign)[:3]))
        lines.append(f"loss {word} for {named or 'none'}")
    off = {record.part: record.gap for record in of_set if record.scale == 0}
    whole = off.pop(None, 0.0)
    return [
        *lines,
        f"BASE minus TUNED {whole:+.4f}; parts at 0, each alone, sum to "
        f"{math.fsum(off.values()):+.4f}",
    ]


_SIGNS = {"rises significantly": 1, "falls significantly": -1}
