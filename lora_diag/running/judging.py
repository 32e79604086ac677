"""Losses of several contenders on evaluation sets, with one model in memory.

A contender is BASE with its weights changed in place. It is measured on all sets before the next
one, and its records are written then, so that an interrupted run resumes after the last contender.
The ends come first, such as BASE and TUNED: all others are compared with them, on the same
sequences. A resumed run measures them again, since records keep rounded losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from lora_diag.errors import InputError
from lora_diag.models.data import Texts
from lora_diag.models.losses import LossesBySet
from lora_diag.records import WholeRecord
from lora_diag.records.probe import Subject
from lora_diag.rendering.text import quantity
from lora_diag.running.probing import ProbeRun
from lora_diag.running.progress import RunRecords


class Contender(Protocol):
    """A model whose losses are measured."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """The fields that distinguish its records from those of other contenders."""


C = TypeVar("C", bound=Contender)


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A contender of which records state the kind and the name.

    Args:
        subject: Kind of model, as in ``Probe``.
        name: Its path or rule; empty for BASE and TUNED.
        applied: Gives the model in memory its weights while the block runs.
        params: Number of parameters in its files; None if it is not stated.
    """

    subject: Subject
    name: str = ""
    applied: Callable[[], AbstractContextManager[object]] = nullcontext
    params: int | None = None

    @property
    def label(self) -> str:
        """Its name, for progress."""
        return self.name or self.subject

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that distinguish its records."""
        return {"subject": self.subject, "name": self.name}


def list_missing(
    records: RunRecords[Any], texts: Iterable[Texts], contenders: Iterable[C]
) -> list[C]:
    """Return the contenders that lack a record on a set."""
    names = [each.name for each in texts]
    return [each for each in contenders if not records.has(names, **each.fields)]


@dataclass
class Judge(Generic[C]):
    """The evaluation of contenders.

    Args:
        run: The run, with the open model.
        texts: The evaluation sets.
        records: The records of the run.
        ends: The contenders that all are compared with: BASE, or BASE and TUNED.
        measure: Puts a contender's weights into the model; returns its losses on every set.
        make_record: ``make_record(contender, texts, losses, *ends)`` returns the record of a
            contender on a set, from its losses there and those of the ends.
        found: The losses of the ends on every set, once they are measured.
    """

    run: ProbeRun[Any]
    texts: Sequence[Texts]
    records: RunRecords[Any]
    ends: Sequence[C]
    measure: Callable[[C], LossesBySet]
    make_record: Callable[..., WholeRecord]
    found: list[LossesBySet] = field(default_factory=list)

    def judge(self, contenders: Iterable[C], later: int = 0, note: str = "") -> None:
        """Measure the ends, then the contenders that have no records yet.

        Args:
            contenders: The contenders besides the ends.
            later: Number of contenders that ``add`` may get.
            note: Text to append to the estimate of the duration.

        Raises:
            InputError: A loss of an end is not finite.
        """
        todo = list_missing(self.records, self.texts, contenders)
        count = len(self.ends) + len(todo) + later
        passes = count * self.run.batches(self.texts)
        self.run.watch.total = self.run.watch.done + passes
        work = f"{count} losses on {quantity(len(self.texts), 'set')}"
        self.run.estimate(self.texts[0], work, note, passes)
        for name, end in zip(("BASE", "TUNED"), self.ends, strict=False):
            losses = self.measure(end)
            require_finite(name, losses)
            self.found.append(losses)
        for end, losses in zip(self.ends, self.found, strict=True):
            self._put(end, losses)
        self.add(todo)

    def add(self, contenders: Iterable[C]) -> None:
        """Measure contenders that have no records yet."""
        for contender in list_missing(self.records, self.texts, contenders):
            self._put(contender, self.measure(contender))

    def _put(self, contender: C, losses: LossesBySet) -> None:
        """Write the records of a contender."""
        for texts in self.texts:
            own, *ends = (found[texts.name] for found in (losses, *self.found))
            self.records.put(self.make_record(contender, texts, own, *ends))


def require_finite(name: str, losses: LossesBySet) -> None:
    """Require that a model, given by its name, has a finite loss on every set.

    Raises:
        InputError: A loss is not finite.
    """
    for text_set, own in losses.items():
        if not own.is_finite:
            problem = f"its loss on {text_set} is not finite"
            raise InputError(name, problem, "check the weights, or use $dtype float32")
