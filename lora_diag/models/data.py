"""Evaluation and training texts: files and folders → sequences of token ids.

A source is a text file, JSON lines, or a folder saved by Hugging Face's ``datasets``. Text files
are cut into consecutive windows; an incomplete last window is dropped unless it is the only one.
JSON lines and the rows of a data set give one sequence each: ``text``; ``prompt`` and
``completion``, of which only the completion is predicted; ``text`` and ``label`` for a classifier.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any

from lora_diag.errors import Given, InputError, UsageError, damaged
from lora_diag.models.opening import Model
from lora_diag.storage.documents import loads

# Columns of a data set that are read; others are ignored.
COLUMNS = ("text", "label", "prompt", "completion")
# Files that ``save_to_disk`` writes in the folder of a data set, and of a set of splits.
_STATE, _SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class TextSource:
    """The contents of a text file, JSON lines or a data set.

    Args:
        name: Name of the set: the file's name without its suffix, or the folder's.
        digest: 16 hex digits of a SHA-256: of the file; of a data set, of the rows that are read,
            as JSON lines.
        text: Content of a text file.
        rows: Otherwise the position, for messages, and the contents of each row.
        unit: Name of the rows in messages, a plural.
    """

    name: str
    digest: str
    text: str | None = None
    rows: tuple[tuple[str, dict[str, Any]], ...] = ()
    unit: str = "lines"


def check_texts(path: Path | str) -> None:
    """Check that a path can be a text: a file, or the folder of one data set.

    Raises:
        InputError: There is no such file; or the folder holds no data set, or a set of splits.
    """
    named = os.fspath(path)
    if not os.path.isdir(named):  # noqa: PTH112  (unlike Path.is_dir(), takes any name)
        if not os.path.isfile(named):  # noqa: PTH113
            raise InputError(f"{path}: no such file; check the path")
        return
    folder = Path(path)
    if (folder / _SPLITS).is_file():
        splits = _read_json(folder / _SPLITS).get("splits")
        names = [str(split) for split in splits] if isinstance(splits, list) else []
        problem = f"holds the splits {', '.join(names)}"
        raise damaged(path, problem, f"give one, such as {folder / (names or ['train'])[0]}")
    if not (folder / _STATE).is_file():
        problem = f"is a folder without a data set ({_STATE} is missing)"
        raise damaged(path, problem, "save one with datasets' save_to_disk")


def read_source(path: Path | str) -> TextSource:
    """Read a text file, JSON lines (``.jsonl``, ``.json``) or a folder of ``datasets``."""
    check_texts(path)
    path = Path(path)
    return _read_data_set(path) if path.is_dir() else _read_file(path)


def _read_file(path: Path) -> TextSource:
    """Return the contents of a text file, or the rows of JSON lines.

    Raises:
        InputError: The file cannot be read, is not UTF-8, or a line is not a JSON object.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); convert it") from error
    digest = hashlib.sha256(content).hexdigest()[:16]
    if path.suffix in {".jsonl", ".json"}:
        return TextSource(path.stem, digest, rows=tuple(_read_lines(path, text)))
    return TextSource(path.stem, digest, text)


def _read_lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the position, for messages, and the object of each line of JSON lines; blank lines are
    skipped.

    Raises:
        InputError: A line is not a JSON object.
    """
    # Not splitlines(): JSON strings may contain U+2028 and U+0085 literally, as in web texts.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON ({error}); correct the line") from error
        if not isinstance(row, dict):
            raise InputError(
                f"{where} is not a JSON object with text, or prompt and completion; correct the "
                "line"
            )
        yield where, row


def _read_data_set(path: Path) -> TextSource:
    """Return the rows of a data set with the columns in use; a row with a class label also has the
    label's name.

    Raises:
        UsageError: datasets is not installed.
        InputError: datasets cannot open the folder, it names files outside, or it has neither text
            nor prompt and completion.
    """
    try:
        import datasets
    except ImportError as error:
        problem = f"{path}: is a folder of datasets, which needs {error.name}"
        raise UsageError(f"{problem}; install it with pip install datasets") from error
    _refuse_outside_paths(path)
    try:
        data = datasets.load_from_disk(str(path))
    # Raised by pyarrow, the file system, or a feature unknown to this version.
    except Exception as error:
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: datasets cannot open it: {problem}") from error
    columns = [name for name in COLUMNS if name in data.column_names]
    if "text" not in columns and not {"prompt", "completion"} <= set(columns):
        problem = f"has the columns {', '.join(map(str, data.column_names))}"
        raise damaged(
            path,
            problem,
            "rename them to text, text and label, or prompt and completion (rename_column)",
        )
    chosen = data.select_columns(columns)
    names = getattr(chosen.features.get("label"), "names", None)
    rows, digest = [], hashlib.sha256()
    for number, row in enumerate(chosen):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        label = row.get("label")
        if names and isinstance(label, int) and 0 <= label < len(names):
            row = {**row, "label_name": names[label]}
        rows.append((f"{path}: row {number}", row))
    return TextSource(
        path.name or path.resolve().name, digest.hexdigest()[:16], rows=tuple(rows), unit="rows"
    )


def _refuse_outside_paths(path: Path) -> None:
    """Refuse a data set whose state names files outside its folder.

    Raises:
        InputError: A file is outside the folder, or has no valid name; or the state cannot be read.
    """
    files = _read_json(path / _STATE).get("_data_files")
    if not isinstance(files, list):
        return
    for file in files:
        name = file.get("filename") if isinstance(file, dict) else None
        if not isinstance(name, str) or PurePath(name).name != name:
            problem = f"names {name!r}, which is not a file in this folder"
            raise damaged(path / _STATE, problem, "save the data set again")


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if it holds another value.

    Raises:
        InputError: The file cannot be read, or is not JSON.
    """
    try:
        document = loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    return document if isinstance(document, dict) else {}


# The label of a position that is not predicted, as torch's cross-entropy has it.
IGNORED = -100
# For a masked model: fraction of the tokens that are hidden and predicted, and the seed of their
# choice.
MASKED, MASK_SEED = 0.15, 0


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids and labels.

    Args:
        ids: Token ids.
        labels: For a causal model the token ids, one for each of ``ids``; the loss shifts them. For
            a masked model the original ids of the masked tokens, not shifted. Positions without a
            prediction have ``IGNORED``. For a classifier the class alone.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Texts:
    """The sequences of one text: a file or a data set.

    Args:
        name: The file's name without its suffix, or the folder's.
        path: The path as given.
        sequences: In the order of the file.
        hash: 16 hex digits of the SHA-256 of the file, or of a data set's rows.
        form: What the sequences are, such as ``windows of 64 tokens``.
        notes: How many rows or sequences were truncated or left out.
        shifted: Whether the user declared it as shifted.
    """

    name: str
    path: str
    sequences: tuple[Sequence, ...]
    hash: str
    form: str
    notes: tuple[str, ...] = ()
    shifted: bool = False

    @property
    def about(self) -> str:
        """Number and form of the sequences."""
        return f"{len(self.sequences)} {self.form}"

    def reduce(self, count: int, reason: str) -> Texts:
        """Return the set with ``count`` of its sequences, evenly spaced, because neighbours are
        alike, and a note.
        """
        if count >= (n := len(self.sequences)):
            return self
        note = f"{count} of {n} sequences, evenly spaced, {reason}"
        sequences = tuple(self.sequences[i * n // count] for i in range(count))
        return replace(self, sequences=sequences, notes=(*self.notes, note))

    def split(self) -> tuple[Texts, Texts]:
        """Return the first 60% and the last 30% of the sequences, of which one chooses and the
        other judges: a gap is between them, because neighbours are alike.

        Raises:
            InputError: There are fewer than ten.
        """
        n = len(self.sequences)
        if n < 10:
            problem = f"{n} sequences are too few to split into a part that chooses and one that "
            raise damaged(self.path, f"{problem}judges", "give another file as $eval, or more text")
        first, last = 6 * n // 10, n - 3 * n // 10
        chooses, judges = f"the first {first} of {n} choose", f"the last {n - last} judge"
        return (
            replace(self.first(first), notes=(*self.notes, chooses)),
            replace(
                self,
                name=f"{self.name}-end",
                sequences=self.sequences[last:],
                notes=(*self.notes, judges),
            ),
        )

    def apart_from(self, other: Texts) -> Texts:
        """Return the set without the sequences that another set has too.

        Raises:
            InputError: These are more than half.
        """
        known = {sequence.ids for sequence in other.sequences}
        own = tuple(sequence for sequence in self.sequences if sequence.ids not in known)
        common = len(self.sequences) - len(own)
        if common > len(own):
            problem = f"{common} of {len(self.sequences)} sequences are also in {other.path}"
            raise damaged(self.path, problem, "give text that did not choose")
        note = f"{common} sequences that are also in {other.name} left out"
        return replace(self, sequences=own, notes=(*self.notes, note)) if common else self

    def tail(self, count: int) -> Texts:
        """Return the same set with the last tokens of each sequence only."""
        cut = (Sequence(one.ids[-count:], one.labels[-count:]) for one in self.sequences)
        return replace(self, sequences=tuple(cut))

    def count_batches(self, size: int) -> int:
        """Return the number of batches of at most ``size`` sequences."""
        return -(-len(self.sequences) // size)

    def batches(self, size: int) -> Iterator[list[Sequence]]:
        """Yield the sequences in batches of at most ``size``."""
        for first in range(0, len(self.sequences), size):
            yield list(self.sequences[first : first + size])

    def first(self, count: int) -> Texts:
        """Return the same set with its first sequences only."""
        return replace(self, sequences=self.sequences[:count])


def read_texts(
    path: Path | str, model: Model, max_sequences: int | None = None, shifted: bool = False
) -> Texts:
    """Read a text and cut it into sequences of the model's length at most.

    Args:
        path: A file, ``.jsonl`` and ``.json`` are read as JSON lines, any other as text; or a
            folder that ``datasets`` saved with ``save_to_disk``.
        model: Gives tokenizer, length and kind.
        max_sequences: Maximum number of sequences to keep, evenly spaced in the file, because
            neighbours are alike; None for all.
        shifted: Whether the user declared it as shifted.

    Raises:
        InputError: The file cannot be read, its contents do not fit the kind of model, or it has
            nothing to predict.
    """
    source = read_source(path)
    if model.kind == "classifier" and source.text is not None:
        raise InputError(
            f"{path}: a classifier needs JSON lines with text and label (.jsonl), or a data set of "
            "these"
        )
    if source.text is not None:
        cut = list(_split_into_windows(source.text, model))
    else:
        tokenize = (
            _tokenize_classification if model.kind == "classifier" else _tokenize_continuation
        )
        cut = [tokenize(row, where, model) for where, row in source.rows]
    if model.kind == "masked":
        cut = [
            (_mask_sequence(sequence, index, model), truncated)
            for index, (sequence, truncated) in enumerate(cut)
        ]
    notes = []
    truncated = sum(is_truncated for _, is_truncated in cut)
    if source.text is None and truncated:
        notes.append(f"{truncated} of {len(cut)} {source.unit} were cut to {model.length} tokens")
    sequences = [
        sequence for sequence, _ in cut if sequence.ids and _count_predicted(sequence, model)
    ]
    if len(sequences) < len(cut):
        empty = len(cut) - len(sequences)
        notes.append(
            f"{empty} of {len(cut)} {source.unit} have nothing to predict and are left out"
        )
    if not sequences:
        raise InputError(f"{path}: has no token to predict; give longer text")
    form = source.unit if source.text is None else f"windows of {len(sequences[0].ids)} tokens"
    if model.kind == "masked":
        form += f", {MASKED:.0%} of the tokens replaced by the mask, seed {MASK_SEED}"
    texts = Texts(
        source.name, str(path), tuple(sequences), source.digest, form, tuple(notes), shifted=shifted
    )
    return texts if max_sequences is None else texts.reduce(max_sequences, "by --max-sequences")


def name_apart(texts: Iterable[Texts], labels: Iterable[str | None]) -> list[Texts]:
    """Return sets in which those that share a name have their label, if there is one,
    in its place.
    """
    texts = list(texts)
    names = [text_set.name for text_set in texts]
    apart = []
    for text_set, label in zip_longest(texts, labels):
        shared = names.count(text_set.name) > 1
        apart.append(replace(text_set, name=label) if label and shared else text_set)
    return apart


def check_names(texts: list[Texts]) -> None:
    """Refuse two sets with one name, which records could not distinguish.

    Raises:
        UsageError: Two sets have one name.
    """
    names = [text_set.name for text_set in texts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                Given("eval"),
                f"two evaluation sets have the name {name}",
                "rename one of the files",
            )


def count_predictions(texts: Texts, model: Model) -> int:
    """Return the number of predictions of which a loss on a text is the mean: next tokens, hidden
    tokens or classes.

    Args:
        texts: The text.
        model: A causal model predicts no token at the first position of a sequence.
    """
    return sum(_count_predicted(sequence, model) for sequence in texts.sequences)


def _count_predicted(sequence: Sequence, model: Model) -> int:
    """Return the number of predictions of a sequence."""
    first = 1 if model.kind == "causal" else 0
    return sum(label != IGNORED for label in sequence.labels[first:])


def _mask_sequence(sequence: Sequence, index: int, model: Model) -> Sequence:
    """Mask some of the predictable tokens, at least one if any, chosen at random by the index of
    the sequence.

    All chosen tokens are replaced by the mask: the random and unchanged tokens of BERT's 80/10/10
    rule (Devlin et al.
    2019) are easier to predict, and add noise to comparisons.
    """
    positions = [position for position, label in enumerate(sequence.labels) if label != IGNORED]
    # Only ``random()`` is guaranteed to be stable across versions of Python.
    generator = random.Random(f"{MASK_SEED}:{index}")
    shuffled = sorted(
        positions, key={position: generator.random() for position in positions}.__getitem__
    )
    hidden = set(shuffled[: max(1, round(MASKED * len(positions)))])
    assert model.tokens.mask is not None
    return Sequence(
        tuple(
            model.tokens.mask if position in hidden else token
            for position, token in enumerate(sequence.ids)
        ),
        tuple(
            label if position in hidden else IGNORED
            for position, label in enumerate(sequence.labels)
        ),
    )


def _split_into_windows(text: str, model: Model) -> Iterator[tuple[Sequence, bool]]:
    """Yield consecutive windows of a text with the tokenizer's special tokens; none is truncated
    (False).
    """
    tokens = model.tokens
    ids = tokens.ids(text)
    room = model.length - len(tokens.first) - len(tokens.last)
    for start in range(0, max(1, len(ids) - room + 1), room):
        window = ids[start : start + room]
        whole = (*tokens.first, *window, *tokens.last)
        labels = whole
        if model.kind == "masked":  # special tokens are not predicted
            labels = (*([IGNORED] * len(tokens.first)), *window, *([IGNORED] * len(tokens.last)))
        yield Sequence(whole, labels), False


def _tokenize_continuation(row: dict[str, Any], where: str, model: Model) -> tuple[Sequence, bool]:
    """Return the sequence of ``text``, or of ``prompt`` and ``completion``, and whether it was
    truncated.

    Raises:
        InputError: The row has neither.
    """
    tokens = model.tokens
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        prompt = [*tokens.first, *tokens.ids(row["prompt"])]
        completion = tokens.ids(row["completion"])
    elif isinstance(row.get("text"), str):
        prompt, completion = list(tokens.first), tokens.ids(row["text"])
    else:
        raise InputError(f"{where} has neither text nor prompt and completion; add them")
    ids, labels = [*prompt, *completion], [*([IGNORED] * len(prompt)), *completion]
    room = model.length - len(tokens.last)
    masked_last = [IGNORED] * len(tokens.last)
    return Sequence((*ids[:room], *tokens.last), (*labels[:room], *masked_last)), len(ids) > room


def _tokenize_classification(
    row: dict[str, Any], where: str, model: Model
) -> tuple[Sequence, bool]:
    """Return the sequence of ``text`` with its ``label``, a class name or index, and whether it was
    truncated.

    A data set's class name takes precedence over its number if the model has a class of that name.

    Raises:
        InputError: The row has no text or label, or the model has no such class.
    """
    text, label = row.get("text"), row.get("label")
    if not isinstance(text, str) or not isinstance(label, int | str):
        raise InputError(f"{where} has no text and label; add them")
    name = label if isinstance(label, str) else row.get("label_name")
    index = model.labels.get(name) if isinstance(name, str) else None
    if index is None and isinstance(label, int):
        index = label
    if index is None or not 0 <= index < max(1, len(model.labels)):
        problem = f"label {label!r} is not one of the model's {len(model.labels)} classes"
        raise damaged(where, problem, "map it to one of them")
    tokens = model.tokens
    room = model.length - len(tokens.first) - len(tokens.last)
    ids = tokens.ids(text)
    return Sequence((*tokens.first, *ids[:room], *tokens.last), (index,)), len(ids) > room
