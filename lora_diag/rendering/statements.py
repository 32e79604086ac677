"""Statements: what a summary says, as data. Terminal, HTML, Markdown, advice and colours read the fields."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from lora_diag.records import Results
from lora_diag.rendering.lines import inputs, left_out_line, not_measured, notes

# ``note`` says something, ``ok`` that a check passed; the others ask for attention.
Level = Literal["ok", "note", "warning", "failure"]


@dataclass(frozen=True, slots=True)
class Statement:
    """One line of a summary, or several under one label.

    Args:
        key: By which reports and tests refer to it.
        label: What it is about, as a term.
        lead: The statement.
        details: What stands below it.
        level: How much attention it asks for.
        answer: What answers the question of a report that refers to the key; ``lead`` if empty.
        scoped: Whether the label says what the lines hold for, such as one set; elsewhere they are shown with it.
    """

    key: str
    label: str
    lead: str
    details: tuple[str, ...] = ()
    level: Level = "note"
    answer: str = ""
    scoped: bool = False

    @property
    def lines(self) -> tuple[str, ...]:
        """Lead and details."""
        return (self.lead, *self.details)

    @property
    def text(self) -> str:
        """All of it, a line each."""
        return "\n".join(self.lines)

    @property
    def answered(self) -> tuple[str, tuple[str, ...]]:
        """The answer to a question, and the other lines.

        >>> say("on", "On dev", "loss 2.0", "use r=4", answer="use r=4", scoped=True).answered
        ('On dev: use r=4', ('loss 2.0',))
        >>> say("on", "On dev", "loss 2.0", answer="yes: it is as good", scoped=True).answered
        ('yes: it is as good', ('On dev: loss 2.0',))
        """
        answer = self.answer or self.lead
        rest = tuple(line for line in self.lines if line != answer)
        if not self.scoped:
            return answer, rest
        return (f"{self.label}: {answer}", rest) if answer in self.lines else (answer, self.labelled)

    @property
    def labelled(self) -> tuple[str, ...]:
        """Lead and details, each with the label."""
        return tuple(f"{self.label}: {line}" for line in self.lines)


def say(key: str, label: str, *lines: str, level: Level = "note", answer: str = "", scoped: bool = False) -> Statement:
    """Return a statement of one line or more.

    >>> say("reach", "Reach", "0.4 of ‖G‖", "0.2 for a fresh adapter").details
    ('0.2 for a fresh adapter',)
    """
    lead, *details = [part for line in lines for part in line.split("\n")] or [""]
    return Statement(key, label, lead, tuple(details), level, answer, scoped)


def find(statements: Iterable[Statement], key: str) -> Statement | None:
    """Return the first statement with a key; None if there is none."""
    return next((one for one in statements if one.key == key), None)


def lines_of(statements: Iterable[Statement], key: str) -> tuple[str, ...]:
    """Return the lines of the statement with a key; none if there is none."""
    found = find(statements, key)
    return found.lines if found else ()


def compared(results: Results[Any], *more: str) -> Statement:
    """Return what was compared: every input, what else is to be said of it, and its notes."""
    return say("compared", "Compared", *inputs(results.run), *more, *notes(results.run))


def left_out(results: Results[Any]) -> Statement:
    """Return what was left out, and why."""
    return say("left_out", "Left out", left_out_line(results.left_out))


def ending(results: Results[Any], so_far: str = "layers measured so far") -> list[Statement]:
    """Return the last statements: what could not be measured, and that the run did not finish."""
    found = []
    if results.unmeasured:
        found.append(say("not_measured", "Not measured", not_measured(results.unmeasured), level="failure"))
    if results.end is None:
        found.append(say("unfinished", "Warning", f"the run did not finish: these are the {so_far}", level="failure"))
    return found


_STYLES: dict[Level, str] = {"ok": "bold green", "note": "", "warning": "bold yellow", "failure": "bold red"}


def summary_of(statements: Sequence[Statement], then: str | None = None) -> Table:
    """Return a summary as a terminal shows it: a label, and what is said.

    Args:
        statements: In their order.
        then: The command that a user would run next, said last.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    # What is said of a run that did not finish is said of its part: the reader has to know that first.
    first = sorted(statements, key=lambda one: one.key != "unfinished")
    for one in [*first, *([say("next", "Next", then)] if then else [])]:
        grid.add_row(one.label, Text(one.text, style=_STYLES[one.level]))
    return grid
