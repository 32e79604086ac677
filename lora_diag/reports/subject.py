"""The parts that HTML and Markdown reports share: title, answers, next steps, sections of runs,
gates.

Answers are statements of commands, found by the keys that features declare: ``Feature.questions``
pairs keys and questions. A question of several keys has the first statement as its answer and the
others as further lines.

Names and paths are ``safe``, as in the terminal; escaping for a page is left to the page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_diag.catalog import features
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.feature import Feature
from lora_diag.records.names import short_names
from lora_diag.records.verdict import WORST_FIRST, Verdict, outcome
from lora_diag.records.vocabulary import METRIC_NAMES, metric_of
from lora_diag.rendering.statements import Statement, short_paths
from lora_diag.rendering.tables import Grid
from lora_diag.rendering.text import list_counts, safe
from lora_diag.reports.advice import AdviceStep, advice
from lora_diag.reports.evidence import Evidence, Source

# Keys of statements that the list of runs already contains.
_KEYS_IN_RUN_LIST = {"compared", "left_out"}

# Maximum number of updates named in a title.
_NAMED = 4

# Roles of inputs that are not compared.
_TEXT_ROLES = {"data", "eval", "shifted", "results", "baseline", "policy", "built-in policy"}


@dataclass(frozen=True, slots=True)
class RunSection:
    """The section of one run.

    Args:
        title: Its title.
        kind: Its title without the run's inputs.
        statements: Its statements.
        grids: Its tables.
        figures: Names of its figures; several runs of a command have them in the first section.
    """

    title: str
    kind: str
    statements: tuple[Statement, ...]
    grids: tuple[Grid, ...]
    figures: tuple[str, ...]


def sections_of(evidence: Evidence) -> list[RunSection]:
    """Return a section for each run whose feature has one, in their declared order; runs of one
    command as given.
    """
    sections = []
    for feature in sorted(features(), key=_order_of):
        kind = feature.section
        if kind is None:
            continue
        figures = kind.figures or tuple(figure.name for figure in feature.figures)
        for source in evidence.of_command(feature.name):
            statements: list[Statement] = feature.load(feature.statements)(source.results)
            section = RunSection(
                f"{kind.title}: {name_updates(source)}",
                kind.title,
                tuple(item for item in statements if item.key not in _KEYS_IN_RUN_LIST),
                tuple(grid for grid in feature.tables(source.results, kind.per) if grid.names),
                figures,
            )
            sections.append(section)
            figures = ()  # the first section has those of all runs
    return sections


def _order_of(feature: Feature) -> int:
    """Return the place of a feature in the report; 40 without a section."""
    return feature.section.order if feature.section else 40


def name_updates(source: Source) -> str:
    """Return the subject of a run: its updates or, of many, their number; without updates BASE, or
    its file.
    """
    run = source.results.run
    compared = [item for item in run.inputs if item.role not in _TEXT_ROLES]
    updates = [item.path for item in compared if item.role != "base"]
    updates = updates or [item.path for item in compared]
    if run.command == "spectrum --adapters":
        return f"{len(updates)} adapters"
    if len(updates) > _NAMED:
        return f"{len(updates)} updates"
    between = " in " if run.command == "verify-merge" else " + "
    return between.join(short_paths(updates)) or safe(source.name)


# Maximum number of runs of one command that answer a question.
MAX_RUNS = 8


@dataclass(frozen=True, slots=True)
class Answer:
    """One question at the top of the page, with its answer.

    Args:
        question: The question.
        says: The answer, with its numbers.
        more: Further lines.
    """

    question: str
    says: str
    more: tuple[str, ...] = ()


def answers(evidence: Evidence) -> list[Answer]:
    """Return the answers to the features' questions, in the declared order of their sections; 40
    without a section.

    A question that several features declare is answered by the first of them that has a statement
    on it.
    """
    answered_by: dict[str, str] = {}
    result = []
    for feature in sorted(features(), key=_order_of):
        sources = evidence.of_command(feature.name)[:MAX_RUNS]
        for source in sources:
            for answer in _answer_questions(feature, source, len(sources) > 1):
                if answered_by.setdefault(answer.question, feature.name) == feature.name:
                    result.append(answer)
    return result


def _answer_questions(feature: Feature, source: Source, with_source: bool) -> list[Answer]:
    """Return the answers of one run to the questions of its feature; ``with_source`` adds the name
    of the run.
    """
    if not feature.questions:
        return []
    statements: list[Statement] = feature.load(feature.statements)(source.results)
    metric = metric_of(source.results.layers)
    suffix = "" if metric == "weights" else f" in {METRIC_NAMES[metric]}"
    by_question: dict[str, list[Statement]] = {}
    for key, question in feature.questions:
        matching = [statement for statement in statements if statement.key == key]
        by_question.setdefault(question, []).extend(matching)
    result = []
    for question, matching in by_question.items():
        if not matching:
            continue
        first, *others = matching
        answered, details = first.answered
        headline, rest = _split_headline(answered)
        more = [rest, *details] if rest else [*details]
        for statement in others:
            more += statement.labelled
        if with_source and feature.section:
            more.append(f"{feature.section.title}: {name_updates(source)}")
        elif with_source:
            more.append(safe(source.name))
        result.append(Answer(f"{question.removesuffix('?')}{suffix}?", headline, tuple(more)))
    return result


# Maximum number of words of an answer's headline.
HEADLINE = 15


def _split_headline(answer: str) -> tuple[str, str]:
    """Return the first clauses of an answer, at most ``HEADLINE`` words, and the rest.

    If even the first clause is longer, return its first ``HEADLINE`` words and the whole answer.

    >>> _split_headline("no: r=8 keeps 31% (of 99); " + "word " * 15 + "end")[0]
    'no: r=8 keeps 31% (of 99)'
    """
    end: re.Match[str] | None = None
    for match in re.finditer(r"[.;:,](?= )| (?=\()|$", answer):
        clauses = answer[: match.start()]
        if len(clauses.split()) <= HEADLINE and clauses.count("(") == clauses.count(")"):
            end = match
    if end is None:
        return " ".join(answer.split()[:HEADLINE]) + " …", answer
    return answer[: end.start()], answer[end.end() :].strip()


@dataclass(frozen=True, slots=True)
class ReportSubject:
    """The first part of a report.

    Args:
        title: The compared inputs.
        answers: Answers to the questions of the features.
        unfinished: Warnings on runs that did not finish.
        advice: Next steps.
    """

    title: str
    answers: tuple[Answer, ...]
    unfinished: tuple[str, ...]
    advice: tuple[AdviceStep, ...]


def subject_of(evidence: Evidence) -> ReportSubject:
    """Return the first part of a report on several runs."""
    unfinished = [source for source in evidence.sources if source.results.end is None]
    return ReportSubject(
        title=_make_title(evidence),
        answers=tuple(answers(evidence)),
        unfinished=tuple(map(_describe_unfinished, unfinished)),
        advice=tuple(map(_make_safe, advice(evidence))),
    )


def labels(paths: Sequence[str]) -> list[str]:
    """Return labels of runs and adapters for columns and legends: the last differing parts of their
    paths.

    >>> labels(["runs/full.jsonl"]), labels(["a/x/adapter", "b/y/adapter"]), labels(["a", "a"])
    (['full'], ['x/adapter', 'y/adapter'], ['a', 'a'])
    """
    stems = [path.removesuffix(".jsonl") for path in paths]
    names = short_names(stems, safe)
    return [names[stem] or "run" for stem in stems]


def _make_safe(step: AdviceStep) -> AdviceStep:
    """Return a step with text that is safe to show; its ``layers`` and ``facts`` are unchanged."""
    return replace(
        step,
        do=safe(step.do),
        because=safe(step.because),
        argv=tuple(map(safe, step.argv)),
        about=tuple(short_names(step.about, safe).values()),
    )


def _make_title(evidence: Evidence) -> str:
    """Return the subject of the page: that of the update, else of the residual, else of the first
    run, and its BASE.
    """
    if not evidence.sources:
        return "nothing"
    source = evidence.update or next(evidence.of(Residual), evidence.sources[0])
    name = name_updates(source)
    bases = source.paths("base")
    if not bases:
        return name
    base = short_names(source.paths(), safe)[bases[0]]
    return name if name == base else f"{name} compared with {base}"


def _describe_unfinished(source: Source) -> str:
    """State that a run did not finish, and what that means."""
    command = safe(source.results.run.command)
    return (
        f"{safe(source.name)}: the run of loradiag {command} did not finish; statements on its "
        f"{source.count} records do not apply to the rest, and no step is derived from it. "
        "Repeat the command with --resume."
    )


def gate_outcome(evidence: Evidence) -> tuple[str, list[Verdict]]:
    """Return the outcome of the gates as text, and the failed, inconclusive and warned verdicts,
    worst first.

    Both are empty without gates.
    """
    verdicts = sorted(evidence.verdicts, key=lambda verdict: WORST_FIRST.index(verdict.status))
    if not verdicts:
        return "", []
    statuses = [verdict.status for verdict in verdicts]
    counts = list_counts(statuses, {status: status for status in WORST_FIRST})
    shown = [v for v in verdicts if v.status in {"failed", "inconclusive", "warned"}]
    return f"{outcome(verdicts).upper()}: {', '.join(counts)}", shown
