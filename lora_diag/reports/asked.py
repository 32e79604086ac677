"""The questions that a report answers first from losses, from probes of parts and from several updates.

Each answer is in the words and with the numbers of the command's own summary. Names come out ``safe``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_diag.reports.evidence import Evidence
from lora_diag.reports.several import Section, is_of_losses, sections_of


@dataclass(frozen=True, slots=True)
class Answer:
    """One question of the top of the page.

    Args:
        question: As a user asks it.
        says: The answer, with its numbers.
        more: What stands below it.
        measured: False where nothing was measured that answers it.
    """

    question: str
    says: str
    more: tuple[str, ...] = ()
    measured: bool = True


def losses(evidence: Evidence) -> Iterator[Answer]:
    """Yield what probes say: losses lead, with their paired standard errors, and weights are pointers."""
    return _answers([section for section in sections_of(evidence) if is_of_losses(section.source)])


def several(evidence: Evidence) -> Iterator[Answer]:
    """Yield the answers to the questions that the other features declare."""
    return _answers([section for section in sections_of(evidence) if not is_of_losses(section.source)])


def _answers(sections: Sequence[Section]) -> Iterator[Answer]:
    """Yield the answers to the questions that features declare, from their statements."""
    times = Counter(section.feature.name for section in sections)
    for section in sections:
        for key, question in section.feature.questions:
            if found := [one for one in section.statements if one.key == key]:
                first, *others = found
                answer, more = first.answered
                more += tuple(line for one in others for line in one.labelled)
                # Of several such runs each answer says whose it is.
                yield Answer(question, answer, (*more, *([section.title] if times[section.feature.name] > 1 else ())))
