"""The questions that a report answers first from losses, from probes of parts and from several updates.

Each answer is in the words and with the numbers of the command's own summary. Names come out ``safe``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_diag.probes.truncation.summary import gap
from lora_diag.rendering.lines import called
from lora_diag.rendering.statements import find
from lora_diag.rendering.text import safe
from lora_diag.reports.evidence import Evidence
from lora_diag.reports.several import sections_of
from lora_diag.reports.worth import Contest, contests


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


# What is asked of held-out losses first, by the command that measured them.
_LOSSES = {
    "probe outputs": "Is the adapter as good as the full fine-tune?",
    "probe sweep": "Which rank is enough, by training at it?",
    "probe truncation": "What does a rank of the update keep of its gain?",
}


# By what a line of ``probe outputs`` about distances is known.
_DISTANCES = ("nearest is ", "as near to TUNED as")


def losses(evidence: Evidence) -> Iterator[Answer]:
    """Yield what held-out losses say, with their paired standard errors: it leads, and weights are pointers."""
    sections = [section for section in sections_of(evidence) if section.command in _LOSSES]
    for command, question in _LOSSES.items():
        of_command = [section for section in sections if section.command == command]
        for section in of_command:
            said = [(one.label, list(one.lines)) for one in section.statements if one.label.startswith("On ")]
            if not said:
                continue
            # The loss of BASE and of TUNED comes first in a set's lines, and what follows from it second.
            word, (first, *rest) = said[0]
            lead, more = (rest[0], [first, *rest[1:]]) if rest and first.startswith("loss ") else (first, rest)
            if command == "probe outputs" and (judged := _as_good(contests(Evidence((section.source,))))):
                more, lead, word = [f"{word}: {line}" for line in [first, *rest]], judged, ""
            more += [f"{word}: {line}" for word, lines in said[1:] for line in lines]
            # Distances are no quality; they stand in the section.
            more = [line for line in more if not any(words in line for words in _DISTANCES)]
            more += [f"{one.label} {one.text}" for one in section.statements if one.label == "Shifted agrees?"]
            more += [section.title] if len(of_command) > 1 else []
            yield Answer(question, f"{word}: {lead}" if word else lead, tuple(more))


def _as_good(found: Sequence[Contest]) -> str:
    """Say of the best adapter whether it does as well as the full fine-tune, and of how many it is the best."""
    if not found:
        return ""
    words = {"as good": "yes", "worse": "no", "not known": "not known"}
    word = next(word for word in words if any(contest.word == word for contest in found))
    best = min((one for one in found if one.word == word), key=lambda one: one.worst.gap or 0.0)
    record = best.worst
    kept = "" if record.kept is None else f", {record.kept:.0%} of its gain"
    others = f"; the best of {len(found)}" if len(found) > 1 else ""
    (name,) = called([best.name])
    return f"{words[word]}: {name} is {gap(record)} nats from it on {safe(record.set)}{kept}{others}"


def several(evidence: Evidence) -> Iterator[Answer]:
    """Yield the answers to the questions that features declare, from their statements."""
    sections = sections_of(evidence)
    times = Counter(section.feature.name for section in sections)
    for section in sections:
        for key, question in section.feature.questions:
            if found := find(section.statements, key):
                answer, more = found.answered
                # Of several such runs each answer says whose it is.
                yield Answer(question, answer, (*more, *([section.title] if times[section.feature.name] > 1 else ())))


# What is asked of probes of parts, by the command: the question, how the word of the line that answers it begins, and
# how the sentence that leads does. Of several questions the first that has an answer.
_PARTS = {
    "probe sensitivity": (("Which layers gain most where each is adapted alone?", "On ", "highest: "),),
    "probe intrinsic": (("In how few directions does training get as far?", "On ", "d"),),
    "probe fisher": (("Which layers' tails does the loss need?", "At r=", ""),),
    "probe curvature": (
        ("What is the loss bound of a truncation worth?", "Bound", "(λ/2)"),
        ("How does the loss bend?", "Curvature", ""),
    ),
}


def parts(evidence: Evidence) -> Iterator[Answer]:
    """Yield what probes of parts say first."""
    found = [section for section in sections_of(evidence) if section.command in _PARTS]
    asked = Counter(section.command for section in found)
    for section in found:
        for question, begins, leads in _PARTS[section.command]:
            told = next(((one.label, one.lines) for one in section.statements if one.label.startswith(begins)), None)
            if told is None:
                continue
            word, said = told
            lead = next((line for line in said if line.startswith(leads)), said[0])
            more = [line for line in said if line is not lead]
            # A word that ends in a set or a rank says of which the answer is.
            says = lead if word == begins else f"{word}: {lead}"
            yield Answer(question, says, (*more, *([section.title] if asked[section.command] > 1 else ())))
            break
