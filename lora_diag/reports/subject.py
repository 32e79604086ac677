"""The parts that HTML and Markdown reports share: title, answers, next steps, sections of runs, allocations, gates.

Answers are statements of commands, found by the keys that features declare: ``Feature.questions`` pairs keys and
questions. A question of several keys has the first statement as its answer and the others as further lines.

Names and paths are ``safe``, as in the terminal; escaping for a page is left to the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_diag.catalog import feature_of, features
from lora_diag.decisions.allocate.record import Certificate
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.diagnostics.spectrum.show import METRICS
from lora_diag.feature import Feature
from lora_diag.feature import Section as SectionKind
from lora_diag.gating.record import WORST_FIRST, Verdict, outcome
from lora_diag.records.vocabulary import METRIC_NAMES, metric_of
from lora_diag.rendering.statements import Statement, short_paths
from lora_diag.rendering.tables import Grid
from lora_diag.rendering.text import number, percent, safe
from lora_diag.reports.advice import Step, advice
from lora_diag.reports.evidence import Evidence, Source

# Keys of statements that the list of runs already contains.
_KEYS_IN_RUN_LIST = {"compared", "left_out", "adapters"}

# Maximum number of updates named in a title.
_NAMED = 4

# Roles of inputs that are not compared.
_TEXT_ROLES = {"data", "eval", "shifted"}


@dataclass(frozen=True, slots=True)
class Section:
    """The section of one run.

    Args:
        title: Its title.
        kind: Its title without the run's inputs.
        feature: The feature of its records.
        statements: Its statements.
        grids: Its tables.
        figures: Names of its figures; several runs of a command have them in the first section.
        source: The run.
    """

    title: str
    kind: str
    feature: Feature
    statements: tuple[Statement, ...]
    grids: tuple[Grid, ...]
    figures: tuple[str, ...]
    source: Source

    @property
    def command(self) -> str:
        """The command that measured it."""
        return self.source.results.run.command


def section_kind(source: Source) -> SectionKind | None:
    """Return the section declared by a run's feature; None without one."""
    feature = feature_of(source.results.run.command)
    return feature.section if feature else None


def sections_of(evidence: Evidence) -> list[Section]:
    """Return a section for each run whose feature has one, losses first; runs of one command in the given order."""
    sections = []
    drawn: set[str] = set()
    kinds_of_sources = [(kind, source) for source in evidence.sources if (kind := section_kind(source)) is not None]
    order = [feature.name for feature in features()]
    for kind, source in sorted(
        kinds_of_sources, key=lambda item: (item[0].order, order.index(item[1].results.run.command))
    ):
        feature = feature_of(source.results.run.command)
        assert feature is not None
        statements: list[Statement] = feature.load(feature.statements)(source.results)
        grids = feature.tables(source.results, kind.per)
        figures = kind.figures or tuple(figure.name for figure in feature.figures)
        sections.append(
            Section(
                f"{kind.title}: {name_updates(source)}",
                kind.title,
                feature,
                tuple(statement for statement in statements if statement.key not in _KEYS_IN_RUN_LIST),
                tuple(grid for grid in grids if grid.names),
                () if feature.name in drawn else figures,
                source,
            )
        )
        drawn.add(feature.name)
    return sections


def is_of_losses(source: Source) -> bool:
    """Return whether a run measured losses of a model."""
    kind = section_kind(source)
    return kind is not None and kind.losses


def name_updates(source: Source) -> str:
    """Return the subject of a run: its updates, or their number."""
    run = source.results.run
    compared = [run_input for run_input in run.inputs if run_input.role not in _TEXT_ROLES]
    updates = [run_input.path for run_input in compared if run_input.role != "base"] or [
        run_input.path for run_input in compared
    ]
    if run.command == "spectrum --adapters" or len(updates) > _NAMED:
        return f"{len(updates)} {'adapters' if run.command == 'spectrum --adapters' else 'updates'}"
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
    """Return the answers: losses first with their paired standard errors, then weights, then all others.

    A question that several features declare is answered by the first of them that has a statement on it.
    """
    order = sorted(
        (feature for feature in features() if feature.questions),
        key=lambda feature: feature.section.order if feature.section else 40,
    )
    answered_by: dict[str, str] = {}
    result = []
    for feature in order:
        sources = [source for source in evidence.sources if source.results.run.command == feature.name][:MAX_RUNS]
        for source in sources:
            run_answers = _answer_questions(feature, source, len(sources) > 1)
            result += [a for a in run_answers if answered_by.setdefault(a.question, feature.name) == feature.name]
    return result


def _answer_questions(feature: Feature, source: Source, with_source: bool) -> list[Answer]:
    statements: list[Statement] = feature.load(feature.statements)(source.results)
    metric = metric_of(source.results.layers)
    suffix = "" if metric == "weights" else f" in {METRIC_NAMES[metric]}"
    name = f"{feature.section.title}: {name_updates(source)}" if feature.section else safe(source.name)
    result = []
    for question in dict.fromkeys(question for _, question in feature.questions):
        keys = [key for key, of_key in feature.questions if of_key == question]
        matching = [statement for key in keys for statement in statements if statement.key == key]
        if matching:
            answer, extra = matching[0].answered
            extra += tuple(line for statement in matching[1:] for line in statement.labelled)
            # With several such runs, each answer names its run.
            extra += (name,) if with_source else ()
            result.append(Answer(f"{question.removesuffix('?')}{suffix}?", answer, extra))
    return result


@dataclass(frozen=True, slots=True)
class Subject:
    """The first part of a report.

    Args:
        title: The compared inputs.
        answers: Answers to the first questions.
        unfinished: Warnings on runs that did not finish.
        advice: Next steps.
    """

    title: str
    answers: tuple[Answer, ...]
    unfinished: tuple[str, ...]
    advice: tuple[Step, ...]


def subject_of(evidence: Evidence) -> Subject:
    """Return the first part of a report on several runs."""
    return Subject(
        title=_make_title(evidence),
        answers=tuple(answers(evidence)),
        unfinished=tuple(_describe_unfinished(source) for source in evidence.sources if source.results.end is None),
        advice=tuple(map(_make_safe, advice(evidence))),
    )


def labels(paths: Sequence[str]) -> list[str]:
    """Return labels of runs and adapters for columns and legends: the last differing parts of their paths.

    >>> labels(["runs/full.jsonl"]), labels(["a/x/adapter", "b/y/adapter"]), labels(["a", "a"])
    (['full'], ['x/adapter', 'y/adapter'], ['a', 'a'])
    """
    parts = [path.removesuffix(".jsonl").replace("\\", "/").rstrip("/").split("/") for path in paths]
    longest = max(map(len, parts), default=1)
    for last in range(1, longest + 1):
        names = ["/".join(part[-last:]) for part in parts]
        if len(set(names)) == len(set(paths)):
            break
    return [safe(label) or "run" for label in names] if parts else []


def _make_safe(step: Step) -> Step:
    """Return a step with text that is safe to show; its ``layers`` are unchanged."""
    return replace(
        step,
        do=safe(step.do),
        because=safe(step.because),
        argv=tuple(map(safe, step.argv)),
        about=tuple(map(safe, step.about)),
    )


def _make_title(evidence: Evidence) -> str:
    source = evidence.update or next(evidence.of(Residual), None) or next(iter(evidence.sources), None)
    inputs = source.results.run.inputs if source else ()
    if source is not None and section_kind(source) is not None and not is_of_losses(source):
        return name_updates(source)
    paths = {run_input.role: safe(run_input.path) for run_input in reversed(inputs)}
    adapters = sum(run_input.role == "adapter" for run_input in inputs)
    if source is not None and is_of_losses(source) and "tuned" not in paths and adapters > 1:
        return f"{adapters} adapters of {paths['base']}"
    tuned = paths.get("tuned") or paths.get("adapter")
    if tuned and "base" in paths:
        return f"{tuned} compared with {paths['base']}"
    if source is not None and is_of_losses(source) and "base" in paths:
        return f"{paths['base']}, trained"
    return tuned or (labels([source.name])[0] if source else "nothing")


def _describe_unfinished(source: Source) -> str:
    run, count = source.results.run, len(source.results) or len(source.results.whole)
    return (
        f"{safe(source.name)}: the run of loradiag {safe(run.command)} did not finish; statements on its {count} "
        "records do not apply to the rest, and no step is derived from it. Repeat the command with --resume."
    )


def other_metric_sentences(evidence: Evidence) -> list[str]:
    """Return a sentence for each other metric of columns and curves."""
    metrics = dict.fromkeys(metric_of(source.results) for source in evidence.weighted)
    return [f"The metric is {METRICS[metric]}." for metric in metrics]


def certificates(evidence: Evidence) -> list[tuple[str, str]]:
    """Return a label and a sentence for each allocation: its cost, energy, and distance from the optimum."""
    texts = []
    for source in evidence.sources:
        for record in source.results.whole:
            if isinstance(record, Certificate):
                budget = f" of {number(record.budget)}" if record.budget is not None else ""
                metric = source.results.run.settings.get("metric", "weights")
                suffix = "" if metric == "weights" else f" in {METRIC_NAMES[metric]}"
                comparisons = "; ".join(f"{safe(b.name)} keeps {percent(b.kept)}" for b in record.baselines)
                text = (
                    f"uses {number(record.spent)}{budget} ({record.unit.replace('_', ' ')}) and keeps "
                    f"{percent(record.kept)} of the energy{suffix}; under the same constraints the maximum is at most "
                    f"{percent(record.bound)}{f'. For comparison: {comparisons}' if comparisons else ''}."
                )
                texts.append((labels([source.name])[0], text))
    return texts


def gate_outcome(evidence: Evidence) -> tuple[str, list[Verdict]]:
    """Return the outcome of the gates as text, and the failed, inconclusive and warned verdicts, worst first.

    Both are empty without gates.
    """
    verdicts = sorted(evidence.verdicts, key=lambda verdict: WORST_FIRST.index(verdict.status))
    counts = Counter(verdict.status for verdict in verdicts)
    status_counts = ", ".join(f"{times} {status}" for status, times in counts.items())
    omitted = {"passed", "waived", "not judged"}
    return f"{outcome(verdicts).upper()}: {status_counts}" if verdicts else "", [
        v for v in verdicts if v.status not in omitted
    ]
