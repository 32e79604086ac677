"""Findings → the terminal, and as verdicts for what shows these to machines (JUnit,
annotations).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lora_diag.errors import DONE, GATE_FAILED
from lora_diag.linting.record import SEVERITIES, LintFinding, StepShare
from lora_diag.records import Results
from lora_diag.records.verdict import Verdict, outcome
from lora_diag.rendering.statements import Level, Statement, is_verbose, make_statement
from lora_diag.rendering.tables import grid_of, grids_table
from lora_diag.rendering.text import quantity, safe
from lora_diag.rendering.verdicts import workflow_commands

_CLEAN = "no finding"
_LEVELS: Mapping[str, Level] = {"error": "failure", "warning": "warning", "note": "note"}


def lint_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: the number of findings, each finding, and the rules that were not
    judged.
    """
    findings, settings = results.whole_of(LintFinding), results.run.settings
    counts = Counter(finding.severity for finding in findings)
    found = [severity for severity in SEVERITIES if counts[severity]]
    lead = ", ".join(quantity(counts[severity], severity) for severity in found)
    text = f"{lead or 'clean'} ({quantity(len(settings['judged']), 'rule')} judged)"
    level = _LEVELS[findings[0].severity] if findings else "ok"
    statements = [make_statement("lint", "Lint", text, level=level, priority=0)]
    for item in findings:
        lines = (f"{item.id}: {safe(item.evidence)}", f"at {safe(item.where)}; {item.fix}")
        label, level = item.severity.capitalize(), _LEVELS[item.severity]
        statements.append(make_statement(item.id, label, *lines, level=level))
    rules: dict[str, list[str]] = {}
    for rule, need in settings["not_judged"].items():
        rules.setdefault(need, []).append(rule)
    if rules:
        needs = [f"{', '.join(names)}: give {need}" for need, names in rules.items()]
        statements.append(make_statement("not_judged", "Not judged", *needs, priority=2))
    return statements


def suggest_next(results: Results[Any], values: Mapping[str, Any]) -> str | None:
    """Return the next command: the explanation of the first finding; None without one."""
    findings = results.whole_of(LintFinding)
    return f"loradiag explain {findings[0].id}   (why, and the source)" if findings else None


def exit_code(results: Results[Any]) -> int:
    """Return 1 if a finding is at or above ``fail_on``."""
    return GATE_FAILED if outcome(as_verdicts(results).whole) == "failed" else DONE


def lint_table(
    results: Results[Any], width: int = 80, color: bool = False, next_command: str | None = None
) -> str:
    """Return the findings for a terminal, with moved entries by module type if that is verbose.

    Args:
        results: A run of ``lint``.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        next_command: The suggested next command, printed last; None without one.
    """
    grids = []
    rows = [(share.name, [share]) for share in results.whole_of(StepShare)]
    if rows and is_verbose():
        grids.append(grid_of(StepShare.shown, rows, "module type"))
    return grids_table(grids, lint_lines(results), width, color, next_command)


def list_annotations(results: Results[Any]) -> list[str]:
    """Return annotations of GitHub Actions, as of a gate."""
    return workflow_commands(as_verdicts(results))


def as_verdicts(results: Results[Any]) -> Results[Any]:
    """Return verdicts of a gate: findings at or above ``fail_on`` failed, others warned; other
    judged rules passed.
    """
    settings = results.run.settings
    failing = SEVERITIES[: SEVERITIES.index(settings["fail_on"]) + 1]
    verdicts = []
    for item in results.whole_of(LintFinding):
        fails = item.severity in failing
        verdict = Verdict(
            rule=item.id,
            allowed=_CLEAN,
            group=item.where,
            line=item.line,
            measured=item.evidence,
            message=item.fix,
            status="failed" if fails else "warned",
            severity="error" if fails else "warning",
        )
        verdicts.append(verdict)
    found = {verdict.rule for verdict in verdicts}
    clean = [rule for rule in settings["judged"] if rule not in found]
    verdicts += [Verdict(rule=rule, allowed=_CLEAN, status="passed") for rule in clean]
    for rule, need in settings["not_judged"].items():
        message = f"give {need}"
        verdicts.append(Verdict(rule=rule, allowed=_CLEAN, status="not judged", message=message))
    return Results(results.run, (), (), results.end, tuple(verdicts))
