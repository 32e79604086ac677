"""Verdicts → output for GitHub Actions: annotations on the policy's lines, and a step summary.

GitHub shows ten annotations of a kind per step, so nine rules get one and the tenth counts the others; it drops a step
summary above 1 MiB, so this one is truncated.
"""

from __future__ import annotations

import re
from typing import Any

from lora_diag.decisions.gate.record import Verdict
from lora_diag.decisions.gate.summary import (
    by_rule,
    headline,
    measured,
    policy_file,
    shared_description,
    subject_name,
    verdicts_of,
)
from lora_diag.records import Results
from lora_diag.rendering.text import safe

ANNOTATIONS = 9
# Maximum number of layers of a rule named in its annotation.
WORST = 3
SUMMARY_BYTES = 900 * 1024


def workflow_commands(results: Results[Any]) -> list[str]:
    """Return workflow commands: errors for failures and inconclusive verdicts, warnings for warnings."""
    all_verdicts = verdicts_of(results)
    policy = policy_file(results)
    errors = [verdict for verdict in all_verdicts if verdict.blocks]
    warnings = [v for v in all_verdicts if v.status in {"warned", "inconclusive"} and not v.blocks]
    lines = []
    for kind, verdicts in (("error", errors), ("warning", warnings)):
        rules: dict[str, list[Verdict]] = {}
        for verdict in verdicts:
            rules.setdefault(verdict.rule, []).append(verdict)
        lines += [_make_annotation(kind, of_rule, policy) for of_rule in list(rules.values())[:ANNOTATIONS]]
        if len(rules) > ANNOTATIONS:
            lines.append(f"::{kind} title=loradiag gate::{len(rules) - ANNOTATIONS} more rules, see the step summary")
    return lines


def _make_annotation(kind: str, verdicts: list[Verdict], policy: str | None) -> str:
    """Return the annotation of one rule: its worst layers, the number of others, and the fix."""
    worst = verdicts[0]
    where = f"file={_escape_property(policy)},line={worst.line}," if worst.line and policy else ""
    layers = [
        f"{subject_name(verdict)}: {verdict.status}, measured {measured(verdict)}" for verdict in verdicts[:WORST]
    ]
    suffix = f"; and {len(verdicts) - WORST} more" if len(verdicts) > WORST else ""
    description = shared_description(verdicts) if worst.message else ""
    text = f"{'; '.join(layers)}{suffix}. Allowed: {worst.allowed}. {description}".rstrip()
    return f"::{kind} {where}title={_escape_property(f'loradiag gate: {worst.rule}')}::{_escape_data(safe(text))}"


def _escape_data(text: str) -> str:
    r"""Escape the text of a workflow command (actions/toolkit, core/src/command.ts).

    >>> _escape_data("50%\n::error::x")
    '50%25%0A::error::x'
    """
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    """Escape a property of a workflow command.

    >>> _escape_property("a:b,c")
    'a%3Ab%2Cc'
    """
    return _escape_data(text).replace(":", "%3A").replace(",", "%2C")


def step_summary(results: Results[Any], room: int = SUMMARY_BYTES) -> str:
    """Return a step summary in Markdown of at most ``room`` bytes; omitted rows are counted."""
    head = f"## loradiag gate: {cell(headline(results))}\n\n"
    lines = [
        f"- **{cell(rule)}** {status}: {cell(shared_description(verdicts))}\n"
        for status in ("failed", "inconclusive", "warned", "waived")
        for rule, verdicts in by_rule(results, status)
    ]
    table = "\n| status | rule | layer | measured | allowed |\n| --- | --- | --- | ---: | --- |\n"
    rows = [_make_row(verdict) for verdict in verdicts_of(results)]
    end = "\n{} more are in the verdict records (`-o FILE`).\n"
    left = room - len((head + table + end).encode()) - 20
    kept = []
    for line in (*lines, table, *rows):
        left -= len(line.encode())
        if left < 0:
            break
        kept.append(line)
    cut = len(lines) + 1 + len(rows) - len(kept)
    return head + "".join(kept) + (end.format(cut) if cut else "")


def _make_row(verdict: Verdict) -> str:
    cells = (verdict.status, verdict.rule, subject_name(verdict), measured(verdict), verdict.allowed)
    return f"| {' | '.join(map(cell, cells))} |\n"


def cell(text: str) -> str:
    r"""Return text with all Markdown and HTML escaped.

    >>> cell("a|b<i>"), cell("model.layers.0.mlp.up_proj")
    ('a&#124;b&#60;i&#62;', 'model.layers.0.mlp.up_proj')
    """
    return re.sub(r"[&<>|`*~\[\]\\@#!$^{}]|:(?=//)", lambda match: f"&#{ord(match[0])};", safe(text))
