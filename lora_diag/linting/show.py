"""Findings → the terminal, and as verdicts for what shows these to machines (JUnit, annotations)."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lora_diag.gating.record import Verdict
from lora_diag.linting.record import SEVERITIES, Finding, StepShare
from lora_diag.records import Results
from lora_diag.rendering.statements import Level, Statement, is_verbose, make_statement
from lora_diag.rendering.tables import Grid, grid_of
from lora_diag.rendering.text import quantity, safe

_LEVELS: Mapping[str, Level] = {"error": "failure", "warning": "warning", "note": "note"}


def lint_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: the number of findings, each finding, and the rules that were not judged."""
    findings, settings = results.whole_of(Finding), results.run.settings
    counts = Counter(finding.severity for finding in findings)
    lead = ", ".join(quantity(counts[severity], severity) for severity in SEVERITIES if counts[severity])
    text = f"{lead or 'clean'} ({quantity(len(settings['judged']), 'rule')} judged)"
    level = _LEVELS[findings[0].severity] if findings else "ok"
    statements = [make_statement("lint", "Lint", text, level=level, priority=0)]
    for item in findings:
        text, remedy = f"{item.id}: {safe(item.evidence)}", f"at {safe(item.where)}; {item.fix}"
        label = item.severity.capitalize()
        statements.append(make_statement(item.id, label, text, remedy, level=_LEVELS[item.severity]))
    rules: dict[str, list[str]] = {}
    for rule, need in settings["not_judged"].items():
        rules.setdefault(need, []).append(rule)
    lines = [f"{', '.join(names)}: give {need}" for need, names in rules.items()]
    return [*statements, *([make_statement("not_judged", "Not judged", *lines, priority=2)] if lines else [])]


def suggest_next(results: Results[Any]) -> str | None:
    """Return the next command: the explanation of the first finding, or without one the cost of other ranks."""
    if findings := results.whole_of(Finding):
        return f"loradiag explain {findings[0].id}   (why, and the source)"
    bases = [item.path for item in results.run.inputs if item.role == "base"]
    return f"{shlex.join(['loradiag', 'plan', *bases])}   (parameters and memory of each rank)" if bases else None


def lint_grids(results: Results[Any], per: str) -> list[Grid]:
    """Return the table of moved entries by module type; none without ``-v``."""
    shares = results.whole_of(StepShare)
    if not shares or not is_verbose():
        return []
    return [grid_of(StepShare.shown, [(share.name, [share]) for share in shares], "module type")]


def as_verdicts(results: Results[Any], fail_on: str) -> Results[Any]:
    """Return verdicts of a gate: findings at or above ``fail_on`` failed, others warned; other judged rules passed."""
    failing, settings = SEVERITIES[: SEVERITIES.index(fail_on) + 1], results.run.settings
    verdicts = []
    for item in results.whole_of(Finding):
        fails = item.severity in failing
        verdicts.append(
            Verdict(
                rule=item.id,
                group=item.where,
                measured=item.evidence,
                allowed="no finding",
                status="failed" if fails else "warned",
                severity="error" if fails else "warning",
                message=item.fix,
                line=item.line,
            )
        )
    clean = [rule for rule in settings["judged"] if rule not in {verdict.rule for verdict in verdicts}]
    verdicts += [Verdict(rule=rule, allowed="no finding", status="passed") for rule in clean]
    verdicts += [
        Verdict(rule=rule, allowed="no finding", status="not judged", message=f"give {need}")
        for rule, need in settings["not_judged"].items()
    ]
    return Results(results.run, (), (), results.end, tuple(verdicts))
