"""Progress of a run: events, records, and the records of an interrupted run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lora_diag.records import (
    AnyRecord,
    LayerRecord,
    LeftOut,
    Results,
    ResultsWriter,
    WholeRecord,
    totals,
)

L = TypeVar("L", bound=LayerRecord)


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a run.

    Args:
        label: The next layer, or a probe's current activity.
        done: Finished layers; for a probe, batches and steps.
        total: Total number of them; for a probe, the number known so far.
        entries_done: Matrix entries of the finished layers; 0 for a probe.
        entries: Matrix entries of all layers; 0 for a probe.
    """

    label: str
    done: int
    total: int
    entries_done: int = 0
    entries: int = 0

    @property
    def fraction(self) -> float:
        """Finished fraction of the work, by entries where they are known."""
        if self.entries:
            return self.entries_done / self.entries
        return self.done / max(1, self.total)


class ProgressReporter:
    """Callbacks for progress, records and notes.

    Args:
        on_progress: Called with the progress of the run.
        on_record: Called with every record, in the order of the file.
        on_note: Called with the estimated cost of a run.

    Attributes:
        done: Batches that ``batch`` has counted.
        total: Batches expected in all; set by the caller, and increased if it is exceeded.
    """

    def __init__(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        on_record: Callable[[AnyRecord], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self.progress = on_progress or (lambda event: None)
        self.record = on_record or (lambda record: None)
        self.note = on_note or (lambda text: None)
        self.done, self.total = 0, 0

    def batch(self, label: str, count: int = 1) -> None:
        """Add completed batches and report progress; a count of 0 changes only the label."""
        self.done += count
        self.total = max(self.total, self.done)
        self.progress(Progress(label, self.done, self.total))


class RunRecords(Generic[L]):
    """The records of a run; records of an interrupted run come first and are passed on immediately.

    Args:
        writer: The results file.
        watch: Callbacks that get every record.

    Attributes:
        run: The run record; for a resumed run, with the updated settings.
        finished: The results, if the run was already finished; else None.
        layers: The records of layers so far.
        records: The records of the run as a whole so far, of any kind.
    """

    def __init__(self, writer: ResultsWriter[L], watch: ProgressReporter) -> None:
        self._writer, self.watch, self.run = writer, watch, writer.run
        earlier = writer.earlier
        self.finished = earlier if earlier.end is not None else None
        self.layers: list[L] = list(earlier.layers)
        self.records: list[Any] = list(earlier.whole)
        self._left_out = list(earlier.left_out)
        self._keys = set(map(key_of, self.records))
        for record in earlier.records():
            watch.record(record)

    def has(self, sets: Iterable[str], **fields: Any) -> bool:
        """Return whether every evaluation set has a record with these fields.

        Args:
            sets: Names of the evaluation sets.
            **fields: Fields by name; a record without one of them does not count.
        """
        return set(sets) <= {record.set for record in self.find(**fields)}

    def find(self, **fields: Any) -> Iterator[Any]:
        """Yield the records of the run as a whole that have these fields."""
        for record in self.records:
            if all(getattr(record, name, ...) == value for name, value in fields.items()):
                yield record

    def put(self, *records: L | WholeRecord) -> None:
        """Write records of layers, and those of the whole run that are new, immediately, and pass
        them on.
        """
        new = [r for r in records if not isinstance(r, WholeRecord) or key_of(r) not in self._keys]
        for record in new:
            if isinstance(record, WholeRecord):
                self._keys.add(key_of(record))
                self.records.append(record)
            else:
                self.layers.append(record)
        self._write(*new)

    def end(self, left_out: Iterable[LeftOut]) -> Results[L]:
        """Write records of skipped tensors beyond those of the interrupted run, and the totals;
        return all results.
        """
        for record in list(left_out)[len(self._left_out) :]:
            self._left_out.append(record)
            self._write(record)
        (last,) = self._write(totals(self.layers, self._left_out))
        return Results(
            self.run, tuple(self.layers), tuple(self._left_out), last, tuple(self.records)
        )

    def _write(self, *records: AnyRecord) -> tuple[Any, ...]:
        """Append records to the file and pass them on; return them as written."""
        written = self._writer.append(*records) if records else ()
        for record in written:
            self.watch.record(record)
        return written


def key_of(record: WholeRecord) -> tuple[Any, ...]:
    """Return the key that distinguishes a record from the others of its run."""
    return (record.record, *(getattr(record, name) for name in record.key))
