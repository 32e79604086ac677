"""The answers at the top of a page: statements of commands, found by the keys that features declare.

``Feature.questions`` pairs keys and questions. A question of several keys has the first statement as its answer and the
others as further lines. Names are ``safe``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_diag.catalog import features
from lora_diag.feature import Feature
from lora_diag.records.vocabulary import METRIC_NAMES, metric_of
from lora_diag.rendering.statements import Statement
from lora_diag.rendering.text import safe
from lora_diag.reports.evidence import Evidence, Source
from lora_diag.reports.sections import named_of

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
            found = _answer_questions(feature, source, len(sources) > 1)
            result += [a for a in found if answered_by.setdefault(a.question, feature.name) == feature.name]
    return result


def _answer_questions(feature: Feature, source: Source, with_source: bool) -> list[Answer]:
    statements: list[Statement] = feature.load(feature.statements)(source.results)
    metric = metric_of(source.results.layers)
    suffix = "" if metric == "weights" else f" in {METRIC_NAMES[metric]}"
    name = f"{feature.section.title}: {named_of(source)}" if feature.section else safe(source.name)
    result = []
    for question in dict.fromkeys(question for _, question in feature.questions):
        keys = [key for key, of_key in feature.questions if of_key == question]
        found = [statement for key in keys for statement in statements if statement.key == key]
        if found:
            answer, extra = found[0].answered
            extra += tuple(line for statement in found[1:] for line in statement.labelled)
            # With several such runs, each answer names its run.
            extra += (name,) if with_source else ()
            result.append(Answer(f"{question.removesuffix('?')}{suffix}?", answer, extra))
    return result
