"""``probe``: what a model's loss says of an update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_diag.api.fingerprint import legible
from lora_diag.api.inputs import compare
from lora_diag.api.measuring import not_paired
from lora_diag.deltas import Pairing
from lora_diag.engines import Layout
from lora_diag.errors import UsageError
from lora_diag.linalg import resolve_device
from lora_diag.results import AnyRecord, LeftOut, Probe, Results, ResultsWriter, Run, RunInput, totals
from lora_diag.training.data import Texts, check_names, read_texts
from lora_diag.training.losses import measure
from lora_diag.training.models import Model, open_model
from lora_diag.training.swapping import Swapped
from lora_diag.training.truncation import cells_of, truncated_layers, truncation
from lora_diag.version import __version__

RANKS = (0, 1, 2, 4, 8, 16, 32, 64)
PER = ("all", "layer", "type")
REST = ("tuned", "base")


def probe_truncation(
    base: Path | str,
    tuned: Path | str,
    *,
    evaluate: Sequence[Path | str],
    shifted: Sequence[Path | str] = (),
    ranks: Sequence[int] = RANKS,
    per: str = "all",
    rest: str = "tuned",
    layers: str | None = None,
    exclude: str | None = None,
    length: int | None = None,
    batch: int = 8,
    max_sequences: int | None = None,
    tokenizer: str = "auto",
    dtype: str = "float32",
    device: str = "auto",
    output: Path | str | None = None,
    resume: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
    on_record: Callable[[AnyRecord], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Results[Any]:
    r"""Measure the loss of W_0 + ΔW_r for each rank r, ΔW_r the best rank-r approximation of ΔW (Eckart–Young).

    Weights are swapped in place; nothing is trained. Norms, biases, embeddings and head are not truncated.

    Args:
        base: The model before: a folder that transformers can open, or a Hub id.
        tuned: The model after, or an adapter.
        evaluate: Text or JSONL files of the kind that TUNED was trained on, but held out.
        shifted: Files of another kind, to see what truncation does there.
        ranks: Ranks r; 0 takes the truncated layers back to ``base``.
        per: ``all`` layers truncated together; or each ``layer`` or module ``type`` alone, the others as in TUNED.
        rest: What the tensors are that are not truncated: as in ``tuned``, or as in ``base``, which is what an adapter
            on the matrices could give.
        layers: Regular expression; only weights whose name contains a match are truncated.
        exclude: Regular expression; weights whose name contains a match are not.
        length: Tokens of a sequence; by default 512 or what the model has room for.
        batch: Sequences in a batch.
        max_sequences: Use the first so many sequences of each file.
        tokenizer: ``auto``, ``bytes`` or a folder.
        dtype: Of the weights while they are measured.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        output: Results file, appended record by record.
        resume: Go on behind what an interrupted run left in ``output``.
        on_progress: Called with what is being measured, batches done and batches in all.
        on_record: Called with every record, in the order of the file, as it comes.
        on_note: Called with the estimate of what the run will cost, before it begins.

    Returns:
        The records are in ``whole``: the losses of BASE, TUNED and every truncation, set by set.

    Raises:
        UsageError: An option makes no sense, or the extra ``train`` is not installed.
        InputError: An input cannot be read, or transformers cannot open BASE.
        NothingComparedError: The checkpoints have no weight in common.

    Reference:
        Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    _check(batch, max_sequences, per=(per, PER), rest=(rest, REST))
    if not ranks or min(ranks) < 0:
        raise UsageError(f"--ranks {','.join(map(str, ranks))}: ranks must be whole numbers from 0 up")
    on = resolve_device(device)
    compared = compare(base, tuned)
    deltas = compared.pairing.deltas
    chosen = truncated_layers(deltas, layers, exclude)
    cells = cells_of(chosen, sorted(set(ranks)), per)
    model = open_model(base, on, dtype, length, tokenizer)
    texts = _texts(model, evaluate, shifted, max_sequences)
    swapped = Swapped(model, deltas, max(ranks))
    settings = {"ranks": sorted(set(ranks)), "per": per, "rest": rest, "layers": layers, "exclude": exclude}
    run = _run("probe truncation", (*compared.inputs, *map(_described, texts)), settings, model, batch, dtype)

    watch = _Watch(on_progress, on_record, on_note)
    with ResultsWriter[Any](Path(output) if output is not None else None, run, resume) as writer:
        writer_has = _Kept(writer, watch)
        if writer_has.finished is not None:
            return writer_has.finished
        todo = [cell for cell in cells if not writer_has.all_of(texts, cell)]
        batches = sum(-(-len(each.sequences) // batch) for each in texts)
        watch.total = (len(todo) + 2) * batches
        svds = f", and the SVD of {_count(len(chosen), 'matrix', 'matrices')}"
        _estimate(model, texts, batch, watch, f"{len(todo) + 2} losses on {_count(len(texts), 'set', 'sets')}", svds)
        for record in truncation(model, swapped, texts, todo, list(chosen), rest, batch, watch.batch):
            writer_has.put(record)
        return writer_has.end(_left_out(compared.pairing, swapped))


class _Watch:
    """Counts batches and tells who wants to know."""

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


class _Kept:
    """The records of a run, those of an interrupted one first."""

    def __init__(self, writer: ResultsWriter[Any], watch: _Watch) -> None:
        self._writer, self._watch = writer, watch
        earlier = writer.earlier
        self.finished = earlier if earlier.end is not None else None
        self._records = [record for record in earlier.whole if isinstance(record, Probe)]
        self._left_out = list(earlier.left_out)
        self._keys = set(map(_key, self._records))
        for record in earlier.records():
            watch.record(record)

    def all_of(self, texts: Sequence[Texts], cell: Any) -> bool:
        """Say whether a truncation was measured on every set."""
        names = {each.name for each in texts}
        have = {
            record.set
            for record in self._records
            if record.subject == cell.subject
            and (record.rank, record.layer, record.module_type) == (cell.rank, cell.layer, cell.module_type)
        }
        return names <= have

    def put(self, record: Probe) -> None:
        """Write a record that is not there yet, and tell it."""
        if _key(record) not in self._keys:
            self._keys.add(_key(record))
            self._records.append(record)
            self._writer.append(record)
            self._watch.record(record)

    def end(self, left_out: Iterable[LeftOut]) -> Results[Any]:
        """Write the rest, and return everything."""
        for item in list(left_out)[len(self._left_out) :]:
            self._left_out.append(item)
            self._writer.append(item)
            self._watch.record(item)
        last = totals([], self._left_out)
        self._writer.append(last)
        self._watch.record(last)
        return Results(self._writer.run, (), tuple(self._left_out), last, tuple(self._records))


def _key(record: Probe) -> tuple[Any, ...]:
    return tuple(getattr(record, name) for name in Probe.key)


def _check(batch: int, max_sequences: int | None, **words: tuple[str, tuple[str, ...]]) -> None:
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


def _texts(
    model: Model, evaluate: Sequence[Path | str], shifted: Sequence[Path | str], most: int | None
) -> list[Texts]:
    if not evaluate:
        raise UsageError("--eval: name at least one file of held-out text")
    texts = [read_texts(path, model, most) for path in evaluate]
    texts += [read_texts(path, model, most, shifted=True) for path in shifted]
    check_names(texts)
    return texts


def _described(texts: Texts) -> RunInput:
    return RunInput(
        role="shifted" if texts.shifted else "eval",
        path=legible(texts.path),
        kind=texts.about,
        tensors=len(texts.sequences),
        notes=texts.notes,
        fingerprint=texts.hash,
    )


def _run(
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


def _left_out(pairing: Pairing, swapped: Swapped) -> list[LeftOut]:
    """Return what could not be paired, and what the model does not use."""
    detail = "the model that transformers builds of BASE has no such weight"
    return [
        *not_paired(pairing, Layout(1, 1), "cpu"),
        *(LeftOut(layer=d.layer, shape=d.shape, reason="not_in_model", detail=detail) for d in swapped.absent),
    ]


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _estimate(model: Model, texts: Sequence[Texts], batch: int, watch: _Watch, what: str, more: str = "") -> None:
    """Time one batch and tell what the run will take."""
    first = texts[0].first(batch)
    measure(model, first, batch)  # the first pass also sets things up
    start = time.perf_counter()
    measure(model, first, batch)
    took = time.perf_counter() - start
    watch.note(f"about {duration(took * watch.total)}: {what}, {watch.total} batches of {took:.2g} s each{more}")


def duration(seconds: float) -> str:
    """Return a time in words.

    >>> duration(0.4), duration(75), duration(7300)
    ('1 s', '75 s', '2.0 h')
    """
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
