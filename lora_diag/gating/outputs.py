"""Verdicts → JUnit XML, annotations and step summary of GitHub Actions, and a block of a model card.

GitHub shows ten annotations of a kind per step, so nine rules get one and the tenth counts the others; it drops a step
summary above 1 MiB, so this one is truncated.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from lora_diag.gating.record import Status, Verdict
from lora_diag.gating.show import (
    by_rule,
    format_measured,
    headline,
    shared_description,
    subject_name,
    verdicts_of,
)
from lora_diag.records import Results, RunInput
from lora_diag.records.names import module_type_of
from lora_diag.rendering.html import with_section
from lora_diag.rendering.text import safe

# Maximum numbers of annotations of a kind, of layers in one line, and of layers in the details of a JUnit case.
ANNOTATIONS, WORST, NAMED = 9, 3, 50
SUMMARY_BYTES = 900 * 1024

# Status → annotation on GitHub and element of a JUnit case. No server counts a JUnit error as a pass.
_SHOWN_AS: dict[Status, tuple[str, str]] = {
    "failed": ("error", "failure"),
    "inconclusive": ("error", "error"),
    "warned": ("warning", ""),
    "waived": ("", "skipped"),
    "not judged": ("", "skipped"),
    "passed": ("", ""),
}


def _get_display(verdict: Verdict) -> tuple[str, str]:
    """Return annotation and element of a verdict; one that is inconclusive and does not block is a warning."""
    return _SHOWN_AS[verdict.status if verdict.blocks or verdict.status != "inconclusive" else "warned"]


def _group(verdicts: Iterable[Verdict], key: Callable[[Verdict], str]) -> dict[str, list[Verdict]]:
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(key(verdict), []).append(verdict)
    return groups


def _group_by_rule(results: Results[Any]) -> dict[str, list[Verdict]]:
    """Return the verdicts of each rule, the worst first, in the order of the policy."""
    groups = _group(verdicts_of(results), lambda verdict: verdict.rule)
    return {rule: groups[rule] for rule in dict.fromkeys(verdict.rule for verdict in results.whole_of(Verdict))}


def _describe(verdicts: Sequence[Verdict]) -> str:
    """Return the worst of a rule's verdicts, the number of others, the condition and the fix, in one line."""
    suffix = f"; and {len(verdicts) - WORST} more" if len(verdicts) > WORST else ""
    description = shared_description(verdicts) if verdicts[0].message else ""
    values = "; ".join(map(_name_value, verdicts[:WORST]))
    return f"{values}{suffix}. Allowed: {safe(verdicts[0].allowed)}. {description}".rstrip()


def _name_value(verdict: Verdict) -> str:
    return f"{subject_name(verdict)}: {verdict.status}, measured {format_measured(verdict)}"


def _weights_of(results: Results[Any]) -> list[RunInput]:
    """Return the checkpoints and adapters of a gate's results."""
    return [run_input for run_input in results.run.inputs if run_input.fingerprint]


def junit(results: Results[Any]) -> str:
    """Return a JUnit report of a run of ``gate``: one case for each rule and module type."""
    metric = results.run.settings.get("metric")
    root = Element("testsuites", name=safe(f"loradiag gate{f', spectra in {metric}' if metric else ''}"))
    if weights := _weights_of(results):
        properties = SubElement(root, "properties")
        for item in weights:
            SubElement(properties, "property", name=safe(f"{item.role} {item.path}"), value=item.fingerprint)
    for rule, of_rule in _group_by_rule(results).items():
        suite = SubElement(root, "testsuite", name=safe(rule))
        for name, verdicts in _group(of_rule, _name_case).items():
            case = SubElement(suite, "testcase", classname=safe(f"loradiag.{rule}"), name=safe(name), time="0")
            _set_result(case, verdicts)
        _set_counts(suite)
    _set_counts(root)
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _name_case(verdict: Verdict) -> str:
    kind = module_type_of(verdict.layer) if verdict.layer is not None else "all layers"
    return f"{kind} ({verdict.group})" if verdict.group else kind


def _set_result(case: Element, verdicts: Sequence[Verdict]) -> None:
    """Set the result of a case: its worst verdict; a case in which a layer passed is not skipped."""
    tag = _get_display(verdicts[0])[1]
    if tag == "skipped" and verdicts[-1].status == "passed":
        tag = ""
    if listed := [v for v in verdicts if (_get_display(v)[1] == tag if tag else v.status != "passed")]:
        result = SubElement(case, tag or "system-out")
        if tag:
            result.attrib.update(type=listed[0].status, message=_describe(listed))
        lines = [f"{_name_value(v)}, allowed {safe(v.allowed)}. {safe(v.message)}".strip() for v in listed[:NAMED]]
        result.text = "\n".join([*lines, *([f"and {len(listed) - NAMED} more"] if len(listed) > NAMED else [])])


def _set_counts(element: Element) -> None:
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        element.set(name, str(sum(1 for _ in element.iter(tag))))


def workflow_commands(results: Results[Any]) -> list[str]:
    """Return workflow commands: one annotation for each of the first rules, on its line, and one for all others."""
    policy = next((run_input.path for run_input in results.run.inputs if run_input.role == "policy"), None)
    lines = []
    for level in ("error", "warning"):
        rules = _group([v for v in verdicts_of(results) if _get_display(v)[0] == level], lambda verdict: verdict.rule)
        for rule, verdicts in list(rules.items())[:ANNOTATIONS]:
            line = verdicts[0].line
            where = f"file={_escape_property(policy)},line={line}," if line and policy else ""
            title = _escape_property(f"loradiag gate: {rule}")
            lines.append(f"::{level} {where}title={title}::{_escape_data(_describe(verdicts))}")
        if len(rules) > ANNOTATIONS:
            lines.append(f"::{level} title=loradiag gate::{len(rules) - ANNOTATIONS} more rules, see the step summary")
    return lines


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
    lines.append("\n| status | rule | layer | measured | allowed |\n| --- | --- | --- | ---: | --- |\n")
    lines += [_row(v.status, v.rule, subject_name(v), format_measured(v), v.allowed) for v in verdicts_of(results)]
    end = "\n{} more are in the verdict records (`-o FILE`).\n"
    room_left = room - len((head + end).encode()) - 20
    kept_lines = []
    for line in lines:
        room_left -= len(line.encode())
        if room_left < 0:
            break
        kept_lines.append(line)
    omitted_count = len(lines) - len(kept_lines)
    return head + "".join(kept_lines) + (end.format(omitted_count) if omitted_count else "")


def model_card(results: Results[Any], card: str = "") -> str:
    """Return a model card with the result of a gate.

    Args:
        results: A run of ``gate``.
        card: The existing card; the block replaces an earlier one, or is appended. Line endings are kept.
    """
    policy = results.run.inputs[0]
    lines = [
        "## Checks before release",
        "",
        f"`loradiag gate` {results.run.version}, {results.run.settings['today']}: {cell(headline(results))}",
        f"(policy {cell(policy.path)}: {cell(policy.kind)}).",
    ]
    for item in _weights_of(results):
        notes = cell(", ".join(item.notes))
        lines.append(f"Measured: {item.role} {cell(item.path)}, fingerprint `{item.fingerprint}`, {notes}.")
    text = "\n".join([*lines, "", "| rule | allowed | outcome |", "| --- | --- | --- |\n"])
    for rule, verdicts in _group_by_rule(results).items():
        counts = Counter(verdict.status for verdict in verdicts)
        summary = ", ".join(f"{number} {status}" for status, number in counts.items())
        text += _row(rule, verdicts[0].condition, summary)
    return with_section(card, "gate", text)


def _row(*cells: str) -> str:
    return f"| {' | '.join(map(cell, cells))} |\n"


def cell(text: str) -> str:
    r"""Return text with all Markdown and HTML escaped.

    >>> cell("a|b<i>"), cell("model.layers.0.mlp.up_proj")
    ('a&#124;b&#60;i&#62;', 'model.layers.0.mlp.up_proj')
    """
    return re.sub(r"[&<>|`*~\[\]\\@#!$^{}]|:(?=//)", lambda match: f"&#{ord(match[0])};", safe(text))
