"""Reading of results files, with a check of every line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_diag.errors import InputError
from lora_diag.records.base import KINDS, SCHEMA, LayerRecord, WholeRecord
from lora_diag.records.results import Results, Seal
from lora_diag.records.run import AnyRecord, End, LeftOut, Run

# The possible lines of a results file.
_IN_FILES = (Run, LayerRecord, WholeRecord, LeftOut, End)

# Start of every results file.
_HEAD = b'{"record":"run"'

# Longest line that is read or written. Lines of real runs stay below 1 MB, a fleet's first line takes 300 bytes per
# adapter; parsed JSON takes up to 24 times its length in memory (``[{},{},…]``).
MAX_LINE_BYTES = 16 * 2**20


class _Other(WholeRecord):
    """A record of a feature whose kinds are not defined."""

    record: str


def is_results_file(path: Path | str) -> bool:
    """Return whether a file begins like a results file; False if it cannot be read, and for pipes and devices."""
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as file:
            return file.read(64).replace(b" ", b"").startswith(_HEAD)
    except (OSError, ValueError):
        return False


def read_results(path: Path | str) -> Results[Any]:
    """Read a results file with defined kinds of records; ``catalog.read_results`` defines all kinds first.

    Args:
        path: A file written by ``-o`` or ``Results.write``, or the saved output of ``--json``.

    Returns:
        The records. An incomplete last line, left by a crash, is dropped, and so is everything after a zero byte, left
        by a loss of power; ``end`` is then None.

    Raises:
        InputError: The file is not a results file, is damaged, holds several runs, or has a schema newer than this
            version of loradiag.
    """
    path = Path(path)
    seal = Seal()
    records = list(iterate_records(path, seal=seal))
    if not records or not isinstance(records[0], Run):
        why = "its first line must be a run record" if path.stat().st_size else "it is empty"
        raise InputError(f"{path}: not a results file: {why}; give a file that loradiag wrote with -o")
    if isinstance(end := records[-1], End) and end.sha256 not in {"", seal.hexdigest()}:
        raise InputError(
            f"{path}: does not match the SHA-256 in its last line, so it was edited or damaged; measure again"
        )
    return Results(
        records[0],
        tuple(record for record in records if isinstance(record, LayerRecord)),
        tuple(record for record in records if isinstance(record, LeftOut)),
        next((record for record in records if isinstance(record, End)), None),
        tuple(record for record in records if isinstance(record, WholeRecord)),
    )


def iterate_records(path: Path, strict: bool = True, seal: Seal | None = None) -> Iterator[AnyRecord]:
    """Yield the complete records of a file, checked for consistency; incomplete data after a crash are ignored.

    Args:
        path: The file.
        strict: Whether an undefined kind of record is an error; else its fields are not read.
        seal: The hash to which the lines before the ``end`` record are added.

    Raises:
        InputError: The file cannot be read, or a line is not a record or is in the wrong place.
    """
    first: AnyRecord | None = None
    last: AnyRecord | None = None
    for number, line in enumerate(iterate_lines(path), 1):
        try:
            record = _parse(line.removesuffix(b"\n"), number, path, strict)
            _check_place(record, first, last, f"{path}: line {number}")
            if not isinstance(record, End) and seal is not None:
                seal.add(line)
        except InputError:
            if line.endswith(b"\n"):
                raise
            return  # truncated by a crash; a record that only lacks its newline is accepted
        first, last = record if first is None else first, record
        yield record


def iterate_lines(path: Path) -> Iterator[bytes]:
    """Yield lines with their newlines, which the last may lack; the whole text is never in memory.

    JSON has no zero bytes: they mark data lost in a power failure, and nothing after them is reliable. Neither is text
    that another process appends after a line without a newline during reading.

    Raises:
        InputError: The file cannot be read, is not a regular file, or has a line above ``MAX_LINE_BYTES``.
    """
    try:
        if os.path.exists(path) and not path.is_file():  # noqa: PTH110  (unlike Path.exists(), takes any name)
            problem = "is a folder" if path.is_dir() else "is not a regular file"
            raise InputError(f"{path}: {problem}; give a results file as written by -o FILE")
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                content, _, zeros = line.partition(b"\0")
                if len(line) > MAX_LINE_BYTES and not zeros:
                    raise InputError(
                        f"{path}: line {number} is longer than {MAX_LINE_BYTES:,} bytes; give a file that loradiag "
                        "wrote with -o"
                    )
                yield content
                if not content.endswith(b"\n"):
                    return
    except OSError as error:
        problem = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise InputError(f"{path}: {problem}; give a results file, written with -o") from error


def bytes_of(path: Path, records: int) -> int:
    """Return the number of bytes of the first records of a file, without the newline of the last."""
    return sum(len(line.removesuffix(b"\n")) + 1 for line in islice(iterate_lines(path), records)) - 1


def _check_place(record: AnyRecord, first: AnyRecord | None, last: AnyRecord | None, where: str) -> None:
    """Refuse a record in the wrong place, or without fields that the run record requires.

    Raises:
        InputError: The record is invalid here.
    """
    if first is None:
        kind = KINDS.get(record.command) if isinstance(record, Run) else None
        if kind is not None and isinstance(record, Run) and (reason := kind.check_settings(record.settings)):
            raise InputError(f"{where} is not a run record: {reason}")
        return
    if isinstance(record, Run):
        raise InputError(f"{where} begins a second run; split the file there, one run per file")
    if isinstance(last, End):
        raise InputError(f"{where} comes after the end record of the run")
    if isinstance(record, LayerRecord) and isinstance(first, Run) and (missing := record.check(first.settings)):
        raise InputError(f"{where} is not a record of this run: {record.layer} has no {missing}")


def _parse(line: bytes, number: int, path: Path, strict: bool) -> AnyRecord:
    try:
        content = json.loads(line.decode("utf-8"))
        if isinstance(content, dict) and isinstance(schema := content.get("schema", SCHEMA), int) and schema > SCHEMA:
            raise InputError(
                f"{path}: written in schema {schema}, but this loradiag reads up to {SCHEMA}; upgrade loradiag"
            )
        if not isinstance(content, dict) or not isinstance(name := content.get("record"), str):
            raise InputError(f'{path}: line {number} is not a record: it has no kind ("record": ...)')
        kind = KINDS.get(name, None if strict else _Other)
        if kind is None or not issubclass(kind, _IN_FILES):
            raise InputError(
                f"{path}: line {number} is not a record: unknown kind {name!r}; install the package that defines it"
            )
        record: Any = kind.model_validate(content)
        return record  # type: ignore[no-any-return]  # _IN_FILES are the members of AnyRecord
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: line {number} is not a record: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: line {number} is not JSON ({error}); give a results file, written with -o"
        ) from error
