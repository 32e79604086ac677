"""Verdicts → the terminal, JUnit XML, annotations and step summary of GitHub Actions, and a block of a model card.

Within a rule all show the failures first; JUnit XML and the model card keep the rules in the order of the policy.
GitHub shows ten annotations of a kind per step, so nine rules get one and the tenth counts the others; it drops a step
summary above 1 MiB, so this one is truncated.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_diag.gating.record import STATUSES, WORST_FIRST, Verdict, outcome
from lora_diag.records import Results, RunInput
from lora_diag.records.names import module_type_of
from lora_diag.rendering.html import with_section
from lora_diag.rendering.statements import Statement, make_statement, summary_of
from lora_diag.rendering.tables import shorten_names
from lora_diag.rendering.text import crop, number, quantity, safe, short, to_text

# Maximum number of rows of verdicts, and of rows of one rule if several have rows; --output has all.
ROWS, ROWS_OF_A_RULE = 20, 6

# Maximum numbers of annotations of a kind, of layers in one line, and of layers in the details of a JUnit case.
ANNOTATIONS, WORST, NAMED = 9, 3, 50
SUMMARY_BYTES = 900 * 1024


def verdicts_of(results: Results[Any]) -> list[Verdict]:
    """Return the verdicts of a run of ``gate``, the worst first, grouped by rule."""
    verdicts = results.whole_of(Verdict)
    places = {rule: i for i, rule in enumerate(dict.fromkeys(verdict.rule for verdict in verdicts))}
    return sorted(
        verdicts,
        key=lambda v: (WORST_FIRST.index(v.status), not v.blocks, places[v.rule], _order_by_value(v)),
    )


def _order_by_value(verdict: Verdict) -> float:
    """Return a sort key of the verdicts of one rule: the largest value first for an upper limit, else the smallest."""
    if not isinstance(verdict.measured, float):
        return 0.0
    return -verdict.measured if "<" in verdict.allowed else verdict.measured


def format_measured(verdict: Verdict) -> str:
    """Return the measured value as text, never rounded across the limit; a dash without one."""
    if verdict.measured is None:
        return "-"
    if isinstance(verdict.measured, str):
        return safe(verdict.measured)
    value, limit, brief = verdict.measured, verdict.limit, number(verdict.measured)
    signs = [limit is not None and (shown > limit) - (shown < limit) for shown in (float(brief), value)]
    return brief if signs[0] == signs[1] else f"{value:.9g}"


def subject_name(verdict: Verdict) -> str:
    """Return the input, or the layer and group, that a verdict is on; ``all layers`` for the whole run."""
    if verdict.rule == "inputs" and verdict.group:
        return safe(verdict.group)
    group = f" ({safe(verdict.group)})" if verdict.group else ""
    return (short(verdict.layer) if verdict.layer is not None else "all layers") + group


def headline(results: Results[Any]) -> str:
    """Return the outcome and its basis in one sentence, with the metric if it is not that of the weights."""
    result = outcome(results.whole)
    status = "warned" if result == "passed" else result
    basis = [v for v in results.whole_of(Verdict) if v.status == status and (v.blocks or status == "warned")]
    layers = {verdict.layer for verdict in basis if verdict.layer is not None}
    on_layers = f" on {quantity(len(layers), 'layer')}" if layers else ""
    count = quantity(len({verdict.rule for verdict in basis}), "rule") + on_layers
    text = {
        "failed": f"FAILED: {count}",
        "inconclusive": f"INCONCLUSIVE (not a pass): {count}" if basis else "INCONCLUSIVE: nothing was judged",
        "passed": f"PASSED, with warnings: {count}" if basis else "PASSED",
    }[result]
    metric = results.run.settings.get("metric")
    return text + (f" (spectra in {safe(str(metric))})" if metric else "")


def describe_reasons(verdicts: Sequence[Verdict]) -> str:
    """Return the first message of one rule's verdicts, else what it allows, and the number of other messages."""
    messages = list(dict.fromkeys(verdict.message for verdict in verdicts if verdict.message))
    suffix = f" (and {quantity(len(messages) - 1, 'other reason')})" if len(messages) > 1 else ""
    return (safe(messages[0]) if messages else f"allowed is {safe(verdicts[0].allowed)}") + suffix


def reason(results: Results[Any]) -> str:
    """Return the outcome, with the worst verdict that blocks it if there is one, in one line."""
    worst = next((verdict for verdict in verdicts_of(results) if verdict.blocks), None)
    if worst is None:
        return headline(results)
    of_layer = f"{safe(worst.layer)}: " if worst.layer is not None else ""
    value = f"measured {format_measured(worst)}, allowed {safe(worst.allowed)}"
    text = f"; {safe(worst.message)}" if worst.message else ""
    return f"{headline(results)}: {safe(worst.rule)}: {of_layer}{value}{text}"


def by_rule(results: Results[Any], *statuses: str) -> list[tuple[str, list[Verdict]]]:
    """Return the verdicts with given statuses, rule by rule, the worst first."""
    return list(_group((v for v in verdicts_of(results) if v.status in statuses), lambda verdict: verdict.rule).items())


def _group(verdicts: Iterable[Verdict], key: Callable[[Verdict], str]) -> dict[str, list[Verdict]]:
    """Return verdicts by a key, in the order of first occurrence."""
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(key(verdict), []).append(verdict)
    return groups


def verdict_table(
    results: Results[Any], width: int = 80, color: bool = False, per: str = "type", next_command: str | None = None
) -> str:
    """Return the result of a gate for a terminal: verdicts that need attention, then a summary.

    Args:
        results: A run of ``gate``.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: Not used: verdicts are always listed by layer.
        next_command: The suggested next command, printed last; None without one.
    """
    bad = [verdict for verdict in verdicts_of(results) if STATUSES[verdict.status].style]
    shown = _choose_rows(bad)
    summary = summary_of(_make_statements(results, shown, bad), next_command)
    return to_text(Group(_make_table(shown, width), summary) if shown else summary, width, color)


def _choose_rows(bad: Sequence[Verdict]) -> list[Verdict]:
    """Choose the rows: the worst of each rule, so that one rule with many failures does not hide others."""
    rows = ROWS_OF_A_RULE if len({verdict.rule for verdict in bad}) > 1 else ROWS
    groups = _group(bad, lambda verdict: f"{verdict.status} {verdict.rule}").values()  # in the order of ``bad``
    return [verdict for group in groups for verdict in group[:rows]][:ROWS]


def _make_table(shown: Sequence[Verdict], width: int) -> Table:
    """Return the table of the chosen verdicts, within ``width`` columns of the terminal."""
    groups = {verdict.group for verdict in shown if verdict.layer is not None}
    names = [_name_layer(verdict, len(groups) > 1) for verdict in shown]
    values = ["measured", *map(format_measured, shown)]
    rule_width = min(max(8, width // 5), max(len(verdict.rule) for verdict in shown))
    allowed_width = min(max(len(verdict.allowed) for verdict in shown), width // 4)
    status_width = max(len(verdict.status) for verdict in shown)
    others = status_width + rule_width + max(map(len, values)) + allowed_width + 6
    layer_width = max(12, min(max(map(len, names)), width - others))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, header_style="bold")
    table.add_column("status", no_wrap=True)
    table.add_column("rule", no_wrap=True, width=max(rule_width, len("rule")))
    table.add_column("layer", no_wrap=True, width=layer_width)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("allowed", overflow="fold", width=allowed_width)
    previous = ("", "")
    for verdict, name, value in zip(shown, shorten_names(names, layer_width), values[1:], strict=True):
        status = Text(verdict.status, style=STATUSES[verdict.status].style)
        # The condition of a rule is shown once.
        condition = Text("" if previous == (verdict.rule, verdict.allowed) else safe(verdict.allowed))
        table.add_row(status, crop(safe(verdict.rule), rule_width), name, value, condition)
        previous = (verdict.rule, verdict.allowed)
    return table


def _name_layer(verdict: Verdict, with_group: bool) -> str:
    """Return the name of a row: its layer, after its group if ``with_group``."""
    if verdict.layer is None:
        return subject_name(verdict)
    return f"{safe(verdict.group)}: {short(verdict.layer)}" if with_group and verdict.group else short(verdict.layer)


def _make_statements(results: Results[Any], shown: Sequence[Verdict], bad: Sequence[Verdict]) -> list[Statement]:
    statements = []
    if len(shown) < len(bad):
        statements.append(make_statement("shown", "Shown", f"{len(shown)} of {len(bad)}; -o FILE keeps them all"))
    groups = {verdict.group for verdict in shown if verdict.layer is not None}
    if len(groups) == 1 and "" not in groups:
        statements.append(make_statement("about", "Group", safe(groups.pop())))
    passes = outcome(results.whole) == "passed"
    statements.append(make_statement("outcome", "Gate", headline(results), level="ok" if passes else "failure"))
    for status, display in STATUSES.items():
        rules = by_rule(results, status)
        # Built-in checks that do not apply for one reason share a line, and so do rules that pass.
        idle = [item for item in rules if status == "not judged" and not item[1][0].line]
        lines = [f"{_name_rule(*item)}: {describe_reasons(item[1])}" for item in rules if item not in idle]
        for why in dict.fromkeys(describe_reasons(of_rule) for _, of_rule in idle):
            together = ", ".join(rule for rule, of_rule in idle if describe_reasons(of_rule) == why)
            lines.append(f"checks {together}: {why}")
        if status != "passed" and lines:
            statements.append(make_statement(status.replace(" ", "_"), display.label, *lines))
    bad_rules = {verdict.rule for verdict in bad}
    passed = [item for item in by_rule(results, "passed") if item[0] not in bad_rules]
    names = [_name_rule(*item) for item in passed if item[1][0].line]
    if built_in := [rule for rule, of_rule in passed if not of_rule[0].line]:
        names.append(f"checks {', '.join(built_in)}")
    statements.append(make_statement("passed", STATUSES["passed"].label, "; ".join(names) or "nothing"))
    longest = max(len(item.role) for item in results.run.inputs)
    inputs = [f"{item.role:<{longest}} {safe(item.path)} ({_describe_input(item)})" for item in results.run.inputs]
    return [*statements, make_statement("judged", "Inputs", *inputs, priority=2)]


def _name_rule(rule: str, of_rule: Sequence[Verdict]) -> str:
    """Return the name of a rule, with its line in the policy and the number of layers of its verdicts."""
    layers = len({verdict.layer for verdict in of_rule if verdict.layer is not None})
    line = f" (line {of_rule[0].line})" if of_rule[0].line else ""
    return f"{safe(rule)}{line}" + (f", {quantity(layers, 'layer')}" if layers else "")


def _describe_input(item: RunInput) -> str:
    """Return the description of one input of a gate: layers of results, or the fingerprint of weights."""
    layers = [f"{item.tensors} layers"] if item.role in {"results", "baseline"} and item.tensors else []
    fingerprint = [f"fingerprint {item.fingerprint}"] if item.fingerprint else []
    return safe(", ".join([item.kind, *layers, *fingerprint, *item.notes]))


def _group_by_rule(results: Results[Any]) -> dict[str, list[Verdict]]:
    """Return the verdicts of each rule, the worst first, in the order of the policy."""
    groups = _group(verdicts_of(results), lambda verdict: verdict.rule)
    return {rule: groups[rule] for rule in dict.fromkeys(verdict.rule for verdict in results.whole_of(Verdict))}


def _describe(verdicts: Sequence[Verdict]) -> str:
    """Return the worst of a rule's verdicts, the number of others, the condition and the fix, in one line."""
    suffix = f"; and {len(verdicts) - WORST} more" if len(verdicts) > WORST else ""
    description = describe_reasons(verdicts) if verdicts[0].message else ""
    values = "; ".join(map(_name_value, verdicts[:WORST]))
    return f"{values}{suffix}. Allowed: {safe(verdicts[0].allowed)}. {description}".rstrip()


def _name_value(verdict: Verdict) -> str:
    """Return the subject, the status and the measured value of a verdict."""
    return f"{subject_name(verdict)}: {verdict.status}, measured {format_measured(verdict)}"


def _weights_of(results: Results[Any]) -> list[RunInput]:
    """Return the checkpoints and adapters of a gate's results that have a fingerprint."""
    return [run_input for run_input in results.run.inputs if run_input.fingerprint]


def junit(results: Results[Any]) -> str:
    """Return a JUnit report of a run of ``gate``: one case for each rule, module type and group of records."""
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
    tag = verdicts[0].display.element
    if tag == "skipped" and verdicts[-1].status == "passed":
        tag = ""
    if listed := [v for v in verdicts if (v.display.element == tag if tag else v.status != "passed")]:
        result = SubElement(case, tag or "system-out")
        if tag:
            result.attrib.update(type=listed[0].status, message=_describe(listed))
        lines = [f"{_name_value(v)}, allowed {safe(v.allowed)}. {safe(v.message)}".strip() for v in listed[:NAMED]]
        result.text = "\n".join([*lines, *([f"and {len(listed) - NAMED} more"] if len(listed) > NAMED else [])])


def _set_counts(element: Element) -> None:
    for name, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        element.set(name, str(sum(1 for _ in element.iter(tag))))


def workflow_commands(results: Results[Any]) -> list[str]:
    """Return annotations: at each level, one for each of the first rules, on its line, and one for all others."""
    policy = next((run_input.path for run_input in results.run.inputs if run_input.role == "policy"), None)
    lines = []
    for level in ("error", "warning"):
        rules = _group([v for v in verdicts_of(results) if v.display.annotation == level], lambda verdict: verdict.rule)
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
        f"- **{cell(rule)}** {status}: {cell(describe_reasons(verdicts))}\n"
        for status in WORST_FIRST[:4]
        for rule, verdicts in by_rule(results, status)
    ]
    lines.append("\n| status | rule | layer | measured | allowed |\n| --- | --- | --- | ---: | --- |\n")
    lines += [_row(v.status, v.rule, subject_name(v), format_measured(v), v.allowed) for v in verdicts_of(results)]
    end = "\n{} more are in the verdict records (`-o FILE`).\n"
    room_left = room - len((head + end).encode()) - 20
    fitting = sum(size <= room_left for size in accumulate(len(line.encode()) for line in lines))
    return head + "".join(lines[:fitting]) + (end.format(len(lines) - fitting) if fitting < len(lines) else "")


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
    r"""Return text with Markdown and HTML escaped, except underscores.

    >>> cell("a|b<i>"), cell("model.layers.0.mlp.up_proj")
    ('a&#124;b&#60;i&#62;', 'model.layers.0.mlp.up_proj')
    """
    return re.sub(r"[&<>|`*~\[\]\\@#!$^{}]|:(?=//)", lambda match: f"&#{ord(match[0])};", safe(text))
