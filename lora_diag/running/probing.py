"""What all probes have in common: sets of texts, the run record, records kept, progress, and the estimate of a cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_diag.deltas import Delta, Pairing
from lora_diag.errors import UsageError
from lora_diag.models.data import Texts, check_names, read_texts
from lora_diag.models.losses import measure
from lora_diag.models.opening import Model
from lora_diag.models.rows import check_texts
from lora_diag.records import AnyRecord, LeftOut, Results, ResultsWriter, Run, RunInput, WholeRecord, totals
from lora_diag.rendering.text import duration
from lora_diag.running.engines import Layout
from lora_diag.running.fingerprint import legible
from lora_diag.running.measuring import not_paired
from lora_diag.version import __version__


class Watch:
    """Counts batches and tells who wants to know.

    Args:
        on_progress: Called with what is being done, batches done and batches in all.
        on_record: Called with every record.
        on_note: Called with the estimate of what a run will cost.

    Attributes:
        total: Batches in all; set before the first.
    """

    def __init__(
        self,
        on_progress: Callable[[str, int, int], None] | None,
        on_record: Callable[[AnyRecord], None] | None,
        on_note: Callable[[str], None] | None,
    ) -> None:
        self._on_progress = on_progress or (lambda label, done, total: None)
        self.record = on_record or (lambda record: None)
        self.note = on_note or (lambda text: None)
        self.done, self.total = 0, 0

    def batch(self, label: str) -> None:
        """One batch more is done."""
        self.done += 1
        self._on_progress(label, self.done, self.total)


class Kept:
    """The records of a run, those of an interrupted one first.

    Args:
        writer: Where they go.
        watch: Who is told.

    Attributes:
        records: So far, of whatever kinds the probe has.
        finished: The run, if it was finished before.
    """

    def __init__(self, writer: ResultsWriter[Any], watch: Watch) -> None:
        self._writer, self._watch = writer, watch
        earlier = writer.earlier
        self.finished = earlier if earlier.end is not None else None
        self.records: list[Any] = list(earlier.whole)
        self._left_out = list(earlier.left_out)
        self._keys = set(map(key_of, self.records))
        for record in earlier.records():
            watch.record(record)

    def has(self, texts: Sequence[Texts], **fields: Any) -> bool:
        """Say whether there is a record with these fields on every set; ``record`` goes first where kinds are mixed."""
        have = {r.set for r in self.records if all(getattr(r, name, ...) == value for name, value in fields.items())}
        return {each.name for each in texts} <= have

    def put(self, *records: WholeRecord) -> None:
        """Write those records that are not there yet, in one go, and tell them."""
        new = [record for record in records if key_of(record) not in self._keys]
        if new:
            self._writer.append(*new)
        for record in new:
            self._keys.add(key_of(record))
            self.records.append(record)
            self._watch.record(record)

    def end(self, left_out: Iterable[LeftOut]) -> Results[Any]:
        """Write the rest, and return everything."""
        for item in list(left_out)[len(self._left_out) :]:
            self._left_out.append(item)
            self._writer.append(item)
            self._watch.record(item)
        (last,) = self._writer.append(totals([], self._left_out))
        self._watch.record(last)
        return Results(self._writer.run, (), tuple(self._left_out), last, tuple(self.records))


def key_of(record: WholeRecord) -> tuple[Any, ...]:
    """Return by what a record is told from the others of its run."""
    return (record.record, *(getattr(record, name) for name in record.key))


def check(batch: int, max_sequences: int | None, **words: tuple[str, tuple[str, ...]]) -> None:
    """Refuse numbers and words that make no sense.

    Raises:
        UsageError: There are such.
    """
    for option, value in (("--batch", batch), ("--max-sequences", max_sequences)):
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: must be at least 1")
    for option, (word, known) in words.items():
        if word not in known:
            raise UsageError(f"--{option} {word}: use {', '.join(known)}")


def check_files(evaluate: Sequence[Path | str], *others: Path | str) -> None:
    """Refuse texts that are not there before a model is opened.

    Raises:
        UsageError: No evaluation set is named.
        InputError: A file is not there, or a folder holds no data set.
    """
    if not evaluate:
        raise UsageError("--eval: name at least one file of held-out text")
    for path in (*evaluate, *others):
        check_texts(path)


def read_sets(
    model: Model, evaluate: Sequence[Path | str], shifted: Sequence[Path | str], most: int | None
) -> list[Texts]:
    """Read all evaluation sets.

    Raises:
        UsageError: Two have one name.
        InputError: One cannot be read.
    """
    texts = [read_texts(path, model, most) for path in evaluate]
    texts += [read_texts(path, model, most, shifted=True) for path in shifted]
    check_names(texts)
    return texts


def described(texts: Texts, role: str | None = None) -> RunInput:
    """Return what the run record says of a set."""
    return RunInput(
        role=role or ("shifted" if texts.shifted else "eval"),
        path=legible(texts.path),
        kind=texts.about,
        tensors=len(texts.sequences),
        notes=texts.notes,
        fingerprint=texts.hash,
    )


def run_of(
    command: str, inputs: tuple[RunInput, ...], settings: dict[str, Any], model: Model, batch: int, dtype: str
) -> Run:
    """Return the run record: what every probe was done with."""
    running = {
        "length": model.length,
        "batch": batch,
        "dtype": dtype,
        "device": model.device.type,
        "tokens": legible(model.tokens.about),
    }
    return Run(command=command, version=__version__, inputs=inputs, settings={**settings, **running})


def left_out(pairing: Pairing, absent: Iterable[Delta]) -> list[LeftOut]:
    """Return what could not be paired, and what the model does not use."""
    detail = "the model that transformers builds of BASE has no such weight"
    return [
        *not_paired(pairing, Layout(1, 1), "cpu"),
        *(LeftOut(layer=d.layer, shape=d.shape, reason="not_in_model", detail=detail) for d in absent),
    ]


def batches_of(texts: Sequence[Texts], size: int) -> int:
    """Return how many batches all sets have."""
    return sum(-(-len(each.sequences) // size) for each in texts)


def counted(number: int, one: str, many: str) -> str:
    """Return a number with its noun."""
    return f"{number} {one if number == 1 else many}"


def estimate(model: Model, texts: Texts, batch: int, watch: Watch, what: str, more: str = "") -> None:
    """Time one batch and tell what the run will take."""
    first = texts.first(batch)
    measure(model, first, batch)  # the first pass also sets things up
    start = time.perf_counter()
    measure(model, first, batch)
    took = time.perf_counter() - start
    watch.note(f"about {duration(took * watch.total)}: {what}, {watch.total} batches of {took:.2g} s each{more}")
