"""The results file: JSON lines, appended as they are measured, read back as the same records.

A crash loses at most the line being written. A file without its ``end`` line is an interrupted run; opening it with
``resume`` drops a half-written last line and goes on behind what is there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pydantic import TypeAdapter, ValidationError

from lora_diag.errors import InputError, UsageError
from lora_diag.results.records import SCHEMA, AnyRecord, End, LeftOut, Run, Spectrum

_LINE: TypeAdapter[AnyRecord] = TypeAdapter(AnyRecord)


@dataclass(frozen=True)
class Results:
    """All records of one run, in memory.

    Iterating gives the layers' records. ``left_out`` are the tensors without one; ``end`` is None if the run did not
    finish.
    """

    run: Run
    layers: tuple[Spectrum, ...]
    left_out: tuple[LeftOut, ...] = ()
    end: End | None = None

    def __iter__(self) -> Iterator[Spectrum]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: str) -> Spectrum:
        """Return the record of a layer by its name.

        Raises:
            KeyError: No such layer was measured.
        """
        for record in self.layers:
            if record.layer == layer:
                return record
        raise KeyError(layer)

    def filter(self, layers: str) -> Results:
        """Return the results of the layers whose name contains a match of a regular expression."""
        pattern = re.compile(layers)
        return Results(self.run, tuple(r for r in self.layers if pattern.search(r.layer)), self.left_out, self.end)

    def records(self) -> Iterator[Run | Spectrum | LeftOut | End]:
        """Yield every record in the order of the file."""
        yield self.run
        yield from self.layers
        yield from self.left_out
        if self.end is not None:
            yield self.end

    def write(self, path: Path | str) -> None:
        """Write a results file: beside the target, then renamed over it."""
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text("".join(f"{to_line(record)}\n" for record in self.records()), encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame``, one row a layer; ``energy.8``, ``rank_at.0.9`` and so on are columns.

        Raises:
            ImportError: pandas is not installed (``pip install loradiag[pandas]``).
        """
        import pandas as pd

        return pd.json_normalize([record.model_dump() for record in self.layers])


class ResultsWriter:
    """Appends records to a file, line by line, each handed to the system as it comes.

    Nothing is created before the first record of a layer or the like, so that a run that fails at its inputs leaves
    nothing behind.

    Args:
        path: The results file; None to write nothing.
        run: The first line.
        resume: Go on behind the records that an interrupted run left there.

    Attributes:
        run: The first line.
        earlier: What is there already and is kept; without layers unless resuming.

    Raises:
        UsageError: The file holds an unfinished run and ``resume`` is False, the run of other inputs or settings and
            ``resume`` is True, or something that is no results file.
        InputError: It cannot be read.
    """

    def __init__(self, path: Path | None, run: Run, resume: bool = False) -> None:
        self.path = path
        self.run = run
        self.earlier = Results(run, ())
        self._keep = False
        self._file: IO[str] | None = None
        if path is None or not path.exists() or (path.is_file() and path.stat().st_size == 0):
            return
        if not path.is_file():
            raise UsageError(f"{path}: is not a file; give -o a file name")
        if not is_results_file(path):
            raise UsageError(f"{path}: exists and is not a results file, so it is left as it is; choose another name")
        if resume:
            self.earlier, self._keep = _same_run(read_results(path), run, path), True
        elif not _finished(path):
            raise UsageError(f"{path}: holds an unfinished run; continue it with --resume, or delete it first")

    def append(self, record: Run | Spectrum | LeftOut | End) -> None:
        """Write one record as one line.

        Raises:
            InputError: It cannot be written; what was written before stays and can be resumed.
        """
        if self.path is None:
            return
        try:
            if self._file is None:
                self._file = self._open(self.path)
            self._file.write(f"{to_line(record)}\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _open(self, path: Path) -> IO[str]:
        if self._keep:
            # Whole lines only: a crash may have cut the last one.
            whole = path.read_bytes().rpartition(b"\n")[0]
            with path.open("r+b") as file:
                file.truncate(len(whole) + 1)
            return path.open("a", encoding="utf-8")
        fresh = path.open("w", encoding="utf-8")
        fresh.write(f"{to_line(self.run)}\n")
        return fresh

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _finished(path: Path) -> bool:
    try:
        return read_results(path).end is not None
    except InputError:
        return False


def _same_run(earlier: Results, run: Run, path: Path) -> Results:
    """Return the earlier records if they came from the same inputs and settings."""
    before, now = earlier.run.model_dump(), run.model_dump()
    differing = [key for key in now if before[key] != now[key]]
    differing += [f"settings.{key}" for key, value in run.settings.items() if earlier.run.settings.get(key) != value]
    if differing:
        raise UsageError(
            f"{path}: was begun with another {', '.join(k for k in differing if k != 'settings')}; "
            "resume with the same command, or write to another file"
        )
    return earlier


def to_line(record: Run | Spectrum | LeftOut | End) -> str:
    """Return the record as one line of JSON, its kind first."""
    return record.model_dump_json(by_alias=True)


def is_results_file(path: Path | str) -> bool:
    """Say whether a file begins like a results file."""
    try:
        with Path(path).open("rb") as file:
            return file.read(64).replace(b" ", b"").startswith(b'{"record":"run"')
    except OSError:
        return False


def read_results(path: Path | str) -> Results:
    """Read a results file.

    Args:
        path: A file written by ``-o``, by ``Results.write`` or from ``--json``.

    Returns:
        The records. A half-written last line, as a crash leaves it, is dropped; ``end`` is then None.

    Raises:
        InputError: It is no results file, is damaged, or its schema is newer than this version of loradiag.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    lines = text.split("\n")
    lines.pop()  # after the last newline: nothing, or what a crash cut short
    records = [_parse(line, number, path) for number, line in enumerate(lines, 1)]
    if not records or not isinstance(records[0], Run):
        raise InputError(f"{path}: is not a results file: its first line must be a run record")
    layers = tuple(record for record in records if isinstance(record, Spectrum))
    left_out = tuple(record for record in records if isinstance(record, LeftOut))
    end = next((record for record in records if isinstance(record, End)), None)
    return Results(records[0], layers, left_out, end)


def _parse(line: str, number: int, path: Path) -> Run | Spectrum | LeftOut | End:
    try:
        content = json.loads(line)
        if isinstance(content, dict) and isinstance(schema := content.get("schema", SCHEMA), int) and schema > SCHEMA:
            raise InputError(
                f"{path}: written in schema {schema}, this loradiag reads up to {SCHEMA}: upgrade loradiag"
            )
        return _LINE.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: line {number} is not a record: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: line {number} is not JSON: {error}") from error
