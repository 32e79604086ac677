"""The first questions of a report, answered from losses, probes of parts and several updates.

Answers are the statements of the command's own summary. Names are ``safe``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_diag.reports.evidence import Evidence
from lora_diag.reports.sections import Section, is_of_losses, sections_of


@dataclass(frozen=True, slots=True)
class Answer:
    """One question at the top of the page, with its answer.

    Args:
        question: The question.
        says: The answer, with its numbers.
        more: Further lines.
        measured: False if no measurement answers it.
    """

    question: str
    says: str
    more: tuple[str, ...] = ()
    measured: bool = True


def losses(evidence: Evidence) -> Iterator[Answer]:
    """Yield the answers of probes: losses first with their paired standard errors; weights are only indications."""
    return _answer_questions([section for section in sections_of(evidence) if is_of_losses(section.source)])


def other_answers(evidence: Evidence) -> Iterator[Answer]:
    """Yield the answers to the questions declared by other features."""
    return _answer_questions([section for section in sections_of(evidence) if not is_of_losses(section.source)])


def _answer_questions(sections: Sequence[Section]) -> Iterator[Answer]:
    """Yield the answers to the questions declared by features, from their statements."""
    run_counts = Counter(section.feature.name for section in sections)
    for section in sections:
        for key, question in section.feature.questions:
            if statements := [statement for statement in section.statements if statement.key == key]:
                first, *others = statements
                answer, extra = first.answered
                extra += tuple(line for statement in others for line in statement.labelled)
                # With several such runs, each answer names its run.
                yield Answer(
                    question, answer, (*extra, *([section.title] if run_counts[section.feature.name] > 1 else ()))
                )
