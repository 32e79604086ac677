"""The first part of a report: inputs, answers, next steps, failure modes.

Shared by HTML and Markdown. Names and paths are ``safe``; escaping for a page is left to the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from lora_diag.decisions.allocate.record import Certificate
from lora_diag.decisions.gate.record import WORST_FIRST, Verdict, outcome
from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.overlap.summary import lines as overlap_lines
from lora_diag.diagnostics.overlap.tracks import tracks
from lora_diag.diagnostics.residual.record import EPSILON
from lora_diag.diagnostics.residual.summary import residual_lines
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.diagnostics.spectrum.summary import METRICS, summary_lines
from lora_diag.records.vocabulary import METRIC_NAMES, metric_of
from lora_diag.rendering.statements import Statement, find, lines_of
from lora_diag.rendering.text import number, percent, safe
from lora_diag.reports.advice import advice
from lora_diag.reports.answers import Answer, losses, other_answers
from lora_diag.reports.evidence import MAX_ADAPTERS, Evidence, Source, measure_weights
from lora_diag.reports.findings import Finding, findings
from lora_diag.reports.sections import is_of_losses, named_of, section_kind
from lora_diag.reports.step import Advice
from lora_diag.reports.worth import of

# Shown wherever a rank is recommended.
ENERGY = (
    "Energy bounds what a rank can hold of this one full fine-tune. An adapter trained at that rank may be better "
    "or worse: compare the held-out loss."
)

T = TypeVar("T", Advice, Finding)


@dataclass(frozen=True, slots=True)
class Subject:
    """All statements of a report.

    Args:
        title: The compared inputs.
        answers: Answers to the first questions.
        unfinished: Warnings on runs that did not finish.
        advice: Next steps for all adapters and updates.
        findings: Failure modes.
        missing: Missing measurements and their commands.
        silent: Number of further adapters and updates.
        update: Whether an update was measured, or nothing else was; otherwise there is no advice.
        weights: Whether it was measured in the weights, which failure modes need.
    """

    title: str
    answers: tuple[Answer, ...]
    unfinished: tuple[str, ...]
    advice: tuple[Advice, ...]
    findings: tuple[Finding, ...]
    missing: tuple[tuple[str, str], ...]
    silent: int
    update: bool
    weights: bool


def subject_of(evidence: Evidence) -> Subject:
    """Return the statements of a report on several runs."""
    others, probed = tuple(other_answers(evidence)), tuple(losses(evidence))
    usual = (
        _answer_low_rank(evidence),
        *_answer_in_metrics(evidence),
        _answer_resolved(evidence),
        _answer_limits(evidence),
    )
    measured = any(answer.measured for answer in usual)
    weights = measured or not (others or probed)
    return Subject(
        title=_make_title(evidence),
        answers=(*probed, *(usual if weights else ()), *others),
        unfinished=tuple(
            map(_describe_unfinished, filter(lambda source: source.results.end is None, evidence.sources))
        ),
        advice=tuple(map(_make_safe, advice(evidence))),
        findings=tuple(
            map(
                _make_safe,
                dict.fromkeys(finding for single in evidence.each()[:MAX_ADAPTERS] for finding in findings(single)),
            )
        ),
        missing=tuple((safe(quantity), safe(how)) for quantity, how in evidence.missing()),
        silent=max(0, len(evidence.each()) - MAX_ADAPTERS),
        update=weights or bool(probed),
        weights=measured and not (evidence.weighted and evidence.update is None and evidence.audit is None),
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


def _make_safe(item: T) -> T:
    """Return advice or a finding with text that is safe to show; its ``layers`` are unchanged."""
    texts: dict[str, Any] = {field.name: getattr(item, field.name) for field in fields(item)}
    changes: dict[str, Any] = {name: safe(value) for name, value in texts.items() if isinstance(value, str)}
    changes |= {name: tuple(map(safe, texts[name])) for name in ("argv", "about") if name in texts}
    return replace(item, **changes)


def _make_title(evidence: Evidence) -> str:
    source = evidence.update or evidence.audit or next(iter(evidence.sources), None)
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


def _answer_low_rank(evidence: Evidence) -> Answer:
    question = "Is the update low-rank?"
    if evidence.update is not None:
        return Answer(question, *_select_rank_needed(summary_lines(evidence.update.results)))
    for source in _list_spectra_in_weights(evidence):
        if used := find(summary_lines(source.results), "rank_used"):
            return Answer(question, used.lead, ("An adapter's rank is a setting: this is the part of it in use.",))
    if evidence.audit is not None:
        return _make_answer(
            question, residual_lines(evidence.audit.results), "low_rank", "no adapter was compared with it"
        )
    if evidence.weighted:
        how = safe(measure_weights(evidence.weighted[0]))
        return Answer(question, f"not measured in the weights; run {how}", measured=False)
    return Answer(question, "not measured; run loradiag spectrum BASE FULL_FT", measured=False)


def _select_rank_needed(statements: Sequence[Statement]) -> tuple[str, tuple[str, ...]]:
    """Return the statement of spectra on the rank needed, or used, with details; or on what changed."""
    if statement := find(statements, "low_rank") or find(statements, "rank_used"):
        return statement.lead, (
            *statement.details,
            *(f"rank at 90%: {line}" for line in lines_of(statements, "rank_at_90")),
        )
    return (*lines_of(statements, "moved"), "")[0], ()


def _make_answer(question: str, statements: Sequence[Statement], key: str, otherwise: str) -> Answer:
    """Return a statement as the answer to a question."""
    first, *details = lines_of(statements, key) or (otherwise,)
    return Answer(question, first, tuple(details))


def _list_spectra_in_weights(evidence: Evidence) -> list[Source]:
    return [source for source in evidence.of(Spectrum) if source not in evidence.weighted]


def _answer_in_metrics(evidence: Evidence) -> Iterator[Answer]:
    """Yield the statements of spectra in other metrics, which apply to outputs or the loss instead of weights."""
    for source in evidence.weighted[:MAX_ADAPTERS]:
        statements = summary_lines(source.results)
        first, details = _select_rank_needed(statements)
        details += tuple(f"The metric is {line}" for line in lines_of(statements, "metric"))
        details += (safe(source.name),) if len(evidence.weighted) > 1 else ()
        yield Answer(f"Is it low-rank in {METRIC_NAMES[metric_of(source.results)]}?", first, details)


def other_metric_sentences(evidence: Evidence) -> list[str]:
    """Return a sentence for each other metric of columns and curves."""
    metrics = dict.fromkeys(metric_of(source.results) for source in evidence.weighted)
    return [f"The metric is {METRICS[metric]}." for metric in metrics]


def _answer_resolved(evidence: Evidence) -> Answer:
    question = "Do the files resolve the update?"
    source = evidence.update or next(iter(_list_spectra_in_weights(evidence)), None)
    if source is None and evidence.audit is None:
        source = next(iter(evidence.weighted), None)
    if source is not None:
        return _make_answer(question, summary_lines(source.results), "resolved", "no matrix changed")
    if evidence.audit is not None:
        return _make_answer(question, residual_lines(evidence.audit.results), "resolved", "no verdict")
    return Answer(question, "not measured; run loradiag spectrum BASE FULL_FT", measured=False)


def _answer_limits(evidence: Evidence) -> Answer:
    question = "What limits the adapter?"
    if evidence.adapter is not None and evidence.audit is not None:
        statements = residual_lines(evidence.audit.results)
        first, *others = lines_of(statements, "limited_by")
        return Answer(
            question, first, (*others, *lines_of(statements, "distance"), EPSILON, *_describe_role_of_epsilon(evidence))
        )
    for source in evidence.of(Overlap):
        statements = overlap_lines(source.results, tracks(source.results))
        first, *others = lines_of(statements, "inside")
        return Answer(
            question, first, (*others, *lines_of(statements, "reach"), "Overlap shows direction, not quality.")
        )
    return Answer(question, "not measured; run loradiag residual BASE FULL_FT ADAPTER", measured=False)


def _describe_role_of_epsilon(evidence: Evidence) -> list[str]:
    """State the role of ε if the loss is known."""
    return ["Only an indication: the held-out loss, above, takes precedence."] if any(of(evidence, "outputs")) else []


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
