"""Terminal output of ``gate``, failures first; and texts shared by all its reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_diag.gating.record import WORST_FIRST, Verdict, outcome
from lora_diag.records import Results, RunInput
from lora_diag.rendering.statements import Statement, make_statement, summary_of
from lora_diag.rendering.tables import shorten_names
from lora_diag.rendering.text import crop, number, safe, short, to_text

# Maximum number of rows of verdicts, and of rows of one rule if several have rows; --output has all.
ROWS, ROWS_OF_A_RULE = 20, 6

_STYLE = {"failed": "bold red", "inconclusive": "bold yellow", "warned": "yellow"}


def verdicts_of(results: Results[Any]) -> list[Verdict]:
    """Return the verdicts of a run of ``gate``, the worst first, grouped by rule."""
    verdicts = results.whole_of(Verdict)
    places = {rule: i for i, rule in enumerate(dict.fromkeys(verdict.rule for verdict in verdicts))}
    return sorted(
        verdicts,
        key=lambda v: (WORST_FIRST.index(v.status), not v.blocks, places[v.rule], _distance_from_limit(v)),
    )


def _distance_from_limit(verdict: Verdict) -> float:
    """Return a sort key of the verdicts of one rule: the largest value first for an upper limit."""
    if not isinstance(verdict.measured, float):
        return 0.0
    return -verdict.measured if "<" in verdict.allowed else verdict.measured


def format_measured(verdict: Verdict) -> str:
    """Return the measured value as text, never rounded across the limit."""
    if verdict.measured is None:
        return "-"
    if isinstance(verdict.measured, str):
        return safe(verdict.measured)
    brief, value, limit = number(verdict.measured), verdict.measured, verdict.limit
    return (
        brief
        if limit is None or _side_of_limit(float(brief), limit) == _side_of_limit(value, limit)
        else f"{value:.9g}"
    )


def _side_of_limit(value: float, limit: float) -> int:
    return (value > limit) - (value < limit)


def subject_name(verdict: Verdict) -> str:
    """Return the subject of a verdict."""
    if verdict.rule == "inputs" and verdict.group:
        return safe(verdict.group)
    group = f" ({safe(verdict.group)})" if verdict.group else ""
    return (short(verdict.layer) if verdict.layer is not None else "all layers") + group


def headline(results: Results[Any]) -> str:
    """Return the outcome and its basis in one sentence, with the metric if it is not that of the weights."""
    metric = results.run.settings.get("metric")
    return _make_headline(results) + (f" (spectra in {safe(str(metric))})" if metric else "")


def _make_headline(results: Results[Any]) -> str:
    verdicts = verdicts_of(results)
    result = outcome(verdicts)
    if result == "failed":
        failed = [verdict for verdict in verdicts if verdict.status == "failed"]
        return f"FAILED: {_count_rules_and_layers(failed)}"
    if result == "inconclusive":
        unknown = [verdict for verdict in verdicts if verdict.status == "inconclusive" and verdict.blocks]
        return (
            f"INCONCLUSIVE (not a pass): {_count_rules_and_layers(unknown)}"
            if unknown
            else "INCONCLUSIVE: nothing was judged"
        )
    warned = [verdict for verdict in verdicts if verdict.status == "warned"]
    return f"PASSED{f', with warnings: {_count_rules_and_layers(warned)}' if warned else ''}"


def _count_rules_and_layers(verdicts: Sequence[Verdict]) -> str:
    rules = {verdict.rule for verdict in verdicts}
    layers = {verdict.layer for verdict in verdicts if verdict.layer is not None}
    on = f" on {len(layers)} {'layer' if len(layers) == 1 else 'layers'}" if layers else ""
    return f"{len(rules)} {'rule' if len(rules) == 1 else 'rules'}{on}"


def shared_description(verdicts: Sequence[Verdict]) -> str:
    """Return the first message of verdicts of one rule, else what is allowed, and the number of other messages."""
    messages = list(dict.fromkeys(verdict.message for verdict in verdicts if verdict.message))
    others = len(messages) - 1
    suffix = f" (and {others} other {'reason' if others == 1 else 'reasons'})" if others > 0 else ""
    return (safe(messages[0]) if messages else f"allowed is {safe(verdicts[0].allowed)}") + suffix


def reason(results: Results[Any]) -> str:
    """Return the outcome with its worst verdict, in one line."""
    blocking = [verdict for verdict in verdicts_of(results) if verdict.blocks]
    if not blocking:
        return headline(results)
    worst = blocking[0]
    of_layer = f"{safe(worst.layer)}: " if worst.layer is not None else ""
    value = f"measured {format_measured(worst)}, allowed {safe(worst.allowed)}"
    text = f"; {safe(worst.message)}" if worst.message else ""
    return f"{headline(results)}: {safe(worst.rule)}: {of_layer}{value}{text}"


def by_rule(results: Results[Any], *statuses: str) -> list[tuple[str, list[Verdict]]]:
    """Return the verdicts with given statuses, rule by rule."""
    selected = [verdict for verdict in verdicts_of(results) if verdict.status in statuses]
    return [(rule, list(group)) for rule, group in groupby(selected, key=lambda verdict: verdict.rule)]


def verdict_table(
    results: Results[Any], width: int = 80, color: bool = False, per: str = "type", next_command: str | None = None
) -> str:
    """Return the result of a gate: its failures, then a summary.

    Args:
        results: A run of ``gate``.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: Not used: failures are always listed by layer.
        next_command: The suggested next command, printed last.
    """
    bad = [verdict for verdict in verdicts_of(results) if verdict.status in _STYLE]
    shown = _choose_rows(bad)
    summary = summary_of(_make_statements(results, shown, bad), next_command)
    return to_text(Group(_make_table(shown, width), summary) if shown else summary, width, color)


def _choose_rows(bad: Sequence[Verdict]) -> list[Verdict]:
    """Choose the rows: the worst of each rule, so that one rule with many failures does not hide others."""
    many_rules = len({verdict.rule for verdict in bad}) > 1
    max_rows = ROWS_OF_A_RULE if many_rules else ROWS
    seen: Counter[tuple[str, str]] = Counter()
    chosen = []
    for verdict in bad:
        seen[verdict.rule, verdict.status] += 1
        if seen[verdict.rule, verdict.status] <= max_rows:
            chosen.append(verdict)
    return chosen[:ROWS]


def _make_table(shown: Sequence[Verdict], width: int) -> Table:
    groups = {verdict.group for verdict in shown if verdict.layer is not None}
    names = [_name_layer(verdict, len(groups) > 1) for verdict in shown]
    rule_width = min(max(8, width // 5), max(len(verdict.rule) for verdict in shown))
    value_width = max(len("measured"), *(len(format_measured(verdict)) for verdict in shown))
    allowed_width = min(max(len(verdict.allowed) for verdict in shown), width // 4)
    status_width = max(len(verdict.status) for verdict in shown)
    layer_width = max(
        12, min(max(map(len, names)), width - status_width - rule_width - value_width - allowed_width - 6)
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, header_style="bold")
    table.add_column("status", no_wrap=True)
    table.add_column("rule", no_wrap=True, width=max(rule_width, len("rule")))
    table.add_column("layer", no_wrap=True, width=layer_width)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("allowed", overflow="fold", width=allowed_width)
    previous = ("", "")
    for verdict, name in zip(shown, shorten_names(names, layer_width), strict=True):
        status = Text(verdict.status, style=_STYLE[verdict.status])
        # The condition of a rule is shown once.
        condition = Text("" if previous == (verdict.rule, verdict.allowed) else safe(verdict.allowed))
        table.add_row(status, crop(safe(verdict.rule), rule_width), name, format_measured(verdict), condition)
        previous = (verdict.rule, verdict.allowed)
    return table


def _name_layer(verdict: Verdict, with_group: bool) -> str:
    """Return a row's layer, and its group if that varies between rows; the end of a name is kept."""
    if verdict.layer is None:
        return subject_name(verdict)
    return f"{safe(verdict.group)}: {short(verdict.layer)}" if with_group and verdict.group else short(verdict.layer)


def _make_statements(results: Results[Any], shown: Sequence[Verdict], bad: Sequence[Verdict]) -> list[Statement]:
    lines = []
    if len(shown) < len(bad):
        lines.append(make_statement("shown", "Shown", f"{len(shown)} of {len(bad)}; -o FILE keeps them all"))
    groups = {verdict.group for verdict in shown if verdict.layer is not None}
    if len(groups) == 1 and "" not in groups:
        lines.append(make_statement("about", "Group", safe(groups.pop())))
    passed = outcome(verdicts_of(results)) == "passed"
    lines.append(make_statement("outcome", "Gate", headline(results), level="ok" if passed else "failure"))
    for label, status in (
        ("Failed", "failed"),
        ("Inconclusive", "inconclusive"),
        ("Warnings", "warned"),
        ("Waived", "waived"),
    ):
        sentences = [
            f"{_name_rule(rule, of_rule)}: {shared_description(of_rule)}" for rule, of_rule in by_rule(results, status)
        ]
        if sentences:
            lines.append(make_statement(status, label, *sentences))
    if skipped := by_rule(results, "not judged"):
        of_policy = [
            f"{_name_rule(rule, of_rule)}: {shared_description(of_rule)}"
            for rule, of_rule in skipped
            if of_rule[0].line
        ]
        idle = [(rule, of_rule) for rule, of_rule in skipped if not of_rule[0].line]
        not_applied = (
            [f"built-in checks {', '.join(rule for rule, _ in idle)}: {shared_description(idle[0][1])}"] if idle else []
        )
        lines.append(make_statement("not_judged", "Not judged", *of_policy, *not_applied))
    return [
        *lines,
        make_statement("passed", "Passed", _describe_passed(results)),
        make_statement("judged", "Inputs", *_describe_inputs(results)),
    ]


def _name_rule(rule: str, of_rule: Sequence[Verdict]) -> str:
    layers = {verdict.layer for verdict in of_rule if verdict.layer is not None}
    line = f" (line {of_rule[0].line})" if of_rule[0].line else ""
    return f"{safe(rule)}{line}" + (f", {len(layers)} {'layer' if len(layers) == 1 else 'layers'}" if layers else "")


def _describe_passed(results: Results[Any]) -> str:
    bad = {rule for rule, _ in by_rule(results, "failed", "inconclusive", "warned")}
    passed = [(rule, of_rule) for rule, of_rule in by_rule(results, "passed") if rule not in bad]
    of_policy = [_name_rule(rule, of_rule) for rule, of_rule in passed if of_rule[0].line]
    built_in = [rule for rule, of_rule in passed if not of_rule[0].line]
    parts = [*of_policy, *([f"built-in checks {', '.join(built_in)}"] if built_in else [])]
    return "; ".join(parts) or "nothing"


def _describe_inputs(results: Results[Any]) -> list[str]:
    longest = max(len(run_input.role) for run_input in results.run.inputs)
    return [
        f"{run_input.role:<{longest}} {safe(run_input.path)} ({_describe_input(run_input)})"
        for run_input in results.run.inputs
    ]


def _describe_input(run_input: RunInput) -> str:
    """Return the description of one input of a gate: layers of results, or the fingerprint of weights."""
    of_results = run_input.role in {"results", "baseline"}
    layers = [f"{run_input.tensors} layers"] if of_results and run_input.tensors else []
    fingerprint = [f"fingerprint {run_input.fingerprint}"] if run_input.fingerprint else []
    return safe(", ".join([run_input.kind, *layers, *fingerprint, *run_input.notes]))
