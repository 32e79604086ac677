"""Sources of texts: a text file, JSON lines, or a folder saved by Hugging Face's ``datasets``.

Handles files and folders; independent of tokens and models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from lora_diag.errors import InputError, UsageError

# Columns of a data set that are read; others are ignored.
COLUMNS = ("text", "label", "prompt", "completion")
# Files that ``save_to_disk`` writes in the folder of a data set, and of a set of splits.
_STATE, _SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class Source:
    """The contents of a source.

    Args:
        name: Name of the set: the file's name without its suffix, or the folder's.
        digest: 16 hex digits of a SHA-256: of the file; of a data set, of the rows that are read, as JSON lines.
        text: Content of a text file.
        rows: Otherwise the contents and the position of each row.
        unit: Name of a row, for messages.
    """

    name: str
    digest: str
    text: str | None = None
    rows: tuple[tuple[str, dict[str, Any]], ...] = ()
    unit: str = "lines"


def check_texts(path: Path | str) -> None:
    """Check that a path can be a text, before anything is opened.

    Raises:
        InputError: There is no such file, or the folder holds no data set.
    """
    named = os.fspath(path)
    if not os.path.isdir(named):  # noqa: PTH112  (unlike Path.is_dir(), takes any name)
        if not os.path.isfile(named):  # noqa: PTH113
            raise InputError(f"{path}: no such file; check the path")
        return
    folder = Path(path)
    if (folder / _SPLITS).is_file():
        splits = _read_json(folder / _SPLITS).get("splits")
        known = [str(split) for split in splits] if isinstance(splits, list) else []
        raise InputError(
            f"{path}: holds the splits {', '.join(known)}; give one, such as {folder / (known or ['train'])[0]}"
        )
    if not (folder / _STATE).is_file():
        raise InputError(
            f"{path}: is a folder without a data set ({_STATE} is missing); save one with datasets' save_to_disk"
        )


def read_source(path: Path | str) -> Source:
    """Read a text file, JSON lines (``.jsonl``, ``.json``) or a folder of ``datasets``.

    Raises:
        UsageError: It is a data set, and datasets is not installed.
        InputError: It cannot be read.
    """
    check_texts(path)
    path = Path(path)
    return _read_data_set(path) if path.is_dir() else _read_file(path)


def _read_file(path: Path) -> Source:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); convert it") from error
    digest = hashlib.sha256(content).hexdigest()[:16]
    if path.suffix in {".jsonl", ".json"}:
        return Source(path.stem, digest, rows=tuple(_read_lines(path, text)))
    return Source(path.stem, digest, text)


def _read_lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines(): JSON strings may contain U+2028 and U+0085 literally, as in web texts.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON ({error}); correct the line") from error
        if not isinstance(item, dict):
            raise InputError(f"{where} is not a JSON object with text, or prompt and completion; correct the line")
        yield where, item


def _read_data_set(path: Path) -> Source:
    """Read the columns in use; a class label is read as its name and its number."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{path}: is a folder of datasets, which needs {error.name}; install it with pip install datasets"
        ) from error
    _refuse_outside_paths(path)
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # raised by pyarrow, the file system, or a feature unknown to this version
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: datasets cannot open it: {problem}") from error
    columns = [name for name in COLUMNS if name in data.column_names]
    if "text" not in columns and not {"prompt", "completion"} <= set(columns):
        raise InputError(
            f"{path}: has the columns {', '.join(map(str, data.column_names))}; rename them to text, text and "
            "label, or prompt and completion (rename_column)"
        )
    chosen = data.select_columns(columns)
    names = getattr(chosen.features.get("label"), "names", None)
    rows, digest = [], hashlib.sha256()
    for number, item in enumerate(chosen):
        digest.update(json.dumps(item, sort_keys=True, default=str).encode() + b"\n")
        label = item.get("label")
        if names and isinstance(label, int) and 0 <= label < len(names):
            item = {**item, "label_name": names[label]}
        rows.append((f"{path}: row {number}", item))
    return Source(path.name or path.resolve().name, digest.hexdigest()[:16], rows=tuple(rows), unit="rows")


def _refuse_outside_paths(path: Path) -> None:
    """Refuse a data set that names files elsewhere.

    Raises:
        InputError: A file is outside the folder.
    """
    files = _read_json(path / _STATE).get("_data_files")
    for file in files if isinstance(files, list) else []:
        name = file.get("filename") if isinstance(file, dict) else None
        if not isinstance(name, str) or PurePath(name).name != name:
            raise InputError(
                f"{path / _STATE}: names {name!r}, which is not a file in this folder; save the data set again"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    return document if isinstance(document, dict) else {}
