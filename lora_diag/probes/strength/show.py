"""Table and summary of ``probe strength``: the strength to use, its cost on other texts, and the parts that hurt."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_diag.feature import Hint
from lora_diag.metrics.statistics import Estimate, degrees_of_freedom, paired_half
from lora_diag.probes.strength.curve import SUFFICIENT_SHARE
from lora_diag.probes.strength.record import Strength, StrengthChoice
from lora_diag.records import Results
from lora_diag.records.probe import set_names
from lora_diag.rendering.losses import on_set, probe_summary
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Column, Grid, columns_of
from lora_diag.rendering.text import plus_minus, safe, short

_ENDS = {0.0: " (BASE)", 1.0: " (TUNED)"}


def strength_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table, if any: for every strength, or part of the update, its losses on every set."""
    records = results.whole_of(Strength)
    rows: dict[str, list[Strength]] = {}
    for record in sorted(records, key=lambda record: (record.part is not None, record.scale)):
        name = f"{record.scale:g}{_ENDS.get(record.scale, '')}"
        rows.setdefault(name if record.part is None else f"{short(record.part)} at {record.scale:g}", []).append(record)
    columns: list[Column] = []
    for name in set_names(records):
        groups = [(row, [record for record in group if record.set == name]) for row, group in rows.items()]
        is_shifted = any(record.shifted for record in records if record.set == name)
        hidden = {"to_tuned", "kept"} if is_shifted else {"to_base"}
        shown = (replace(field, head=short(name)) if field.path == "loss" else field for field in Strength.shown)
        columns += columns_of((field for field in shown if field.path not in hidden), groups)
    return [Grid("", "part of the update" if _has_parts(records) else "t", tuple(rows), tuple(columns))] if rows else []


def strength_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: the strength to use, or the parts that hurt; and what it costs on other texts."""
    records, choices = results.whole_of(Strength), results.whole_of(StrengthChoice)
    describe = _describe_part if _has_parts(records) else None
    statements = [_answer_parts(records)] if describe else [_answer(choices)] if choices else []
    by_set = {choice.set: choice for choice in choices}
    for name in set_names(records):
        of_set = [record for record in records if record.set == name]
        lines = describe(of_set) if describe else _describe_set(of_set, by_set.get(name), choices)
        statements.append(on_set(name, *lines, shifted=of_set[0].shifted))
    if "write" in results.run.settings and results.end is not None:
        statements.append(_describe_written(results.run.settings))
    return probe_summary(results, *statements, reading=_READING)


_READING = (
    "significance is of paired differences, at 95% for all strengths or parts together; errors allow for dependence of "
    "nearby sequences only; not significantly worse does not mean equal"
)


def suggest_next(results: Results[Any], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step: write the adapter at a better strength, or look at the blocks; else None."""
    records, recommended = results.whole_of(Strength), _recommend(results.whole_of(StrengthChoice))
    if "write" in results.run.settings or _has_parts(records):
        return None
    texts = [
        (f"--{role}", path) for role, name in (("eval", "evaluate"), ("shifted", "shifted")) for path in values[name]
    ]
    words = ["probe", "strength", "{base}", "{tuned}", *(str(word) for pair in texts for word in pair)]
    is_adapter = any(side.role == "adapter" for side in results.run.inputs)
    if recommended not in (None, 1.0) and is_adapter:
        folder = f"{str(values['tuned']).rstrip('/')}-{recommended:g}"
        return Hint(shlex.join([*words, "--write", folder, "--scale", f"{recommended:g}"]), "writes it")
    return Hint(shlex.join([*words, "--by", "block"]), "the blocks that bring the gain, and the cost")


def _has_parts(records: Sequence[Strength]) -> bool:
    """Return whether parts of the update were varied alone."""
    return any(record.part is not None for record in records)


def _recommend(choices: Sequence[StrengthChoice]) -> float | None:
    """Return the strength to use if it is the same on all deciding sets; else None."""
    found = {choice.recommended for choice in choices}
    return found.pop() if len(found) == 1 else None


def _answer(choices: Sequence[StrengthChoice]) -> Statement:
    """State which strength to use."""
    recommended = _recommend(choices)
    if any(choice.best_gap_error is None for choice in choices):
        line = "t = 1, not tested: one sequence has no error; use more text"
    elif recommended is None:
        line = "it depends: " + ", ".join(f"t = {choice.recommended:g} on {safe(choice.set)}" for choice in choices)
    elif recommended == 1:
        line = "t = 1 is fine: no other measured t is significantly better"
    else:
        gaps = ", ".join(f"{choice.best_gap:+.4f}{_error(choice.best_gap_error)}" for choice in choices)
        line = f"use t = {recommended:g}: {gaps} nats from t = 1, significantly better"
    if all(choice.gain <= 0 for choice in choices):
        line += "; but the update does not improve on BASE"
    return make_statement("strength", "Strength", line, priority=0)


def _describe_set(
    of_set: Sequence[Strength], choice: StrengthChoice | None, choices: Sequence[StrengthChoice]
) -> list[str]:
    """State the best, the equal and the smallest sufficient strength on a set; on a shifted one, what they cost."""
    if choice is None:
        targets = [t for other in choices for t in (other.sufficient, other.recommended) if t is not None]
        costs = sorted({_nearest(of_set, t) for t in targets}, key=lambda record: record.scale)
        named = ", ".join(f"{_to_base(record)} at t = {record.scale:g}" for record in costs if record.scale)
        lowest = min(of_set, key=lambda record: record.loss)
        return [f"{named}, from BASE" if named else "", f"lowest loss at t = {lowest.scale:g}"]
    lead = f"lowest loss at t = {choice.best:g}; not significantly worse: {choice.low:.2f} to {choice.high:.2f}"
    gain = f"gain of t = {choice.recommended:g}: {choice.gain:.4f}{_error(choice.gain_error)} nats"
    if choice.sufficient is not None:
        ends = (f"{end:.2f}" if end is not None else "?" for end in (choice.sufficient_low, choice.sufficient_high))
        lead += f"; {SUFFICIENT_SHARE:.0%} of the gain at t = {choice.sufficient:.2f} [{', '.join(ends)}]"
        near = _nearest(of_set, choice.sufficient)
        gain += f"; measured at t = {near.scale:g}: {-near.change / choice.gain:.1%} of it"
    gap = f"t = {choice.best:g} minus t = 1: {choice.best_gap:+.4f}{_error(choice.best_gap_error)}"
    return [lead, gap if choice.best != 1 else "", gain, _describe_fit(choice)]


def _nearest(of_set: Sequence[Strength], scale: float) -> Strength:
    """Return the record of the measured strength nearest to another."""
    return min(of_set, key=lambda record: abs(record.scale - scale))


def _describe_fit(choice: StrengthChoice) -> str:
    """State the optimum of the parabola and its check, or why there is none."""
    run = "" if choice.checked is None else f"run at t = {choice.checked:g}: {choice.checked_gap:+.4f}"
    run += _error(choice.checked_error) if run else ""
    if choice.optimum is not None:
        interval = f"[{choice.optimum_low:.3f}, {choice.optimum_high:.3f}]"
        return f"optimum of a fitted parabola: t = {choice.optimum:.3f} {interval}; {run} nats from it"
    reasons = {
        "poor": f"a parabola does not fit the losses{f' ({run} from it)' if run else ''}",
        "flat": "the curvature of the losses is not significant",
        "edge": f"the best measured strength, t = {choice.best:g}, is the last of its side; extend --scales",
        "few": "",
        "quadratic": "its check was not measured",
    }
    return f"no fitted optimum: {reasons[choice.fit]}" if reasons[choice.fit] else ""


def _error(error: float | None) -> str:
    return "" if error is None else plus_minus(error)


def _to_base(record: Strength) -> str:
    """Return the loss minus that of BASE, with its error."""
    half = paired_half(record.change_error, len(record.nll))
    doubt = " (not significant)" if half is not None and abs(record.change) <= half else ""
    return f"{record.change:+.4f}{_error(record.change_error)}{doubt}"


def _answer_parts(records: Sequence[Strength]) -> Statement:
    """State whether any part of the update is better at another strength, on the sets that are not shifted."""
    better = [record for record in records if not record.shifted and _is_changed(record, records, -1)]
    if not better:
        line = "t = 1 is fine in every part: none is significantly better at another strength"
    else:
        best = min(better, key=lambda record: record.gap)
        line = f"{short(best.part or '')} is better at t = {best.scale:g}: {_gap(best)} nats on {safe(best.set)}"
        line += f"; so are {len(better) - 1} more" if len(better) > 1 else ""
    return make_statement("strength", "Strength", line, priority=0)


def _is_changed(record: Strength, records: Sequence[Strength], sign: int) -> bool:
    """Return whether the loss of a part is significantly higher (1) or lower (−1) than TUNED's, of all parts (t)."""
    count = sum(other.part is not None and other.set == record.set for other in records)
    if record.part is None or record.gap_error is None:
        return False
    level = 1 - 0.05 / 2 / count
    return sign * record.gap > Estimate(0.0, record.gap_error, degrees_of_freedom(len(record.nll))).half(level)


def _gap(record: Strength) -> str:
    return f"{record.gap:+.4f}{_error(record.gap_error)}"


def _describe_part(of_set: Sequence[Strength]) -> list[str]:
    """State which parts raise and lower the loss of a set, and whether their effects add up."""
    parts = [record for record in of_set if record.part is not None]
    whole = next((record.change for record in of_set if record.part is None and record.scale == 1), 0.0)
    lines = []
    for word, sign in (("rises", 1), ("falls", -1)):
        changed = sorted((r for r in parts if _is_changed(r, of_set, sign)), key=lambda record: -sign * record.gap)
        named = ", ".join(f"{short(record.part or '')} at {record.scale:g} {_gap(record)}" for record in changed[:3])
        count = f", of {len(changed)} significant" if len(changed) > 3 else ""
        lines.append(f"the loss {word} most for {named}{count}" if named else f"it {word} significantly for no part")
    off = [record.gap for record in parts if record.scale == 0]
    total = f"TUNED minus BASE {whole:+.4f}; the parts, each at 0 alone, sum to {-math.fsum(off):+.4f}" if off else ""
    return [*lines, total]


def _describe_written(settings: Mapping[str, Any]) -> Statement:
    """State which adapter was written."""
    parts = ", ".join(map(short, settings["part"]))
    scope = f" in {parts}, 1 elsewhere" if parts else ""
    check = "its loss was measured from the files and is that of the table"
    line = f"{safe(settings['write'])}: t = {settings['scale']:g}{scope}; {check}"
    return make_statement("written", "Written", line, priority=0)
