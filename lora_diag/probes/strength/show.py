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
from lora_diag.rendering.losses import caption_of, on_set, probe_summary
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Column, Grid, columns_of
from lora_diag.rendering.text import short, with_limits

_ENDS = {0.0: " (BASE)", 1.0: " (TUNED)"}
_READING = (
    "± and brackets are intervals of paired differences, of 95% for all strengths or parts "
    "together: what excludes 0 is significant; errors allow for dependence of nearby sequences "
    "only; not significantly worse does not mean equal"
)


def strength_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table, if any: for every strength, or part of the update, its losses
    on every set.
    """
    records = results.whole_of(Strength)
    comparisons = _count_comparisons([r for r in records if r.set == records[0].set])
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
            replace(
                field,
                head=short(name) if field.path == "loss" else field.head,
                comparisons=comparisons,
            )
            for field in Strength.shown
        )
        columns += columns_of((field for field in shown if field.path not in hidden), groups)
    if not rows:
        return []
    caption = caption_of(results, *next(iter(rows.values())))
    return [Grid(caption, "t", tuple(rows), tuple(columns))]


def _count_comparisons(of_set: Sequence[Strength]) -> int:
    """Return the number of strengths, or of parts, that are compared with TUNED on a set."""
    parts = sum(record.part is not None for record in of_set)
    return max(1, parts or len(of_set) - 1)


def half_of(error: float | None, of_set: Sequence[Strength]) -> float | None:
    """Return half of the interval of one of the differences on a set, of which ``of_set`` are all
    records.
    """
    return paired_half(error, of_set[0].count, _count_comparisons(of_set))


def strength_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: the strength to use, or the parts that hurt; and what it costs on
    other texts.
    """
    records, choices = results.whole_of(Strength), results.whole_of(StrengthChoice)
    has_parts = any(record.part is not None for record in records)
    answers = [_answer(choice, records) for choice in choices]
    if has_parts:
        answers = [_answer_parts(records)]
    statements = [make_statement("strength", "Strength", *answers, priority=0)]
    for name in set_names(records):
        of_set = [record for record in records if record.set == name]
        lines = _describe_parts(of_set) if has_parts else _describe_cost(of_set, choices)
        for choice in choices:
            if choice.set == name:
                lines = _describe_choice(choice, of_set)
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


def _answer(choice: StrengthChoice, records: Sequence[Strength]) -> str:
    """State which strength to use by the losses on a set and on the shifted ones."""
    answer = "t = 1 is fine: no other measured t is significantly better"
    if choice.best_gap_error is None:
        answer = "t = 1, not tested: one sequence has no error; use more text"
    elif choice.recommended != 1:
        changes = []
        for name in set_names(r for r in records if r.shifted or r.set == choice.set):
            of_set = [record for record in records if record.set == name]
            own = next(record for record in of_set if record.scale == choice.recommended)
            changes.append(f"{short(name)} {with_limits(own.gap, half_of(own.gap_error, of_set))}")
        answer = f"use t = {choice.recommended:g}; loss minus that at t = 1: {', '.join(changes)}"
        if choice.significant is not None:
            answer += f"; t = {choice.significant:g} is significantly better than t = 1, and "
            answer += f"t = {choice.recommended:g} better still on every text"
    return answer if choice.gain > 0 else f"{answer}; but the update does not improve on BASE"


def _describe_choice(choice: StrengthChoice, of_set: Sequence[Strength]) -> list[str]:
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
    gain = f"gain of t = {choice.recommended:g}: "
    gain += f"{with_limits(choice.gain, half_of(choice.gain_error, of_set))} nats"
    best = f"t = {choice.best:g} minus t = 1: "
    best += with_limits(choice.best_gap, half_of(choice.best_gap_error, of_set))
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
    changes = []
    for record in costs:
        change = with_limits(record.change, half_of(record.change_error, of_set))
        changes.append(f"{change} at t = {record.scale:g}")
    named = ", ".join(changes)
    lowest = min(of_set, key=lambda record: record.loss)
    return [f"{named}, from BASE" if named else "", f"lowest loss at t = {lowest.scale:g}"]


def _answer_parts(records: Sequence[Strength]) -> str:
    """State whether any part of the update is better at another strength, on the sets that are not
    shifted.
    """
    better = _find_better_parts(records)
    if not better:
        return "t = 1 is fine: no part is significantly better at another t"
    name = _name(better[0], [record for record in records if record.set == better[0].set])
    return f"{name}: significantly better{f'; so are {len(better) - 1} more' if better[1:] else ''}"


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
        half = half_of(record.gap_error, of_set)
        if half is not None and sign * record.gap > half:
            changed.append(record)
    return changed


def _name(record: Strength, of_set: Sequence[Strength]) -> str:
    """Return a part, its strength and the change of the loss with its interval."""
    half = half_of(record.gap_error, of_set)
    return f"{short(record.part or '')} at {record.scale:g} {with_limits(record.gap, half)}"


def _describe_parts(of_set: Sequence[Strength]) -> list[str]:
    """State which parts raise and lower the loss of a set, and whether their effects add up."""
    lines = []
    for word, sign in _SIGNS.items():
        named = ", ".join(_name(record, of_set) for record in _find_changed(of_set, sign)[:3])
        lines.append(f"loss {word} for {named or 'none'}")
    off = {record.part: record.gap for record in of_set if record.scale == 0}
    whole = off.pop(None, 0.0)
    return [
        *lines,
        f"BASE minus TUNED {whole:+.4f}; parts at 0, each alone, sum to "
        f"{math.fsum(off.values()):+.4f}",
    ]


_SIGNS = {"rises significantly": 1, "falls significantly": -1}
