"""Statements: the content of a summary as data, read by terminal, HTML, Markdown and advice.

Includes the statements common to all summaries: inputs, skipped tensors, unmeasured layers,
unfinished runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from lora_diag.records import LeftOut, Results, Run
from lora_diag.records.names import short_names
from lora_diag.records.run import Reason
from lora_diag.records.vocabulary import NOISE_MARKS, ON_CPU, Hidden
from lora_diag.rendering.text import (
    list_counts,
    list_layers,
    list_names,
    number,
    percent,
    quantity,
    safe,
    short,
)

# Maximum number of unmeasured layers that are named.
NAMED = 5

# Reasons that every run or its options imply; their tensors are counted, not named.
EXPECTED = frozenset({"vector", "not_selected"})

REASONS = {
    "vector": "one-dimensional (norms, biases)",
    "only_in_base": "only in BASE",
    "only_in_tuned": "only in TUNED",
    "not_float": "not floating point",
    "shape_differs": "of another shape",
    "added_rows": "with rows only in TUNED",
    "removed_rows": "with rows only in BASE",
    "empty": "empty",
    "not_selected": "not selected",
    "non_finite": "not finite",
    "not_in_base": "not in BASE",
    "needs_base": "that need BASE",
    "only_in_adapter": "only in an adapter",
    "no_gradient": "without a gradient at some step",
    "no_reference": "without an update to take subspaces from",
    "rank_0": "of rank 0",
    "no_factors": "without a factored form",
    "saved": "saved in full",
    "unreadable": "unreadable",
    "not_in_model": "that the model does not use",
    "no_activations": "without activations",
    "memory": "larger than --memory",
    "time": "not reached within --time (--resume measures them)",
    "unrelated": "unrelated to BASE",
}


def subject(run: Run) -> str:
    """Return the path of the measured input: the last one that is not of activations; empty without
    one.
    """
    paths = [side.path for side in run.inputs if side.role != "activations"]
    return paths[-1] if paths else ""


def notes(run: Run) -> list[str]:
    """Return one line per note about an input, labelled by its role, or by its name if several have
    that role.
    """
    roles = Counter(side.role for side in run.inputs)
    names = short_paths([side.path for side in run.inputs])
    return [
        f"{side.role if roles[side.role] == 1 else name}: {safe(note)}"
        for side, name in zip(run.inputs, names, strict=True)
        for note in side.notes
    ]


def short_paths(paths: Sequence[str]) -> list[str]:
    """Return the last part of each path, or as many last parts as needed to distinguish them.

    >>> (
    ...     short_paths(["runs/a/lora_r4", "runs/b/lora_r8"]),
    ...     short_paths(["runs/a/lora", "runs/b/lora"]),
    ... )
    (['lora_r4', 'lora_r8'], ['a/lora', 'b/lora'])
    """
    short = short_names(paths, safe)
    return [short[path] for path in paths]


def qualify_fractions(left_out: Sequence[LeftOut]) -> str:
    """Return a qualification of fractions of the change if tensors were not selected or not
    measured; else empty.
    """
    if any(item.reason == "not_selected" and item.fro is None for item in left_out):
        return " among the selected tensors"
    unmeasured_reasons = {"shape_differs", "non_finite", "memory", "time", "unreadable"}
    if unmeasured_reasons.isdisjoint(item.reason for item in left_out):
        return ""
    return " among the measured layers"


# ``note`` is information, ``ok`` a passed check; the other levels need attention.
Level = Literal["ok", "note", "warning", "failure"]


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of a summary, with optional details under the same label.

    Args:
        key: Identifier for reports and tests.
        label: Its subject, as a term.
        lead: The statement.
        details: Further lines.
        level: Severity.
        answer: Answer to the question of a report that refers to the key; ``lead`` if empty.
        scoped: Whether the label gives the scope of the lines, such as one set; it is then repeated
            where lines are shown alone.
        priority: 0 for the decision, 1 for its evidence, 2 for what only ``-v`` shows.
    """

    key: str
    label: str
    lead: str
    details: tuple[str, ...] = ()
    level: Level = "note"
    answer: str = ""
    scoped: bool = False
    priority: int = 1

    @property
    def lines(self) -> tuple[str, ...]:
        """Lead and details."""
        return (self.lead, *self.details)

    @property
    def urgency(self) -> int:
        """Priority in a short summary: 0, as of a decision, for a warning or a failure."""
        return 0 if self.level in {"warning", "failure"} else self.priority

    @property
    def text(self) -> str:
        """All lines, joined by newlines."""
        return "\n".join(self.lines)

    @property
    def answered(self) -> tuple[str, tuple[str, ...]]:
        """The answer to a question, and the remaining lines.

        >>> make_statement(
        ...     "on", "On dev", "loss 2.0", "use r=4", answer="use r=4", scoped=True
        ... ).answered
        ('On dev: use r=4', ('loss 2.0',))
        >>> make_statement(
        ...     "on", "On dev", "loss 2.0", answer="yes: it is as good", scoped=True
        ... ).answered
        ('yes: it is as good', ('On dev: loss 2.0',))
        """
        answer = self.answer or self.lead
        if self.scoped and answer not in self.lines:
            return answer, self.labelled
        remaining = tuple(line for line in self.lines if line != answer)
        if self.scoped:
            answer = f"{self.label}: {answer}"
        return answer, remaining

    @property
    def labelled(self) -> tuple[str, ...]:
        """Lead and details, each with the label."""
        return tuple(f"{self.label}: {line}" for line in self.lines)


def make_statement(
    key: str,
    label: str,
    *lines: str,
    level: Level = "note",
    answer: str = "",
    scoped: bool = False,
    priority: int = 1,
) -> Statement:
    """Return a statement with several lines, without empty ones; ``summarize`` omits a statement
    without any.

    Unprintable characters are escaped, line ends too.

    >>> make_statement("reach", "Reach", "0.4 of ‖G‖", "0.2 for a fresh adapter").details
    ('0.2 for a fresh adapter',)
    """
    lead, *details = [safe(line) for line in lines if line] or [""]
    return Statement(key, safe(label), lead, tuple(details), level, safe(answer), scoped, priority)


def find(statements: Iterable[Statement], key: str) -> Statement | None:
    """Return the first statement with a key; None without one."""
    return next((statement for statement in statements if statement.key == key), None)


def state_inputs(results: Results[Any], *extra: str) -> Statement:
    """Return the statement of the inputs: role, path and kind of each, then further remarks, then
    notes on inputs.
    """
    sides = results.run.inputs
    longest = max((len(side.role) for side in sides), default=0)
    inputs = (f"{side.role:<{longest}} {safe(side.path)} ({side.kind})" for side in sides)
    return make_statement("compared", "Compared", *inputs, *extra, *notes(results.run), priority=2)


def left_out(results: Results[Any], *details: str) -> Statement:
    """Return the statement of the skipped tensors: their number by reason, and the first names of
    unexpected ones.

    If there are unexpected ones, it is a warning.
    """
    layers: dict[Reason, list[str]] = {}
    for item in results.left_out:
        layers.setdefault(item.reason, []).append(item.layer)
    counts = []
    for reason, names in layers.items():
        count = f"{len(names)} {REASONS[reason]}"
        if reason not in EXPECTED:
            count += f": {list_names(names)}"
        counts.append(count)
    line, level = "; ".join(counts) or "nothing", left_out_level(results)
    return make_statement("left_out", "Left out", line, *details, level=level, priority=2)


def left_out_level(results: Results[Any], *expected: Reason) -> Level:
    """Return ``warning`` if a tensor was skipped for a reason that is neither usual nor
    ``expected``, else ``note``.
    """
    reasons = {item.reason for item in results.left_out}
    return "note" if reasons <= {*EXPECTED, *expected} else "warning"


def final_statements(
    results: Results[Any], so_far: str = "layers measured so far"
) -> list[Statement]:
    """Return the final statements: layers without a result or not on the GPU, and a run that did
    not finish.
    """
    final = []
    unmeasured = results.unmeasured
    if unmeasured:
        lines = [f"{short(item.layer)}: {safe(item.detail)}" for item in unmeasured[:NAMED]]
        rest = f"and {len(unmeasured) - NAMED} more" if len(unmeasured) > NAMED else ""
        final.append(make_statement("not_measured", "Not measured", *lines, rest, level="failure"))
    on_cpu = [record for record in results if ON_CPU in getattr(record, "method", "")]
    if on_cpu:
        text = (
            f"the GPU was out of memory, and the CPU computed {list_layers(on_cpu)}; --workers "
            "1 takes less"
        )
        final.append(make_statement("device", "Device", text, level="warning"))
    if results.end is None:
        text = f"the run did not finish: these are the {so_far}"
        final.append(make_statement("unfinished", "Warning", text, level="failure"))
    return final


# Resolution of an update whose factors are known.
FACTORED = "yes: the factors define the update, without rounding of merged weights"


def describe_resolution(
    verdicts: Iterable[str],
    yes: str,
    otherwise: str,
    *details: str,
    noun: str = "matrix",
    owner: str = "",
    marks: Mapping[str, str] | None = None,
) -> Statement:
    """Return the statement whether the files resolve an update.

    Args:
        verdicts: ``Resolution.verdict`` of each matrix.
        yes: The statement if all are resolved.
        otherwise: What it means for those that are not.
        details: Further lines where some are not.
        noun: What was judged.
        owner: Addition to the noun, such as `` of TUNED``.
        marks: Marks of the verdicts in the command's table; None without marks.
    """
    judged = list(verdicts)
    texts = {verdict: verdict for verdict in NOISE_MARKS}
    if marks:
        texts = {verdict: f"{verdict} ({marks[verdict]})" for verdict in NOISE_MARKS}
    unclear = list_counts(judged, texts)
    if not unclear:
        return make_statement("resolved", "Resolution", yes, priority=2)
    text = f"{' and '.join(unclear)} of {quantity(len(judged), noun)}{owner}; {otherwise}"
    return make_statement("resolved", "Resolution", text, *details, level="warning", priority=2)


def describe_estimate(estimates: Iterable[tuple[Hidden, float]]) -> list[str]:
    """State the size of updates before rounding, from estimates and the norms ‖D‖ in the files.

    Empty without estimates of a size: layers without an interval are refused, or the files resolve
    them.

    Args:
        estimates: The estimate and ‖D‖_F of each layer.
    """
    norms, stored_norms, errors = [], [], []
    for hidden, fro in estimates:
        norm, interval = hidden.fro_estimate, hidden.fro_interval
        if norm and interval is not None:
            norms.append(norm)
            stored_norms.append(fro)
            errors.append((interval[1] - interval[0]) / 2 / norm)
    if not norms:
        return []
    total, stored = math.hypot(*norms), math.hypot(*stored_norms)
    return [
        f"‖X‖ = {number(total)} estimated over {quantity(len(norms))}, ± {percent(median(errors))} "
        f"in the median matrix; the files show ‖D‖ = {number(stored)}, {number(stored / total)} "
        "times that"
    ]


def is_unrelated(records: Iterable[Any]) -> bool:
    """Return whether more layers are unrelated to BASE than descend from it, of records with a
    ``lineage``.
    """
    verdicts = Counter(record.lineage for record in records)
    return verdicts["unrelated"] > verdicts["descends"]


def describe_lineage(records: Iterable[Any], tuned: str = "TUNED", priority: int = 2) -> Statement:
    """State whether TUNED descends from BASE; without a lead if no record has a cosine.

    Args:
        records: Records with a ``lineage``; several of one layer count once.
        tuned: Name of the checkpoint.
        priority: Priority of the statement if no layer is unrelated.
    """
    layers = {record.layer: record for record in records if record.cosine_to_base is not None}
    unrelated = [record for record in layers.values() if record.lineage == "unrelated"]
    descending = [record for record in layers.values() if record.lineage == "descends"]
    total = quantity(len(layers))
    if unrelated:
        cosine = number(median(abs(record.cosine_to_base) for record in unrelated))
        chance = number(median(record.chance_cosine for record in unrelated))
        lead = (
            f"unrelated: {tuned} does not descend from BASE in {len(unrelated)} of {total} (cosine "
            f"of W and W + ΔW {cosine}, by chance {chance})"
        )
        if is_unrelated(layers.values()):
            fix = f"give the BASE that {tuned} comes from"
        else:
            fix = (
                f"replaced, reordered, or of another BASE: {list_layers(unrelated)}; "
                f"{len(descending)} descend"
            )
        return make_statement("lineage", "Lineage", f"{lead}; {fix}", level="warning")
    if not descending:
        lead = f"not known: {total} too small, or with a cosine between chance and descent"
        return make_statement("lineage", "Lineage", lead if layers else "", priority=2)
    least = min(descending, key=lambda record: float(record.cosine_to_base))
    cosine, chance = number(least.cosine_to_base), number(least.chance_cosine)
    lead = f"descends: cos(W, W + ΔW) ≥ {cosine} in {len(descending)} of {total}, chance {chance}"
    return make_statement("lineage", "Lineage", lead, priority=priority)


def summarize(
    results: Results[Any],
    *findings: Statement,
    extra: Sequence[str] = (),
    skipped: Statement | None = None,
    so_far: str = "layers measured so far",
) -> list[Statement]:
    """Return the statements of a summary: inputs, findings, skipped tensors, and the state of the
    run.

    A run that did not finish, layers that are unrelated to BASE, and unexpected skipped tensors
    come first.

    Args:
        results: The results.
        findings: Statements of the command; those without lines are omitted.
        extra: Remarks on the inputs.
        skipped: The statement of skipped tensors; default: ``left_out``.
        so_far: Contents of an unfinished run.
    """
    options = "; ".join(results.run.settings.get("reduced", ()))
    lead = (
        f"{options}: to take ten minutes on two cores, or not much more; give these options to "
        "measure more"
    )
    reduced = make_statement("reduced", "Reduced", options and lead, priority=0)
    found = [statement for statement in (*findings, reduced) if statement.lead]
    skipped = skipped or left_out(results)
    final = final_statements(results, so_far)
    return sorted([state_inputs(results, *extra), *found, skipped, *final], key=_place_first)


def _place_first(statement: Statement) -> int:
    """Return a sort key that places first what the other statements do not cover: an unfinished
    run, unrelated layers, and unexpected skipped tensors.
    """
    first = (("unfinished", "failure"), ("lineage", "warning"), ("left_out", "warning"))
    kind = (statement.key, statement.level)
    return first.index(kind) if kind in first else len(first)


_STYLES: dict[Level, str] = {
    "ok": "bold green",
    "note": "",
    "warning": "bold yellow",
    "failure": "bold red",
}


# Maximum number of lines of a command's summary; None for no limit.
_MAX_LINES: ContextVar[int | None] = ContextVar("most", default=None)


@contextmanager
def limit_lines(lines: int | None) -> Iterator[None]:
    """Limit summaries shown within the block to this number of lines, and tables to their main
    columns; None for all.

    The first line of a decision, a warning or a failure is shown even where it exceeds the limit.
    """
    token = _MAX_LINES.set(lines)
    try:
        yield
    finally:
        _MAX_LINES.reset(token)


def is_verbose() -> bool:
    """Return whether summaries and tables are shown whole."""
    return _MAX_LINES.get() is None


def summary_of(statements: Sequence[Statement], next_command: str | None = None) -> RenderableType:
    """Return a summary for a terminal: labels and statements, within the limit of ``limit_lines``.

    Args:
        statements: Statements in order.
        next_command: The suggested next command, printed last; None without one.
    """
    last = [make_statement("next", "Next", next_command, priority=0)] if next_command else []
    return _Summary((*statements, *last), _MAX_LINES.get())


@dataclass(frozen=True, slots=True)
class _Summary:
    """Statements below each other, with a limit on the number of lines.

    Args:
        statements: Statements in order.
        most: Maximum number of lines; None for no limit.
    """

    statements: tuple[Statement, ...]
    most: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widest = max((cell_len(statement.label) for statement in self.statements), default=0)
        width = max(1, options.max_width - widest - 2)

        def height(line: str) -> int:
            return len(Text(line).wrap(console, width, overflow="fold"))

        shown_lines = [statement.lines for statement in self.statements]
        if self.most is not None:
            shown_lines = _select_fitting(self.statements, self.most, height)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        hidden = 0
        for statement, lines in zip(self.statements, shown_lines, strict=True):
            hidden += len(statement.lines) - len(lines)
            if lines:
                text = Text("\n".join(lines), style=_STYLES[statement.level])
                grid.add_row(statement.label, text)
        yield grid
        if hidden:
            yield Text(f"{hidden} more {'line' if hidden == 1 else 'lines'} with -v")


def _select_fitting(
    statements: Sequence[Statement], limit: int, height: Callable[[str], int]
) -> list[tuple[str, ...]]:
    """Return the lines of each statement that fit: leads before details, decisions and warnings
    first.
    """
    shown_lines: list[tuple[str, ...]] = [()] * len(statements)
    remaining = limit - 1  # the last line gives the number of hidden lines
    order = sorted(range(len(statements)), key=lambda index: statements[index].urgency)
    leads = [(index, 0) for index in order]
    details = [(index, row) for index in order for row in range(1, len(statements[index].lines))]
    for index, row in (*leads, *details):
        statement = statements[index]
        cost = height(statement.lines[row])
        if statement.key == "next":  # it has long paths, and takes two lines of the limit at most
            cost = min(2, cost)
        is_due = len(shown_lines[index]) == row and statement.urgency < 2
        is_decision = row == 0 and statement.urgency == 0
        if is_decision or (is_due and cost <= remaining):
            shown_lines[index] = statement.lines[: row + 1]
            remaining -= cost
    return shown_lines
