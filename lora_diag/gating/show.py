"""Verdicts of ``gate`` → the terminal, and a block of a model card, in the order of the policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Group

from lora_diag.records import Results, RunInput
from lora_diag.records.verdict import STATUSES, Verdict, outcome
from lora_diag.rendering.html import escape_markdown, with_section
from lora_diag.rendering.statements import Level, Statement, make_statement, summary_of
from lora_diag.rendering.text import quantity, safe, to_text
from lora_diag.rendering.verdicts import (
    by_rule,
    by_status,
    describe_reasons,
    describe_verdicts,
    headline,
    markdown_row,
    verdict_grid,
    verdicts_of,
    weights_of,
)

# Maximum number of rows of verdicts, and of rows of one rule if several have rows; --output has
# all.
ROWS, ROWS_OF_A_RULE = 20, 6


def reason(results: Results[Any]) -> str:
    """Return the outcome, with the worst verdict that blocks it if there is one, in one line."""
    for verdict in verdicts_of(results):
        if verdict.blocks:
            return f"{headline(results)}: {safe(verdict.rule)}: {describe_verdicts([verdict])}"
    return headline(results)


def verdict_table(
    results: Results[Any],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    next_command: str | None = None,
) -> str:
    """Return the result of a gate for a terminal: verdicts that need attention, then a summary.

    Args:
        results: A run of ``gate``.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: Not used: verdicts are always listed by layer.
        next_command: The suggested next command, printed last; None without one.
    """
    bad = {key: verdicts for key, verdicts in by_status(results).items() if STATUSES[key[0]].style}
    # The worst of each rule, so that one rule with many failures does not hide others.
    rows = ROWS_OF_A_RULE if len({rule for _, rule in bad}) > 1 else ROWS
    shown = [verdict for verdicts in bad.values() for verdict in verdicts[:rows]][:ROWS]
    total = sum(map(len, bad.values()))
    omitted = ""
    if len(shown) < total:
        omitted = f"{len(shown)} of {total} verdicts; -o FILE keeps them all"
    table = verdict_grid(shown, width).render(width) if shown else []
    summary = summary_of(_make_statements(results, omitted), next_command)
    return to_text(Group(*table, summary), width, color)


def _make_statements(results: Results[Any], omitted: str) -> list[Statement]:
    """Return the summary: the outcome with ``omitted``, the rules of each status by reason, and the
    inputs.
    """
    level: Level = "ok" if outcome(results.whole) == "passed" else "failure"
    statements = [make_statement("outcome", "Gate", headline(results), omitted, level=level)]
    for status in STATUSES:
        if status == "passed":
            rules = by_rule(results).values()
            passed = [_name_rule(verdicts) for verdicts in rules if verdicts[0].status == "passed"]
            lines = [", ".join(passed)]
        else:
            names: dict[str, list[str]] = {}
            for (of_rule, _), verdicts in by_status(results).items():
                if of_rule == status:
                    names.setdefault(describe_reasons(verdicts), []).append(_name_rule(verdicts))
            lines = [f"{', '.join(of_reason)}: {why}" for why, of_reason in names.items()]
        statements.append(make_statement(status.replace(" ", "_"), status.capitalize(), *lines))
    inputs = make_statement(
        "judged", "Inputs", *map(_describe_input, results.run.inputs), priority=2
    )
    return [*(statement for statement in statements if statement.lead), inputs]


def _name_rule(verdicts: Sequence[Verdict]) -> str:
    """Return the name of a rule, with its line in the policy and the number of layers of these
    verdicts.
    """
    first = verdicts[0]
    details = []
    if first.line:
        details.append(f"line {first.line}")
    layers = {verdict.layer for verdict in verdicts} - {None}
    if layers:
        details.append(quantity(len(layers), "layer"))
    name = safe(first.rule)
    return f"{name} ({', '.join(details)})" if details else name


def _describe_input(item: RunInput) -> str:
    """Return the role, path, kind, fingerprint and notes of an input of a gate."""
    fingerprint = [f"fingerprint {item.fingerprint}"] if item.fingerprint else []
    return safe(f"{item.role} {item.path} ({', '.join([item.kind, *fingerprint, *item.notes])})")


def model_card(results: Results[Any], card: str = "") -> str:
    """Return a model card with the result of a gate.

    Args:
        results: A run of ``gate``.
        card: The existing card; the block replaces an earlier one, or is appended. Line endings are
            kept.
    """
    policy = results.run.inputs[0]
    lines = [
        "## Checks before release",
        "",
        f"`loradiag gate` {results.run.version}, {results.run.settings['today']}: "
        f"{escape_markdown(headline(results))}",
        f"(policy {escape_markdown(policy.path)}: {escape_markdown(policy.kind)}).",
    ]
    lines += [
        f"Measured: {escape_markdown(_describe_input(item))}." for item in weights_of(results)
    ]
    text = "\n".join([*lines, "", "| rule | allowed | outcome |", "| --- | --- | --- |\n"])
    for rule, verdicts in by_rule(results).items():
        counts = Counter(verdict.status for verdict in verdicts)
        summary = ", ".join(f"{number} {status}" for status, number in counts.items())
        text += markdown_row(rule, verdicts[0].condition, summary)
    return with_section(card, "gate", text)
