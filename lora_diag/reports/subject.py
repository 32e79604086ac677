"""The first part of a report: inputs, answers, next steps.

Shared by HTML and Markdown. Names and paths are ``safe``; escaping for a page is left to the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_diag.decisions.allocate.record import Certificate
from lora_diag.decisions.gate.record import WORST_FIRST, Verdict, outcome
from lora_diag.diagnostics.residual.record import Residual
from lora_diag.diagnostics.spectrum.summary import METRICS
from lora_diag.records.vocabulary import METRIC_NAMES, metric_of
from lora_diag.rendering.text import number, percent, safe
from lora_diag.reports.advice import Step, advice
from lora_diag.reports.answers import Answer, answers
from lora_diag.reports.evidence import Evidence, Source
from lora_diag.reports.sections import is_of_losses, named_of, section_kind


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
        return named_of(source)
    paths = {side.role: safe(side.path) for side in reversed(inputs)}
    adapters = sum(side.role == "adapter" for side in inputs)
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
                others = "; ".join(f"{safe(b.name)} keeps {percent(b.kept)}" for b in record.baselines)
                text = (
                    f"uses {number(record.spent)}{budget} ({record.unit.replace('_', ' ')}) and keeps "
                    f"{percent(record.kept)} of the energy{suffix}; under the same constraints the maximum is at most "
                    f"{percent(record.bound)}{f'. For comparison: {others}' if others else ''}."
                )
                texts.append((labels([source.name])[0], text))
    return texts


def gate_outcome(evidence: Evidence) -> tuple[str, list[Verdict]]:
    """Return the outcome of the gates as text, and the verdicts that did not pass, worst first; empty without gates."""
    verdicts = sorted(evidence.verdicts, key=lambda verdict: WORST_FIRST.index(verdict.status))
    counts = Counter(verdict.status for verdict in verdicts)
    words = ", ".join(f"{times} {status}" for status, times in counts.items())
    omitted = {"passed", "waived", "not judged"}
    return f"{outcome(verdicts).upper()}: {words}" if verdicts else "", [v for v in verdicts if v.status not in omitted]
