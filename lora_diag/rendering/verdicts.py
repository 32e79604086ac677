"""Verdicts → text, a table, JUnit XML, and annotations and step summary of GitHub Actions.

Within a rule all show the failures first; JUnit XML keeps the rules in the order of the policy.
GitHub shows ten annotations of a kind per step, so nine rules get one and the tenth counts the
others; it drops a step summary above 1 MiB, so this one is truncated.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from typing import Any, TypeVar
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from rich.text import Text

from lora_diag.records import Results, RunInput
from lora_diag.records.names import module_type_of
from lora_diag.records.verdict import WORST_FIRST, Status, Verdict, outcome
from lora_diag.rendering.html import escape_markdown
from lora_diag.rendering.tables import Column, Grid
from lora_diag.rendering.text import crop, number, quantity, safe, short

# Maximum numbers of annotations of a kind, of layers in one line, and of layers in the details of a
# JUnit case.
ANNOTATIONS, WORST, NAMED = 9, 3, 50
SUMMARY_BYTES = 900 * 1024

Key = TypeVar("Key")


def group_by(
    verdicts: Iterable[Verdict], key: Callable[[Verdict], Key]
) -> dict[Key, list[Verdict]]:
    """Return verdicts by a key, in the order of first occurrence."""
    groups: dict[Key, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(key(verdict), []).append(verdict)
    return groups


def by_rule(results: Results[Any]) -> dict[str, list[Verdict]]:
    """Return the verdicts of each rule, the worst first, in the order of the policy."""
    groups = group_by(results.whole_of(Verdict), lambda verdict: verdict.rule)
    return {rule: sorted(of_rule, key=_rank_severity) for rule, of_rule in groups.items()}


def verdicts_of(results: Results[Any]) -> list[Verdict]:
    """Return the verdicts of a run of ``gate``, the worst first, grouped by rule."""
    verdicts = chain.from_iterable(by_rule(results).values())
    return sorted(verdicts, key=lambda verdict: _rank_severity(verdict)[:2])


def _rank_severity(verdict: Verdict) -> tuple[int, bool, float]:
    """Return a sort key of verdicts: worst status first, then largest value for an upper limit,
    else smallest.
    """
    value = verdict.measured if isinstance(verdict.measured, float) else 0.0
    if "<" in verdict.allowed:
        value = -value
    return WORST_FIRST.index(verdict.status), not verdict.blocks, value


def by_status(results: Results[Any]) -> dict[tuple[Status, str], list[Verdict]]:
    """Return the verdicts of each status and rule, the worst first."""
    return group_by(verdicts_of(results), lambda verdict: (verdict.status, verdict.rule))


def format_measured(verdict: Verdict) -> str:
    """Return the measured value as text, never rounded across the limit; a dash without one."""
    if verdict.measured is None:
        return "-"
    if isinstance(verdict.measured, str):
        return safe(verdict.measured)
    value, limit, brief = verdict.measured, verdict.limit, number(verdict.measured)
    if limit is None or _compare(float(brief), limit) == _compare(value, limit):
        return brief
    return f"{value:.9g}"


def _compare(value: float, limit: float) -> int:
    """Return 1 above a limit, −1 below and 0 at it."""
    return (value > limit) - (value < limit)


def subject_name(verdict: Verdict, name: Callable[[str], str] = short) -> str:
    """Return the layer, by ``name``, and group that a verdict is on; ``all layers`` for the whole
    run without one.
    """
    if verdict.layer is None:
        return safe(verdict.group) or "all layers"
    layer = name(verdict.layer)
    return safe(f"{layer} ({verdict.group})" if verdict.group else layer)


def headline(results: Results[Any]) -> str:
    """Return the outcome and its basis in one sentence, with the metric if it is not that of the
    weights.
    """
    result = outcome(results.whole)
    status = "warned" if result == "passed" else result
    basis = [verdict for verdict in results.whole_of(Verdict) if verdict.status == status]
    if status != "warned":
        basis = [verdict for verdict in basis if verdict.blocks]
    if basis:
        text = f"{_HEADS[result]}: {quantity(len({verdict.rule for verdict in basis}), 'rule')}"
        layers = {verdict.layer for verdict in basis} - {None}
        if layers:
            text += f" on {quantity(len(layers), 'layer')}"
    else:
        text = "PASSED" if result == "passed" else "INCONCLUSIVE: nothing was judged"
    metric = results.run.settings.get("metric")
    return f"{text} (spectra in {safe(str(metric))})" if metric else text


_HEADS = {
    "failed": "FAILED",
    "inconclusive": "INCONCLUSIVE (not a pass)",
    "passed": "PASSED, with warnings",
}


def describe_reasons(verdicts: Sequence[Verdict]) -> str:
    """Return the first message of one rule's verdicts, else what it allows, and the number of other
    messages.
    """
    messages = list(dict.fromkeys(verdict.message for verdict in verdicts if verdict.message))
    if not messages:
        return f"allowed is {safe(verdicts[0].allowed)}"
    first, *others = messages
    suffix = f" (and {quantity(len(others), 'other reason')})" if others else ""
    return f"{safe(first)}{suffix}"


def describe_verdicts(verdicts: Sequence[Verdict]) -> str:
    """Return the worst of a rule's verdicts, the number of others, the condition and the fix, in
    one line.
    """
    suffix = f"; and {len(verdicts) - WORST} more" if len(verdicts) > WORST else ""
    description = describe_reasons(verdicts) if verdicts[0].message else ""
    values = "; ".join(map(_name_value, verdicts[:WORST]))
    return f"{values}{suffix}. Allowed: {safe(verdicts[0].allowed)}. {description}".rstrip()


def _name_value(verdict: Verdict) -> str:
    """Return the subject, the status and the measured value of a verdict."""
    return f"{subject_name(verdict)}: {verdict.status}, measured {format_measured(verdict)}"


def weights_of(results: Results[Any]) -> list[RunInput]:
    """Return the checkpoints and adapters of a gate's results that have a fingerprint."""
    return [run_input for run_input in results.run.inputs if run_input.fingerprint]


def verdict_grid(shown: Sequence[Verdict], width: int) -> Grid:
    """Return the table of some verdicts for a page of a width; the condition of a rule is shown
    once.
    """
    groups = [crop(safe(verdict.group), width // 4) for verdict in shown]
    is_whole = all(verdict.layer is None for verdict in shown) and any(groups)
    names = []
    conditions = []
    before = None
    for verdict, group in zip(shown, groups, strict=True):
        name = short(verdict.layer) if verdict.layer else ""
        if is_whole:
            name = group
        names.append(name or "all layers")
        condition = (verdict.rule, verdict.allowed)
        allowed = "" if condition == before else safe(verdict.allowed)
        conditions.append(Text(textwrap.fill(allowed, max(8, width // 4))))
        before = condition
    statuses = [Text(verdict.status, style=verdict.display.style) for verdict in shown]
    rules = [crop(safe(verdict.rule), max(8, width // 5)) for verdict in shown]
    columns = (
        Column("status", tuple(statuses), "left"),
        Column("rule", tuple(rules), "left"),
        Column("record", () if is_whole else tuple(groups), "left", drop=1),
        Column("measured", tuple(map(format_measured, shown))),
        Column("allowed", tuple(conditions), "left"),
    )
    kept = tuple(column for column in columns if any(map(str, column.cells)))
    return Grid("", "record" if is_whole else "layer", tuple(names), kept)


def junit(results: Results[Any]) -> str:
    """Return a JUnit report of a run of ``gate``: one case for each rule, module type and group of
    records.
    """
    metric = results.run.settings.get("metric")
    name = f"loradiag {results.run.command}"
    if metric:
        name += f", spectra in {metric}"
    root = Element("testsuites", name=safe(name))
    weights = weights_of(results)
    if weights:
        properties = SubElement(root, "properties")
        for item in weights:
            path = safe(f"{item.role} {item.path}")
            SubElement(properties, "property", name=path, value=item.fingerprint)
    for rule, of_rule in by_rule(results).items():
        suite = SubElement(root, "testsuite", name=safe(rule))
        subjects = group_by(of_rule, lambda verdict: subject_name(verdict, module_type_of))
        for name, verdicts in subjects.items():
            kind = safe(f"loradiag.{rule}")
            case = SubElement(suite, "testcase", classname=kind, name=name, time="0")
            _set_result(case, verdicts)
        _set_counts(suite)
    _set_counts(root)
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _set_result(case: Element, verdicts: Sequence[Verdict]) -> None:
    """Set the result of a case: its worst verdict; a case in which a layer passed is
    not skipped.
    """
    tag = verdicts[0].display.element
    if tag == "skipped" and verdicts[-1].status == "passed":
        tag = ""
    if tag:
        listed = [verdict for verdict in verdicts if verdict.display.element == tag]
        status = listed[0].status
        result = SubElement(case, tag, type=status, message=describe_verdicts(listed))
    else:
        listed = [verdict for verdict in verdicts if verdict.status != "passed"]
        if not listed:
            return
        result = SubElement(case, "system-out")
    lines = []
    for verdict in listed[:NAMED]:
        reason = f"allowed {safe(verdict.allowed)}. {safe(verdict.message)}"
        lines.append(f"{_name_value(verdict)}, {reason}".strip())
    if len(listed) > NAMED:
        lines.append(f"and {len(listed) - NAMED} more")
    result.text = "\n".join(lines)


def _set_counts(element: Element) -> None:
    """Set the numbers of tests and of each result of a suite."""
    tags = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    for name, tag in tags.items():
        element.set(name, str(len(list(element.iter(tag)))))


def workflow_commands(results: Results[Any]) -> list[str]:
    """Return annotations: at each level, one for each of the first rules, on its line, and one for
    all others.
    """
    inputs = results.run.inputs
    policy = next((item.path for item in inputs if item.role in {"policy", "config"}), None)
    name = f"loradiag {results.run.command}"
    lines = []
    for level in ("error", "warning"):
        shown = [verdict for verdict in verdicts_of(results) if verdict.display.annotation == level]
        rules = group_by(shown, lambda verdict: verdict.rule)
        for rule, verdicts in list(rules.items())[:ANNOTATIONS]:
            line = verdicts[0].line
            where = f"file={_escape_property(policy)},line={line}," if line and policy else ""
            title = _escape_property(f"{name}: {rule}")
            text = _escape_data(describe_verdicts(verdicts))
            lines.append(f"::{level} {where}title={title}::{text}")
        if len(rules) > ANNOTATIONS:
            text = f"{len(rules) - ANNOTATIONS} more rules, see the step summary"
            lines.append(f"::{level} title={name}::{text}")
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
    head = f"## loradiag {results.run.command}: {escape_markdown(headline(results))}\n\n"
    lines = []
    for (status, rule), verdicts in by_status(results).items():
        if status in WORST_FIRST[:4]:
            reasons = escape_markdown(describe_reasons(verdicts))
            lines.append(f"- **{escape_markdown(rule)}** {status}: {reasons}\n")
    lines.append(
        "\n| status | rule | layer | measured | allowed |\n| --- | --- | --- | ---: | --- |\n"
    )
    for verdict in verdicts_of(results):
        name, measured = subject_name(verdict), format_measured(verdict)
        row = markdown_row(verdict.status, verdict.rule, name, measured, verdict.allowed)
        lines.append(row)
    end = "\n{} more are in the verdict records (`-o FILE`).\n"
    room_left = room - len((head + end).encode()) - 20
    fitting = sum(size <= room_left for size in accumulate(len(line.encode()) for line in lines))
    text = head + "".join(lines[:fitting])
    if fitting < len(lines):
        text += end.format(len(lines) - fitting)
    return text


def markdown_row(*cells: str) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(escape_markdown, cells))} |\n"
