"""Findings → the terminal, annotations and step summary of GitHub Actions, and verdicts for
JUnit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lora_diag.errors import DONE, GATE_FAILED
from lora_diag.feature import Hint
from lora_diag.linting.record import SEVERITIES, LintFinding, StepShare
from lora_diag.records import Results
from lora_diag.records.verdict import Verdict
from lora_diag.rendering.statements import Level, Statement, is_verbose, make_statement
from lora_diag.rendering.tables import grid_of, grids_table
from lora_diag.rendering.text import quantity, safe
from lora_diag.rendering.verdicts import (
    Annotation,
    fit_summary,
    format_annotations,
    markdown_row,
)

# What rules without a finding are about.
_WHOLE = "configuration"
_LEVELS: Mapping[str, Level] = {"error": "failure", "warning": "warning", "note": "note"}
_ANNOTATED = {"error": "error", "warning": "warning", "note": "notice"}


def lint_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: the number of findings, each finding, and the rules that were not
    judged.
    """
    findings, settings = results.whole_of(LintFinding), results.run.settings
    level = _LEVELS[findings[0].severity] if findings else "ok"
    lead = _count_findings(results)
    statements = [make_statement("lint", "Lint", lead, level=level, priority=0)]
    for item in findings:
        lines = (f"{item.id}: {safe(item.evidence)}; {item.fix}", f"at {safe(item.where)}")
        label, level = item.severity.capitalize(), _LEVELS[item.severity]
        statements.append(make_statement(item.id, label, *lines, level=level))
    rules: dict[str, list[str]] = {}
    for rule, need in settings["not_judged"].items():
        rules.setdefault(need, []).append(rule)
    if rules:
        needs = [f"{', '.join(names)}: give {need}" for need, names in rules.items()]
        statements.append(make_statement("not_judged", "Not judged", *needs, priority=2))
    return statements


def _count_findings(results: Results[Any]) -> str:
    """Return the number of findings of each severity, and of rules."""
    counts = Counter(finding.severity for finding in results.whole_of(LintFinding))
    found = [severity for severity in SEVERITIES if counts[severity]]
    lead = ", ".join(quantity(counts[severity], severity) for severity in found)
    judged = quantity(len(results.run.settings["judged"]), "rule")
    return f"{lead or 'clean'} ({judged} judged)"


def suggest_next(results: Results[Any], values: Mapping[str, Any]) -> Hint | None:
    """Return the next command: the explanation of the first finding, else the costs of BASE."""
    for finding in results.whole_of(LintFinding):
        return Hint(f"explain {finding.id}", "why, and the source")
    if any(item.role == "base" for item in results.run.inputs):
        return Hint("plan {base}", "parameters and memory of each rank")
    return None


def exit_code(results: Results[Any]) -> int:
    """Return 1 if a finding is at or above ``fail_on``."""
    findings = results.whole_of(LintFinding)
    return GATE_FAILED if any(_fails(finding, results) for finding in findings) else DONE


def _fails(finding: LintFinding, results: Results[Any]) -> bool:
    """Return whether a finding is at or above ``fail_on``."""
    least = results.run.settings["fail_on"]
    return SEVERITIES.index(finding.severity) <= SEVERITIES.index(least)


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
    """Return annotations of GitHub Actions: an error for each finding that fails, and warnings and
    notices for others.
    """
    annotations = []
    for item in results.whole_of(LintFinding):
        level = "error" if _fails(item, results) else _ANNOTATED[item.severity]
        text = f"{safe(item.where)}: {safe(item.evidence)}; {item.fix}"
        annotations.append(Annotation(level, item.id, item.line, text))
    return format_annotations(results.run, annotations)


def lint_summary(results: Results[Any]) -> str:
    """Return the findings as a step summary of GitHub Actions, in Markdown."""
    head = f"## loradiag lint: {_count_findings(results)}\n\n"
    lines = []
    findings = results.whole_of(LintFinding)
    if findings:
        lines.append(markdown_row("severity", "rule", "where", "evidence", "fix"))
        lines.append("| --- | --- | --- | --- | --- |\n")
    for item in findings:
        lines.append(markdown_row(item.severity, item.id, item.where, item.evidence, item.fix))
    return fit_summary(head, lines)


def as_verdicts(results: Results[Any]) -> Results[Any]:
    """Return verdicts for JUnit: findings at or above ``fail_on`` failed, others warned; other
    judged rules passed.
    """
    settings = results.run.settings
    verdicts = []
    for item in results.whole_of(LintFinding):
        fails = _fails(item, results)
        verdict = Verdict(
            rule=item.id,
            allowed="",
            group=item.where,
            message=f"{item.evidence}; {item.fix}",
            status="failed" if fails else "warned",
            severity="error" if fails else "warning",
        )
        verdicts.append(verdict)
    found = {verdict.rule for verdict in verdicts}
    for rule in settings["judged"]:
        if rule not in found:
            verdicts.append(Verdict(rule=rule, allowed="", group=_WHOLE, status="passed"))
    for rule, need in settings["not_judged"].items():
        message = f"not judged; give {need}"
        verdicts.append(
            Verdict(rule=rule, allowed="", group=_WHOLE, status="not judged", message=message)
        )
    return Results(results.run, (), (), results.end, tuple(verdicts))
