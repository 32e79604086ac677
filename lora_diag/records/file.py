"""The results file: JSON lines, appended after each measurement by one process at a time, and
checked when read.

Every layer is written to the system at once, so that a killed process loses only unfinished layers,
and synced to disk every ``SYNC_SECONDS``, which bounds the loss in a power failure. A file without
its ``end`` line is an interrupted run; opening it with ``resume`` drops an incomplete last line and
appends to the rest. A finished run is only replaced by a finished run: until its ``end`` is on
disk, the new one is written to ``NAME.part``.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from io import FileIO
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self

from pydantic import ValidationError

from lora_diag import files
from lora_diag.errors import InputError, UsageError, damaged
from lora_diag.feature import load
from lora_diag.files import RESULTS, check_folder_of, check_output
from lora_diag.records.base import KINDS, SCHEMA, LayerRecord, WholeRecord
from lora_diag.records.results import L, Results, Seal, to_line
from lora_diag.records.run import AnyRecord, End, LeftOut, Run, timestamp

_LOG = logging.getLogger(__name__)

# The possible lines of a results file.
_IN_FILES = (Run, LayerRecord, WholeRecord, LeftOut, End)

# Start of every results file.
_HEAD = b'{"record":"run"'

# Longest line that is read or written. Lines of real runs stay below 1 MB, a fleet's first line
# takes 300 bytes per adapter; parsed JSON takes up to 24 times its length in memory
# (``[{},{},…]``).
MAX_LINE_BYTES = 16 * 2**20


class _UndefinedRecord(WholeRecord):
    """A record of a feature whose kinds are not defined."""

    record: str


def is_results_file(path: Path | str) -> bool:
    """Return whether a file begins like a results file; False if it cannot be read, and for pipes
    and devices.
    """
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as file:
            return file.read(64).replace(b" ", b"").startswith(_HEAD)
    except (OSError, ValueError):
        return False


def read_results(path: Path | str) -> Results[Any]:
    """Read a results file with defined kinds of records; ``catalog.read_results`` defines all kinds
    first.

    Args:
        path: A file written by ``-o`` or ``Results.write``, or the saved output of ``--json``.

    Returns:
        The records. An incomplete last line, left by a crash, is dropped, and so is everything
            after a zero byte, left
        by a loss of power; ``end`` is then None.

    Raises:
        InputError: The file cannot be read, is not a results file, is damaged or edited, holds
            several runs, or has a schema newer than this version of loradiag.
    """
    path = Path(path)
    seal = Seal()
    records = list(iterate_records(path, seal=seal))
    if not records or not isinstance(records[0], Run):
        why = "its first line must be a run record" if path.stat().st_size else "it is empty"
        raise InputError(
            path, f"not a results file: {why}", "give a file that loradiag wrote with $output"
        )
    if isinstance(end := records[-1], End) and end.sha256 not in {"", seal.hexdigest()}:
        raise damaged(
            path,
            "does not match the SHA-256 in its last line, so it was edited or damaged",
            "measure again",
        )
    layers = tuple(record for record in records if isinstance(record, LayerRecord))
    if isinstance(end, End):
        _check_together(layers, path)
    return Results(
        records[0],
        layers,
        tuple(record for record in records if isinstance(record, LeftOut)),
        next((record for record in records if isinstance(record, End)), None),
        tuple(record for record in records if isinstance(record, WholeRecord)),
    )


def _check_together(layers: Sequence[LayerRecord], path: Path) -> None:
    """Refuse the layer records of a finished run that contradict each other.

    Raises:
        InputError: They do.
    """
    by_kind: dict[type[LayerRecord], list[LayerRecord]] = {}
    for record in layers:
        by_kind.setdefault(type(record), []).append(record)
    for kind, records in by_kind.items():
        if problem := kind.check_together(records):
            raise damaged(path, problem, "measure again")


def iterate_records(
    path: Path, strict: bool = True, seal: Seal | None = None
) -> Iterator[AnyRecord]:
    """Yield the complete records of a file, checked for consistency; incomplete data after a crash
    are ignored.

    Args:
        path: The file.
        strict: Whether an undefined kind of record is an error; else its fields are not read.
        seal: The hash to which the lines before the ``end`` record are added; None for no hash.
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

    JSON has no zero bytes: they mark data lost in a power failure, and nothing after them is
    reliable. Neither is text that another process appends after a line without a newline during
    reading.

    Raises:
        InputError: The file cannot be read, is not a regular file, or has a line above
            ``MAX_LINE_BYTES``.
    """
    try:
        if os.path.exists(path) and not path.is_file():  # noqa: PTH110  (unlike Path.exists(), takes any name)
            problem = "is a folder" if path.is_dir() else "is not a regular file"
            raise InputError(path, problem, "give a results file as written by $output FILE")
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                content, _, zeros = line.partition(b"\0")
                if len(line) > MAX_LINE_BYTES and not zeros:
                    problem = f"line {number} is longer than {MAX_LINE_BYTES:,} bytes"
                    raise damaged(path, problem, "give a file that loradiag wrote with $output")
                yield content
                if not content.endswith(b"\n"):
                    return
    except OSError as error:
        problem = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read: {error.strerror}"
        )
        raise InputError(path, problem, "give a results file, written with $output") from error


def _check_place(
    record: AnyRecord, first: AnyRecord | None, last: AnyRecord | None, where: str
) -> None:
    """Refuse a record in the wrong place, or without fields that the run record requires.

    Raises:
        InputError: The record is invalid here.
    """
    if first is None:
        kind = KINDS.get(record.command) if isinstance(record, Run) else None
        if (
            kind is not None
            and isinstance(record, Run)
            and (reason := kind.check_settings(record.settings))
        ):
            raise InputError(f"{where} is not a run record: {reason}")
        return
    if isinstance(record, Run):
        raise InputError(f"{where} begins a second run; split the file there, one run per file")
    if isinstance(last, End):
        raise InputError(f"{where} comes after the end record of the run")
    if (
        isinstance(record, LayerRecord)
        and isinstance(first, Run)
        and (missing := record.check(first.settings))
    ):
        raise InputError(f"{where} is not a record of this run: {record.layer} has no {missing}")


def _parse(line: bytes, number: int, path: Path, strict: bool) -> AnyRecord:
    """Return the record of a line.

    Raises:
        InputError: The line is not a record, or of a newer schema; with ``strict``, also of an
            undefined kind.
    """
    try:
        content = json.loads(line.decode("utf-8"))
        if (
            isinstance(content, dict)
            and isinstance(schema := content.get("schema", SCHEMA), int)
            and schema > SCHEMA
        ):
            problem = f"written in schema {schema}, but this loradiag reads up to {SCHEMA}"
            raise damaged(path, problem, "upgrade loradiag")
        if not isinstance(content, dict) or not isinstance(name := content.get("record"), str):
            raise InputError(
                f'{path}: line {number} is not a record: it has no kind ("record": ...)'
            )
        kind = KINDS.get(name, None if strict else _UndefinedRecord)
        if kind is None or not issubclass(kind, _IN_FILES):
            problem = f"line {number} is not a record: unknown kind {name!r}"
            raise damaged(path, problem, "install the package that defines it (gate: $plugins)")
        record: Any = kind.model_validate(content)
        return record  # type: ignore[no-any-return]  # _IN_FILES are the members of AnyRecord
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: line {number} is not a record: {where}: {first['msg']}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise damaged(
            path,
            f"line {number} is not JSON ({error})",
            "give a results file, written with $output",
        ) from error


# Possible states of an output path.
State = Literal["absent", "empty", "unfinished", "finished", "foreign"]

# Interval between syncs, which take 7 ms each (file and folder, ext4 on a virtual disk): 0.15% of a
# run.
SYNC_SECONDS = 5.0


class ResultsWriter(Generic[L]):
    """Append records to a file, line by line, each written to the system at once.

    The file is locked from the start, so that no two processes write to it, and created empty if
    needed; it is removed if no record is written. If ``path`` holds a finished run, records go to
    ``NAME.part``, which replaces it once the ``end`` record is written.

    Args:
        path: The results file; None to write nothing.
        run: The first line.
        resume: Append to the records of an interrupted run in the file, or in ``NAME.part``, if
            there is one.
        overwrite: Replace an existing file that is not a results file.
        extendable: Settings that may be extended when a run, finished or not, is resumed, each with
            a function that combines the earlier and the new value; a new value takes the place of
            null. If the result is an extension, the earlier records are copied to ``NAME.part``
            under the new first line, and the file is replaced once the run has ended.

    If a time limit left out layers, ``earlier`` has no skipped tensors, so that a resumed run
    measures them.

    Attributes:
        run: The first line, with the time; for a resumed run, with its original time and the
            combined settings.
        earlier: Existing results that are kept; without layers unless resuming.

    Raises:
        UsageError: The file holds an unfinished run and ``resume`` is False, a run of other inputs
            or settings and ``resume`` is True, or is not a results file; or another process writes
            it.
        InputError: The file cannot be read or written.
    """

    def __init__(
        self,
        path: Path | str | None,
        run: Run,
        resume: bool = False,
        overwrite: bool = False,
        extendable: Mapping[str, Callable[[Any, Any], Any]] | None = None,
    ) -> None:
        self.path: Path | None = None
        self.run = run.model_copy(update={"made": timestamp()})
        self.earlier: Results[L] = Results(self.run, ())
        self._extendable = extendable or {}
        self._seal = Seal()
        self._kept = 0
        self._begun = False
        self._file: FileIO | None = None
        self._synced = -SYNC_SECONDS
        self._lock: int | None = None
        if path is None:
            return
        self._final = files.resolve_output(Path(path))
        self._overwrite = overwrite
        check_output(self._final, RESULTS, overwrite, appending=True)
        self._lock = _lock(self._final)
        try:
            self.path = self._choose_file(resume)
            if self.earlier.end is None:  # nothing follows a finished run
                for line in islice(iterate_lines(self.path), self._kept):
                    self._seal.add(line)
                self._begun = self._kept > 0
        except BaseException:
            self._release()
            raise

    def _choose_file(self, resume: bool) -> Path:
        """Inspect the existing files, read the run to resume, and return the file that records go
        to.

        A run whose settings are extended, or that a time limit shortened, is copied to
        ``NAME.part``; a finished run in ``NAME.part`` takes its place. ``run``, ``earlier`` and the
        number of kept records are set.
        """
        part = _part_path(self._final)
        state, part_state = check_results_file(self._final, resume, self._overwrite, locked=True)
        if state == "foreign":
            _refuse_inputs(self._final, self.run)
        if state == "finished" and not resume and not self._overwrite:
            refuse_other_run(self._final, self.run)
        in_part = state == "foreign" or (part_state != "absent" if resume else state == "finished")
        path = part if in_part else self._final
        if resume and (part_state if in_part else state) in {"unfinished", "finished"}:
            # Settings are compared by today's names.
            earlier: Results[L] = load("lora_diag.catalog:read_results")(path)
            extended = self._extend_settings(earlier)
            self.earlier = _drop_partial_layer(_check_same_run(extended, self.run, path))
            self.run = self.earlier.run
            if extended.run != earlier.run or len(extended.left_out) < len(earlier.left_out):
                path, in_part = part, True
                files.write_whole(
                    part, "".join(f"{to_line(record)}\n" for record in self.earlier.records())
                )
            self._kept = sum(1 for _ in self.earlier.records())
        check_folder_of(path, in_place=True)
        if self.earlier.end is not None and in_part:
            self._replace(path)
        return path

    def _extend_settings(self, earlier: Results[L]) -> Results[L]:
        """Return the earlier run with the combined settings of both runs, which ``run`` gets, too.

        It is unfinished if they were extended, or if a time limit left out layers, when skipped
        tensors are dropped.
        """
        earlier_settings, settings = earlier.run.settings, self.run.settings
        if any(item.reason == "time" for item in earlier.left_out):  # they are measured now
            earlier = replace(earlier, left_out=(), end=None)
        extended = {
            key: settings[key] if old is None else self._extendable[key](old, settings[key])
            for key, old in earlier_settings.items()
            if key in self._extendable and settings.get(key) is not None
        }
        self.run = self.run.model_copy(update={"settings": {**settings, **extended}})
        if all(earlier_settings[key] == value for key, value in extended.items()):
            return earlier
        run = earlier.run.model_copy(update={"settings": {**earlier_settings, **extended}})
        return replace(earlier, run=run, end=None)

    def append(self, *records: AnyRecord) -> tuple[Any, ...]:
        """Write records as lines, all records of a layer at once.

        Returns:
            The records as written: ``end`` with the hash of the lines before it.

        Raises:
            InputError: They cannot be written; earlier records remain and can be resumed.
        """
        first = () if self._begun else (self.run,)
        seal = self._seal.copy()
        written: list[AnyRecord] = []
        encoded: list[bytes] = []
        for record in (*first, *records):
            written.append(seal.add_hash(record))
            encoded.append(to_line(written[-1]).encode() + b"\n")
            seal.add(encoded[-1])
        if self.path is not None:
            if max(map(len, encoded)) > MAX_LINE_BYTES:
                problem = (
                    "cannot be written: a record is longer than the limit of "
                    f"{MAX_LINE_BYTES:,} bytes"
                )
                raise damaged(self.path, problem, "give fewer inputs")
            self._write(self.path, b"".join(encoded), isinstance(records[-1], End))
        self._seal, self._begun = seal, True
        return tuple(written[len(first) :])

    def _write(self, path: Path, content: bytes, ends: bool) -> None:
        """Write lines, sync them every ``SYNC_SECONDS`` and after the last one, which also replaces
        an old run.

        Raises:
            InputError: They cannot be written.
        """
        try:
            if self._file is None:
                self._file = self._open(path)
            _write(self._file, content)
            if ends or time.monotonic() - self._synced >= SYNC_SECONDS:
                files.sync_descriptor(self._file.fileno())
                files.sync(path.parent)
                self._synced = time.monotonic()
        except OSError as error:
            hint = (
                "; it holds the results so far; continue with $resume"
                if self._file and self._file.tell()
                else ""
            )
            raise InputError(path, f"cannot be written: {error.strerror}{hint}") from error
        if ends and path != self._final:
            self._file.close()
            self._replace(path)

    def _open(self, path: Path) -> FileIO:
        """Open the file for writing after the kept records; drop what follows them."""
        if not self._kept:
            return FileIO(path, "w", opener=_open_without_links)
        file = FileIO(path, "r+", opener=_open_without_links)
        kept = islice(iterate_lines(path), self._kept)
        file.truncate(
            sum(len(line.removesuffix(b"\n")) + 1 for line in kept) - 1
        )  # the last may lack its newline
        file.seek(0, os.SEEK_END)
        _write(file, b"\n")
        return file

    def _replace(self, path: Path) -> None:
        """Replace the old run by the finished one at ``path``.

        Raises:
            InputError: The file cannot be replaced.
        """
        try:
            path.replace(self._final)
            files.sync(self._final.parent)
        except OSError as error:
            raise InputError(
                f"{self._final}: cannot be written: {error.strerror}; the run is in {path}"
            ) from error

    def _release(self) -> None:
        """Close the file being written, and unlock the output; remove the output if it is empty."""
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            with suppress(OSError):
                if (
                    os.path.samestat(os.fstat(self._lock), self._final.stat())
                    and not self._final.stat().st_size
                ):
                    self._final.unlink()
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()


def _write(file: FileIO, content: bytes) -> None:
    """Write all of it, or nothing: a partial write to a full disk is undone."""
    begin, remaining = file.tell(), memoryview(content)
    try:
        while remaining:
            remaining = remaining[file.write(remaining) or 0 :]
    except BaseException:
        with suppress(OSError):
            file.truncate(begin)
            file.seek(begin)
        raise


def _lock(path: Path) -> int:
    """Lock a file against other processes, and return its descriptor.

    Raises:
        InputError: It cannot be opened.
    """
    try:
        return files.lock(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def _open_without_links(path: str, flags: int) -> int:
    return os.open(path, flags | files.NO_FOLLOW, 0o666)


def _part_path(path: Path) -> Path:
    """Return the path of a run in progress while a finished one exists."""
    return path.with_name(f"{path.name}.part")


def check_results_file(
    path: Path, resume: bool = False, overwrite: bool = False, locked: bool = False
) -> tuple[State, State]:
    """Check, before any work, that a run may be written to a path.

    Args:
        path: The results file.
        resume: Whether an interrupted run is resumed.
        overwrite: Whether another file may be replaced.
        locked: Whether this process holds the file's lock.

    Returns:
        The states of ``path`` and of ``NAME.part``.

    Raises:
        UsageError: Without ``resume``, the path holds an unfinished run or ``NAME.part`` any run;
            or a file is not a results file and may not be replaced, or is damaged; or another
            process writes it.
        InputError: The file cannot be read or written.
    """
    path = files.resolve_output(path)
    check_output(path, RESULTS, overwrite, appending=True)
    part = _part_path(path)
    if os.path.lexists(part):
        check_output(part, RESULTS, appending=True)
    state, part_state = _find_state(path, overwrite), _find_state(part)
    for file, file_state in ((path, state), (part, part_state)):
        if not resume and file_state == "unfinished":
            if not locked and os.path.lexists(path):
                os.close(
                    _lock(path)
                )  # also refused while another process writes it, when it must not be deleted
            raise UsageError(
                file, "holds an unfinished run", "continue it with $resume, or delete it first"
            )
    if not resume and part_state == "finished":
        raise UsageError(
            part, "left over from an interrupted run", "continue it with $resume, or delete it"
        )
    return state, part_state


def write_results(results: Results[Any], path: Path | str, overwrite: bool = False) -> None:
    """Write a results file as ``Results.write``, but over no results of other work.

    Raises:
        UsageError: As ``Results.write`` and ``refuse_other_run``.
        InputError: As ``Results.write``.
    """
    if not overwrite:
        refuse_other_run(Path(path), results.run)
    results.write(path, overwrite)


def refuse_other_run(path: Path, run: Run) -> None:
    """Refuse to replace the results of another command, or of other inputs, which took work.

    Args:
        path: A results file, or no file.
        run: The run that would replace it.

    Raises:
        UsageError: It holds other results.
        InputError: It cannot be read.
    """
    earlier = next(iterate_records(path, strict=False), None) if is_results_file(path) else None
    if not isinstance(earlier, Run):
        return
    contents, paths = (
        [sorted((each.role, getattr(each, name)) for each in one.inputs) for one in (earlier, run)]
        for name in ("fingerprint", "path")
    )
    if earlier.command == run.command and (contents[0] == contents[1] or paths[0] == paths[1]):
        _LOG.warning("%s: replaces the results of the same command and inputs", path)
        return
    inputs = " ".join(each.path for each in earlier.inputs[:2])
    raise UsageError(
        f"{path}: holds the results of {earlier.command} {inputs}; choose another name, or replace "
        "them with --overwrite"
    )


def _refuse_inputs(path: Path, run: Run) -> None:
    """Refuse to replace an input, or a file in the folder of one, even with ``overwrite``.

    Raises:
        UsageError: The path is an input, or in the folder of one.
    """
    resolved = Path(os.path.realpath(path))
    for run_input in run.inputs:
        if Path(os.path.realpath(run_input.path)) in (resolved, *resolved.parents):
            raise UsageError(f"{path}: belongs to the input {run_input.path}; choose another name")


def _find_state(path: Path, overwrite: bool = False) -> State:
    """Return the state of an output path; ``empty`` also if a crash truncated its first line.

    With ``overwrite``, a file that is not a results file, or a damaged one of a finished run, is
    ``foreign``.

    Raises:
        UsageError: The file is not a results file, or a damaged one, and not ``foreign``.
    """
    if not os.path.exists(path):  # noqa: PTH110  (unlike Path.exists(), False also for names that no file can have)
        return "absent"
    if overwrite and path.stat().st_size and not RESULTS.is_at(path):
        return "foreign"
    try:
        last = deque(iterate_records(path, strict=False), maxlen=1)
        if not last:
            return "empty"
        return "finished" if isinstance(last[0], End) else "unfinished"
    except InputError as error:
        if overwrite and not files.is_unfinished(path):
            return "foreign"
        raise UsageError(
            f"{error}; the file is unchanged; delete it, or choose another name"
        ) from error


def _drop_partial_layer(earlier: Results[Any]) -> Results[Any]:
    """Return a run without the last layer's records if a crash may have interrupted them.

    Records of the run as a whole follow those of the layers where a layer has several.
    """
    one_per_layer = all(record.key == ("layer",) for record in earlier.layers[-1:])
    if one_per_layer or earlier.whole or earlier.left_out or earlier.end is not None:
        return earlier
    last = earlier.layers[-1].layer
    return replace(
        earlier, layers=tuple(record for record in earlier.layers if record.layer != last)
    )


def _check_same_run(earlier: Results[Any], run: Run, path: Path) -> Results[Any]:
    """Return the earlier records, which must be from the same inputs and settings.

    Raises:
        UsageError: Inputs or settings differ.
    """
    for recorded, current in zip(earlier.run.inputs, run.inputs, strict=False):
        if bool(recorded.sha256) != bool(current.sha256):
            how = "without $verify" if current.sha256 else "with $verify"
            problem = f"this run was started {how}"
            raise UsageError(path, problem, "resume with the same command")
        problem = ""
        if recorded.path == current.path:
            if (recorded.fingerprint, recorded.sha256) != (current.fingerprint, current.sha256):
                problem = f"the input {current.path} changed since this run began"
            elif recorded.kind == current.kind and recorded.notes != current.notes:
                before, now = (
                    "; ".join(side.notes) or "as a whole" for side in (recorded, current)
                )
                problem = (
                    f"{current.path} was read otherwise when this run began ({before}; now: {now})"
                )
        if problem:
            raise UsageError(
                f"{path}: {problem}, and old and new records must not be mixed; delete the file "
                "and measure again, or write to another file"
            )
    stored, requested = earlier.run.settings, run.settings
    settings = [
        key for key in {**requested, **stored} if stored.get(key, ...) != requested.get(key, ...)
    ]
    earlier_run, current_run = (
        record.model_dump(exclude={"made", "settings"}) for record in (earlier.run, run)
    )
    others = [key for key in current_run if earlier_run[key] != current_run[key]]
    if settings and not others and not set(settings) & set(stored):
        missing = ", ".join(f"settings.{key}" for key in settings)
        problem = f"{path}: has no {missing}, so it is from an older loradiag or other options"
        raise UsageError(f"{problem}; resume with the original command, or write to another file")
    others += [f"settings ({', '.join(settings)})"] if settings else []
    if others:
        problem = f"{path}: this run was started with other {' and '.join(others)}"
        raise UsageError(f"{problem}; resume with the same command, or write to another file")
    return earlier
