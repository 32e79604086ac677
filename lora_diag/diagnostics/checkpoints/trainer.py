"""What a trainer of transformers logged: ``trainer_state.json``, read entry by entry, and compared
between checkpoints.

The file holds one object, whose list ``log_history`` has one entry for each logging step. No more
than one value of it and ``PIECE`` characters are in memory at a time, besides the losses and
learning rates themselves.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TextIO

from lora_diag.errors import InputError
from lora_diag.files import open_regular

STATE = "trainer_state.json"

# 500,000 entries with a loss, a rate and a norm each take 84 MB as transformers writes them, and
# 100,000 of 25 numbers, as TRL's GRPO logs them, 90 MB.
MAX_STATE_BYTES = 100_000_000

# Characters that are read at once, and those of the largest value in the file; an entry has less
# than 2,000.
PIECE = 1_000_000

# Entries of the log. Two logs are in memory at a time.
MAX_ENTRIES = 500_000

# Losses and learning rates from here on are no numbers of a training: a float32 is at most 3.4e38.
LARGEST = 1e100

# Fields of an entry that are read.
_LOGGED = ("loss", "eval_loss", "learning_rate")
# Of these, the ones that one run writes once for a step; an evaluation may be repeated later.
_OWN = ("loss", "learning_rate")
# Steps outside of the entries.
_STEPS = ("global_step", "max_steps")


@dataclass(slots=True)
class Log:
    """What a trainer logged up to a checkpoint.

    Args:
        step: The step of the checkpoint; None if it is not known.
        planned: The last planned step; None if it is not known.
        values: By field of the entries, the values by step.
    """

    step: int | None = None
    planned: int | None = None
    values: dict[str, dict[int, float]] = field(
        default_factory=lambda: {name: {} for name in _LOGGED}
    )

    def add(self, entry: Any) -> str | None:
        """Add an entry of the log; other forms are ignored.

        Returns:
            A field whose value is too large for a training; None if there is none.
        """
        step = as_step(entry.get("step")) if isinstance(entry, dict) else None
        if step is None:
            return None
        for name, values in self.values.items():
            value = entry.get(name)
            if not isinstance(value, int | float):
                continue
            if LARGEST < value < float("inf"):
                return name
            if 0 <= value <= LARGEST:
                values[step] = float(value)
        return None

    def contradicts(self, other: Log) -> bool:
        """Return whether both have a loss or learning rate of one step that differ: they are of two
        runs.
        """
        return any(_differ(self.values[name], other.values[name]) for name in _OWN)


def _differ(first: Mapping[int, float], second: Mapping[int, float]) -> bool:
    """Return whether two logs differ at a common step."""
    fewer, more = sorted((first, second), key=len)
    return any(more.get(step, value) != value for step, value in fewer.items())


def as_step(value: Any) -> int | None:
    """Return a step from a trainer state; None if it is none."""
    return (
        value
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**12
        else None
    )


def collect_log(history: Sequence[Any]) -> Log:
    """Return the log of a running trainer, ``log_history`` of its state."""
    log = Log()
    for entry in history:
        log.add(entry)
    return log


def read_log(folder: Path) -> Log | None:
    """Return what the trainer state of a checkpoint has logged; None without one.

    Raises:
        InputError: It is too large, cannot be read, or holds a number that is too large for a
            training.
    """
    file = folder / STATE
    if not folder.is_dir() or not file.is_file():
        return None
    try:
        if file.stat().st_size > MAX_STATE_BYTES:
            raise InputError(
                f"{file}: is larger than {MAX_STATE_BYTES:,} bytes, too large for a trainer state"
            )
        with open_regular(file) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig") as text:
            return _read_entries(file, _Values(text))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: is not a readable trainer state: it is not UTF-8 text; write it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: is not a readable trainer state ({error}); write it again"
        ) from error


def _read_entries(file: Path, values: _Values) -> Log:
    """Return the log in the values of a trainer state.

    Raises:
        InputError: A number is too large for a training.
        ValueError: The values are not those of one object.
        RecursionError: A value is nested too deeply.
    """
    log, steps, entries = Log(), dict[str, int | None](), 0
    for name in values.names():
        if name in steps:
            raise ValueError(f"it has {name} twice")
        if name != "log_history" or values.peek() != "[":
            value = as_step(values.read())
            steps |= {name: value} if name in _STEPS else {}
            continue
        for entry in values.items():
            entries += 1
            if entries > MAX_ENTRIES:
                raise ValueError(f"more than {MAX_ENTRIES:,} entries")
            if too_large := log.add(entry):
                problem = (
                    f"{too_large} of step {entry['step']} is above {LARGEST:g}, which no "
                    "training has"
                )
                raise InputError(f"{file}: {problem}; correct or remove the entry")
    log.step, log.planned = steps.get("global_step"), steps.get("max_steps")
    return log


# A character that is not blank in JSON.
_SIGN = re.compile(r"[^ \t\r\n]")


class _Values:
    """The values of a JSON object in a file, one at a time."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at, self._ended = file, "", 0, False
        self._decode = json.JSONDecoder().raw_decode

    def names(self) -> Iterator[str]:
        """Yield the names in the object, each of whose values must be read before the next; then
        require the end.

        Raises:
            ValueError: It is no object, or its syntax is wrong.
        """
        self._take("{")
        while self.peek() != "}":
            name = self.read()
            if not isinstance(name, str):
                raise ValueError("a name is no text")
            self._take(":")
            yield name
            self._separate("}")
        self._take("}")
        if self.peek():
            raise ValueError("there is more after its end")

    def items(self) -> Iterator[Any]:
        """Yield the values of a list."""
        self._take("[")
        while self.peek() != "]":
            yield self.read()
            self._separate("]")
        self._take("]")

    def peek(self) -> str:
        """Return the next character that is not blank; the empty text at the end."""
        while (found := _SIGN.search(self._text, self._at)) is None:
            self._at = len(self._text)
            if not self._fill():
                return ""
        self._at = found.start()
        return found.group()

    def read(self) -> Any:
        """Return the next value.

        Raises:
            ValueError: It is no value, or larger than ``PIECE`` characters.
            RecursionError: It is nested too deeply.
        """
        self.peek()
        while True:
            problem = None
            try:
                value, end = self._decode(self._text, self._at)
            except JSONDecodeError as error:
                problem = error.msg
            if problem is None and (
                end < len(self._text) or self._ended
            ):  # a number may go on in the next piece
                self._at = end
                return value
            if len(self._text) - self._at > PIECE:
                raise ValueError(problem or f"a value has more than {PIECE:,} characters")
            if not self._fill() and problem is not None:
                raise ValueError(problem)

    def _take(self, sign: str) -> None:
        """Go behind a sign.

        Raises:
            ValueError: The next character is another.
        """
        if (found := self.peek()) != sign:
            raise ValueError(f"{found!r} where {sign!r} is expected" if found else "it ends early")
        self._at += 1

    def _separate(self, last: str) -> None:
        """Go behind a comma between two values, unless the list ends.

        Raises:
            ValueError: There is neither, or no value after the comma.
        """
        if self.peek() != last:
            self._take(",")
            if self.peek() == last:
                raise ValueError(f"no value before {last!r}")

    def _fill(self) -> bool:
        """Read the next piece; return whether there was one."""
        piece = self._file.read(PIECE)
        self._text, self._at = self._text[self._at :] + piece, 0
        self._ended = not piece
        return bool(piece)
