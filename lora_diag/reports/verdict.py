"""What a gate says: in the terminal, failures first; and the words that all its reports share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_diag.reports.lines import answers
from lora_diag.reports.text import crop, number, safe, short, to_text
from lora_diag.results import Results, Verdict
from lora_diag.results.verdict import outcome

# So many rows of verdicts are shown; --output has all.
ROWS = 20

# How bad a status is: what comes first in every report.
_ORDER = ("failed", "inconclusive", "warned", "waived", "not judged", "passed")
_STYLE = {"failed": "bold red", "inconclusive": "bold yellow", "warned": "yellow"}


def verdicts_of(results: Results[Any]) -> list[Verdict]:
    """Return the verdicts of a run of ``gate``, the worst first, those of one rule together."""
    found = [record for record in results.whole if isinstance(record, Verdict)]
    rules = list(dict.fromkeys(verdict.rule for verdict in found))
    return sorted(found, key=lambda v: (_ORDER.index(v.status), not v.blocks, rules.index(v.rule), _distance(v)))


def _distance(verdict: Verdict) -> float:
    """Order the verdicts of one rule: the largest first where the limit is an upper one."""
    if not isinstance(verdict.measured, float):
        return 0.0
    return -verdict.measured if "<" in verdict.allowed else verdict.measured


def policy_file(results: Results[Any]) -> str | None:
    """Return the path of the policy's file; None for one of the package."""
    return next((given.path for given in results.run.inputs if given.role == "policy"), None)


def measured(verdict: Verdict) -> str:
    """Return the value found as it is shown, never rounded to the other side of what is allowed."""
    if verdict.measured is None:
        return "-"
    if isinstance(verdict.measured, str):
        return safe(verdict.measured)
    brief, value = number(verdict.measured), verdict.measured
    limit = _as_number(verdict.allowed.partition(" (")[0].rpartition(" ")[2])
    return brief if limit is None or _side(float(brief), limit) == _side(value, limit) else f"{value:.9g}"


def _side(value: float, limit: float) -> int:
    return (value > limit) - (value < limit)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def place(verdict: Verdict) -> str:
    """Return what a verdict is about."""
    group = f" ({safe(verdict.group)})" if verdict.group else ""
    return (short(verdict.layer) if verdict.layer is not None else "all layers") + group


def headline(results: Results[Any]) -> str:
    """Return the outcome and what it rests on, in one sentence."""
    found = verdicts_of(results)
    came_to = outcome(found)
    if came_to == "failed":
        failed = [verdict for verdict in found if verdict.status == "failed"]
        return f"FAILED: {_how_many(failed)}"
    if came_to == "inconclusive":
        unknown = [verdict for verdict in found if verdict.status == "inconclusive" and verdict.blocks]
        return (
            f"INCONCLUSIVE, which is no pass: {_how_many(unknown)}" if unknown else "INCONCLUSIVE: nothing was judged"
        )
    warned = [verdict for verdict in found if verdict.status == "warned"]
    return f"PASSED{f', with warnings: {_how_many(warned)}' if warned else ''}"


def _how_many(verdicts: Sequence[Verdict]) -> str:
    rules = {verdict.rule for verdict in verdicts}
    layers = {verdict.layer for verdict in verdicts if verdict.layer is not None}
    on = f" on {len(layers)} {'layer' if len(layers) == 1 else 'layers'}" if layers else ""
    return f"{len(rules)} {'rule' if len(rules) == 1 else 'rules'}{on}"


def why(verdicts: Sequence[Verdict]) -> str:
    """Return what is said of the verdicts of one rule that came out alike: where, and what to do."""
    messages = list(dict.fromkeys(verdict.message for verdict in verdicts if verdict.message))
    more = f" (and {len(messages) - 1} other reasons)" if len(messages) > 1 else ""
    return (safe(messages[0]) if messages else f"allowed is {safe(verdicts[0].allowed)}") + more


def by_rule(results: Results[Any], *statuses: str) -> list[tuple[str, list[Verdict]]]:
    """Return the verdicts that came out in one of some ways, rule by rule."""
    found = [verdict for verdict in verdicts_of(results) if verdict.status in statuses]
    return [(rule, list(group)) for rule, group in groupby(found, key=lambda verdict: verdict.rule)]


def verdict_table(
    results: Results[Any], width: int = 80, color: bool = False, per: str = "type", then: str | None = None
) -> str:
    """Return what a gate found: its failures, then a summary.

    Args:
        results: A run of ``gate``.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: Not used: a failure is always told by its layer.
        then: The command that a user would run next.
    """
    shown = [verdict for verdict in verdicts_of(results) if verdict.status in _STYLE]
    told = answers([*_lines(results, len(shown)), *([("Next", then)] if then else [])], _style)
    return to_text(Group(_table(shown[:ROWS], width), told) if shown else told, width, color)


def _table(shown: Sequence[Verdict], width: int) -> Table:
    rules = min(max(8, width // 5), max(len(verdict.rule) for verdict in shown))
    values = max(len("measured"), *(len(measured(verdict)) for verdict in shown))
    allowed = min(max(len(verdict.allowed) for verdict in shown), width // 3)
    places = max(len(place(verdict)) for verdict in shown)
    statuses = max(len(verdict.status) for verdict in shown)
    room = max(12, min(places, width - statuses - rules - values - allowed - 6))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, header_style="bold")
    table.add_column("status", no_wrap=True)
    table.add_column("rule", no_wrap=True, width=max(rules, len("rule")))
    table.add_column("layer", no_wrap=True, width=room)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("allowed", overflow="fold", width=allowed)
    for verdict in shown:
        status = Text(verdict.status, style=_STYLE[verdict.status])
        allowed_text = Text(safe(verdict.allowed))
        table.add_row(
            status, crop(safe(verdict.rule), rules), crop(place(verdict), room), measured(verdict), allowed_text
        )
    return table


def _style(word: str, sentence: str) -> str:
    if word == "Gate":
        return "bold green" if sentence.startswith("PASSED") else "bold red"
    return ""


def _lines(results: Results[Any], shown: int) -> list[tuple[str, str]]:
    lines = [("Shown", f"{ROWS} of {shown}; -o FILE keeps them all")] if shown > ROWS else []
    lines.append(("Gate", headline(results)))
    for word, status in (("Failed", "failed"), ("Unknown", "inconclusive"), ("Warned", "warned"), ("Waived", "waived")):
        told = [f"{_named(rule, found)}: {why(found)}" for rule, found in by_rule(results, status)]
        if told:
            lines.append((word, "\n".join(told)))
    if spared := by_rule(results, "not judged"):
        lines.append(("Not judged", "\n".join(f"{_named(rule, found)}: {why(found)}" for rule, found in spared)))
    lines.append(("Passed", _passed(results)))
    lines.append(("Judged", "\n".join(_inputs(results))))
    return lines


def _named(rule: str, found: Sequence[Verdict]) -> str:
    layers = {verdict.layer for verdict in found if verdict.layer is not None}
    line = f" (line {found[0].line})" if found[0].line else ""
    return f"{safe(rule)}{line}" + (f", {len(layers)} {'layer' if len(layers) == 1 else 'layers'}" if layers else "")


def _passed(results: Results[Any]) -> str:
    bad = {rule for rule, _ in by_rule(results, "failed", "inconclusive", "warned")}
    good = [(rule, found) for rule, found in by_rule(results, "passed") if rule not in bad]
    own = [_named(rule, found) for rule, found in good if found[0].line]
    built_in = [rule for rule, found in good if not found[0].line]
    parts = [*own, *([f"built-in checks {', '.join(built_in)}"] if built_in else [])]
    return "; ".join(parts) or "nothing"


def _inputs(results: Results[Any]) -> list[str]:
    longest = max(len(given.role) for given in results.run.inputs)
    counts = [f", {given.tensors} layers" if given.tensors else "" for given in results.run.inputs]
    return [
        f"{given.role:<{longest}} {safe(given.path)} ({safe(given.kind)}{count})"
        for given, count in zip(results.run.inputs, counts, strict=True)
    ]
