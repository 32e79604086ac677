"""Evaluation and training texts: a file becomes sequences of token ids.

Text files are cut into windows that follow each other; what is left at the end is dropped unless it is all there is.
JSON lines give one sequence each: ``text``; ``prompt`` and ``completion``, of which only the completion is predicted;
``text`` and ``label`` for a classifier.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diag.errors import InputError, UsageError
from lora_diag.training.models import Model

# The label of a position that is not predicted, as torch's cross-entropy has it.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids and what is predicted.

    Args:
        ids: Of the tokens.
        labels: As many as ``ids``, shifted by the loss as transformers does; for a classifier the one class.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Texts:
    """The sequences of one file.

    Args:
        name: The file's name without its ending.
        path: As the user named it.
        sequences: In the order of the file.
        hash: 16 hex digits of the file's SHA-256.
        about: What it is, in words.
        notes: What a careful reader should know.
        shifted: Whether the user named it as shifted.
    """

    name: str
    path: str
    sequences: tuple[Sequence, ...]
    hash: str
    about: str
    notes: tuple[str, ...] = ()
    shifted: bool = False

    def first(self, count: int) -> Texts:
        """Return the same set with its first sequences only."""
        return replace(self, sequences=self.sequences[:count])


def read_texts(path: Path | str, model: Model, most: int | None = None, shifted: bool = False) -> Texts:
    """Read a text or JSONL file and cut it into sequences of the model's length.

    Args:
        path: A file; ``.jsonl`` and ``.json`` are read as JSON lines, any other as text.
        model: Gives tokenizer, length and kind.
        most: Keep the first so many sequences.
        shifted: Whether the user named it as shifted.

    Raises:
        InputError: It cannot be read, or nothing in it can be predicted.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text: byte {error.start}") from error
    is_lines = path.suffix in {".jsonl", ".json"}
    if model.kind == "classifier" and not is_lines:
        raise InputError(f"{path}: a classifier needs JSON lines with text and label (.jsonl)")
    found = list(_lines(path, text, model)) if is_lines else list(_windows(text, model))
    notes = []
    cut = sum(was_cut for _, was_cut in found)
    if is_lines and cut:
        notes.append(f"{cut} of {len(found)} lines were cut to {model.length} tokens")
    sequences = [sequence for sequence, _ in found if _predicts(sequence, model)]
    if len(sequences) < len(found):
        notes.append(f"{len(found) - len(sequences)} of {len(found)} lines have nothing to predict and are left out")
    if not sequences:
        raise InputError(f"{path}: has no token to predict")
    if most is not None and most < len(sequences):
        notes.append(f"the first {most} of {len(sequences)} sequences, by --max-sequences")
        sequences = sequences[:most]
    form = "lines" if is_lines else f"windows of {len(sequences[0].ids)} tokens"
    digest = hashlib.sha256(content).hexdigest()[:16]
    return Texts(
        path.stem, str(path), tuple(sequences), digest, f"{len(sequences)} {form}", tuple(notes), shifted=shifted
    )


def check_names(texts: list[Texts]) -> None:
    """Refuse two sets of one name: records would not tell them apart.

    Raises:
        UsageError: There are such.
    """
    names = [each.name for each in texts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two evaluation sets are called {name}; give one of the files another name")


def _predicts(sequence: Sequence, model: Model) -> bool:
    if model.kind == "classifier":
        return bool(sequence.ids)
    return any(label != IGNORED for label in sequence.labels[1:])


def _windows(text: str, model: Model) -> Iterator[tuple[Sequence, bool]]:
    """Yield windows of a text that follow each other, each with what the tokenizer puts first."""
    ids, first = model.tokens.ids(text), model.tokens.first
    room = model.length - len(first)
    for start in range(0, max(1, len(ids) - room + 1), room):
        window = (*first, *ids[start : start + room])
        yield Sequence(window, window), False


def _lines(path: Path, text: str, model: Model) -> Iterator[tuple[Sequence, bool]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from error
        if not isinstance(item, dict):
            raise InputError(f"{where} is not a JSON object with text, or prompt and completion")
        yield _classified(item, where, model) if model.kind == "classifier" else _continued(item, where, model)


def _continued(item: dict[str, Any], where: str, model: Model) -> tuple[Sequence, bool]:
    """Return the sequence of ``text``, or of ``prompt`` and ``completion``."""
    tokens = model.tokens
    if isinstance(item.get("prompt"), str) and isinstance(item.get("completion"), str):
        asked = [*tokens.first, *tokens.ids(item["prompt"])]
        said = tokens.ids(item["completion"])
    elif isinstance(item.get("text"), str):
        asked, said = list(tokens.first), tokens.ids(item["text"])
    else:
        raise InputError(f"{where} has neither text nor prompt and completion")
    ids, labels = [*asked, *said], [*([IGNORED] * len(asked)), *said]
    cut = len(ids) > model.length
    return Sequence(tuple(ids[: model.length]), tuple(labels[: model.length])), cut


def _classified(item: dict[str, Any], where: str, model: Model) -> tuple[Sequence, bool]:
    """Return the sequence of ``text`` with its ``label``, an index or the name of a class."""
    text, label = item.get("text"), item.get("label")
    if not isinstance(text, str) or not isinstance(label, int | str):
        raise InputError(f"{where} has no text and label")
    index = label if isinstance(label, int) else model.labels.get(label)
    if index is None or not 0 <= index < max(1, len(model.labels)):
        raise InputError(f"{where}: label {label!r} is none of the model's {len(model.labels)} classes")
    tokens = model.tokens
    room = model.length - len(tokens.first) - len(tokens.last)
    ids = tokens.ids(text)
    return Sequence((*tokens.first, *ids[:room], *tokens.last), (index,)), len(ids) > room
