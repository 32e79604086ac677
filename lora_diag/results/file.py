"""The results file: JSON lines, appended as they are measured, read back as the same records.

A crash loses at most the line being written. A file without its ``end`` line is an interrupted run; opening it with
``resume`` drops a half-written last line and goes on behind what is there. A finished run is only ever replaced by a
finished run: until its ``end`` is written, the new one grows in ``NAME.part`` beside it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

from lora_diag.errors import InputError, UsageError
from lora_diag.results.records import SCHEMA, AnyRecord, End, LeftOut, Run, Spectrum

_LINE: TypeAdapter[AnyRecord] = TypeAdapter(AnyRecord)

# Every finished or interrupted results file begins so.
_HEAD = b'{"record":"run"'


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
        """Return the results of the layers whose name contains a match of a regular expression.

        What was left out is filtered alike, and the totals of ``end`` are those of what remains.
        """
        pattern = re.compile(layers)
        kept = tuple(record for record in self.layers if pattern.search(record.layer))
        left_out = tuple(record for record in self.left_out if pattern.search(record.layer))
        return Results(self.run, kept, left_out, totals(kept, left_out) if self.end is not None else None)

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
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame``, one row a layer; ``energy.8``, ``rank_at.0.9`` and so on are columns.

        Raises:
            ImportError: pandas is not installed (``pip install loradiag[pandas]``).
        """
        import pandas as pd

        return pd.json_normalize([record.model_dump() for record in self.layers])


def totals(layers: Sequence[Spectrum], left_out: Sequence[LeftOut]) -> End:
    """Return the last line of a finished run: counts, and the norms of ΔW and W_base over its layers."""
    with_base = all(record.base_fro is not None for record in layers)
    return End(
        layers=len(layers),
        left_out=len(left_out),
        fro=math.hypot(*(record.fro for record in layers)),
        base_fro=math.hypot(*(record.base_fro or 0.0 for record in layers)) if with_base else None,
    )


class ResultsWriter:
    """Appends records to a file, line by line, each handed to the system as it comes.

    Nothing is created before the first record of a layer or the like, so that a run that fails at its inputs leaves
    nothing behind. Where ``path`` holds a finished run, records go to ``NAME.part`` beside it, which takes its place
    once the ``end`` record is written.

    Args:
        path: The results file; None to write nothing.
        run: The first line.
        resume: Go on behind the records that an interrupted run left there, or in ``NAME.part``.

    Attributes:
        run: The first line.
        earlier: What is there already and is kept; without layers unless resuming.

    Raises:
        UsageError: The file holds an unfinished run and ``resume`` is False, the run of other inputs or settings and
            ``resume`` is True, or something that is no results file.
        InputError: It cannot be read or written.
    """

    def __init__(self, path: Path | None, run: Run, resume: bool = False) -> None:
        self.path = path
        self.run = run
        self.earlier = Results(run, ())
        self._keep = False
        self._file: IO[bytes] | None = None
        if path is None:
            return
        self._final = Path(os.path.realpath(path)) if os.path.islink(path) else path  # noqa: PTH114  (as in _state)
        part = self._final.with_name(f"{self._final.name}.part")
        state, part_state = _state(self._final), _state(part)
        for file, found in ((path, state), (part, part_state)):
            if not resume and found == "unfinished":
                raise UsageError(f"{file}: holds an unfinished run; continue it with --resume, or delete it first")
        if not resume and part_state == "finished":
            raise UsageError(f"{part}: is left over from an interrupted run; continue it with --resume, or delete it")
        behind_part = part_state != "absent" if resume else state == "finished"
        self.path = part if behind_part else self._final
        if resume and (part_state if behind_part else state) in {"unfinished", "finished"}:
            self.earlier, self._keep = _same_run(read_results(self.path), run, self.path), True
        _check_writable(self.path)
        if self.earlier.end is not None and behind_part:
            self._replace()

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
            self._file.write(f"{to_line(record)}\n".encode())
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from error
        if isinstance(record, End) and self.path != self._final:
            self._file.close()
            self._replace()

    def _open(self, path: Path) -> IO[bytes]:
        if self._keep:
            _, kept = _read(path)
            file = path.open("r+b")
            file.truncate(kept)
            file.seek(kept - 1)
            if file.read(1) != b"\n":  # a whole record whose newline was lost
                file.write(b"\n")
            return file
        fresh = path.open("wb")
        fresh.write(f"{to_line(self.run)}\n".encode())
        return fresh

    def _replace(self) -> None:
        """Put the finished new run in the place of the old one."""
        assert self.path is not None
        try:
            self.path.replace(self._final)
        except OSError as error:
            raise InputError(
                f"{self._final}: cannot be written: {error.strerror}; the run is in {self.path}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _state(path: Path) -> Literal["absent", "empty", "unfinished", "finished"]:
    """Return what lies where records are to go; ``empty`` also if a crash cut its very first line.

    Raises:
        UsageError: Something that is not ours to overwrite.
    """
    if not os.path.exists(path):  # noqa: PTH110  (unlike Path.exists(), False also for names that no file can have)
        return "absent"
    if not path.is_file():
        raise UsageError(f"{path}: is not a file; give -o a file name")
    if path.stat().st_size == 0:
        return "empty"
    if not is_results_file(path):
        raise UsageError(f"{path}: exists and is not a results file, so it is left as it is; choose another name")
    try:
        records, _ = _read(path)
        return ("finished" if isinstance(records[-1], End) else "unfinished") if records else "empty"
    except InputError as error:
        raise UsageError(f"{error}; the file is left as it is: delete it first, or choose another name") from error


def _check_writable(path: Path) -> None:
    """Refuse, before anything is measured, a file that could not be written; create nothing.

    Raises:
        InputError: It could not.
    """
    folder = path.parent
    try:
        exists = path.lstat() is not None
    except FileNotFoundError:
        exists = False
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{path}: cannot be written: {reason}") from error
    if not folder.is_dir():
        raise InputError(f"{path}: cannot be written: there is no folder {folder}; create it first")
    if not (os.access(path, os.W_OK) if exists else os.access(folder, os.W_OK | os.X_OK)):
        raise InputError(f"{path}: cannot be written: permission denied")


def _same_run(earlier: Results, run: Run, path: Path) -> Results:
    """Return the earlier records if they came from the same inputs and settings."""
    for before, now in zip(earlier.run.inputs, run.inputs, strict=False):
        if before != now and before.path == now.path and before.fingerprint != now.fingerprint:
            raise UsageError(
                f"{path}: the input {now.path} changed since this run was begun, and its layers must not be mixed; "
                "delete the file and measure again, or write to another file"
            )
    then, wanted = earlier.run.model_dump(), run.model_dump()
    differing = [key for key in wanted if then[key] != wanted[key]]
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
    """Say whether a file begins like a results file; never so of a pipe or a device, which are not opened."""
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as file:
            return file.read(64).replace(b" ", b"").startswith(_HEAD)
    except (OSError, ValueError):
        return False


def read_results(path: Path | str) -> Results:
    """Read a results file.

    Args:
        path: A file written by ``-o``, by ``Results.write`` or from ``--json``.

    Returns:
        The records. A half-written last line, as a crash leaves it, is dropped; ``end`` is then None.

    Raises:
        InputError: It is no results file, is damaged, holds several runs, or its schema is newer than this version of
            loradiag.
    """
    path = Path(path)
    records, _ = _read(path)
    if not records or not isinstance(records[0], Run):
        raise InputError(f"{path}: is not a results file: its first line must be a run record")
    layers = tuple(record for record in records if isinstance(record, Spectrum))
    left_out = tuple(record for record in records if isinstance(record, LeftOut))
    end = next((record for record in records if isinstance(record, End)), None)
    return Results(records[0], layers, left_out, end)


def _read(path: Path) -> tuple[list[Run | Spectrum | LeftOut | End], int]:
    """Return the whole records of a file, checked one against the other, and how many bytes they take."""
    try:
        if os.path.exists(path) and not path.is_file():  # noqa: PTH110  (as above)
            raise InputError(f"{path}: is not a regular file")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    *lines, rest = content.split(b"\n")
    records: list[Run | Spectrum | LeftOut | End] = []
    for number, line in enumerate(lines, 1):
        record = _parse(line, number, path)
        _check_place(record, records, number, path)
        records.append(record)
    # After the last newline: nothing, what a crash cut short, or a record that only lacks its newline.
    with contextlib.suppress(InputError):
        record = _parse(rest, len(lines) + 1, path)
        _check_place(record, records, len(lines) + 1, path)
        return [*records, record], len(content)
    return records, len(content) - len(rest)


def _check_place(
    record: Run | Spectrum | LeftOut | End, before: Sequence[Run | Spectrum | LeftOut | End], number: int, path: Path
) -> None:
    """Refuse a record that cannot stand where it stands, or lacks what the run record promises.

    Raises:
        InputError: It cannot.
    """
    where = f"{path}: line {number}"
    if not before:
        if isinstance(record, Run) and record.command == "spectrum":
            ranks = record.settings.get("ranks")
            if not isinstance(ranks, list) or not ranks or not all(type(r) is int and r > 0 for r in ranks):
                raise InputError(f"{where} is not a run record: settings.ranks must be a list of ranks")
        return
    if isinstance(record, Run):
        raise InputError(f"{where} begins a second run: one file holds one run; split it there")
    if isinstance(before[-1], End):
        raise InputError(f"{where} comes after the end record of the run")
    first = before[0]
    if isinstance(record, Spectrum) and isinstance(first, Run):
        asked = [str(r) for r in first.settings.get("ranks", [])]
        lacking = [f"energy.{r}" for r in asked if r not in record.energy]
        lacking += [f"tail.{r}" for r in asked if r not in record.tail]
        lacking += [f"rank_at.{share}" for share in ("0.9", "0.95", "0.99") if share not in record.rank_at]
        if lacking:
            raise InputError(f"{where} is not a record of this run: {record.layer} has no {lacking[0]}")


def _parse(line: bytes, number: int, path: Path) -> Run | Spectrum | LeftOut | End:
    try:
        content = json.loads(line.decode("utf-8"))
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
