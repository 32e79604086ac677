"""Errors that a user can act on.

A message states what is wrong, where (file, then tensor) and how to fix it. The class determines
the exit code of the command. ``__main__`` reports any other exception in one message, with the exit
code ``UNREADABLE``.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from string import Template
from typing import Any

DONE, GATE_FAILED, USAGE, UNREADABLE, NOTHING_COMPARED, INCONCLUSIVE = range(6)


def safe(text: str) -> str:
    r"""Escape the unprintable characters of a text, so that a tensor's name cannot move the
    terminal's cursor.

    >>> safe("q_proj\x1b[2J")
    'q_proj\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def safe_lines(text: str) -> str:
    r"""Escape the unprintable characters of a text except the ends of its lines.

    >>> safe_lines("a\x1b[2J\nb")
    'a\\x1b[2J\nb'
    """
    return "\n".join(map(safe, text.split("\n")))


# Longest message, in characters: it quotes files, in which a name may have any length.
MAX_MESSAGE = 2000


def shorten(text: str) -> str:
    """Return a message of at most ``MAX_MESSAGE`` characters: the middle of a longer one is left
    out.
    """
    half = MAX_MESSAGE // 2 - 2
    return text if len(text) <= MAX_MESSAGE else f"{text[:half]} … {text[-half:]}"


class _Quoting(reprlib.Repr):
    """Formats the start of a value: at most 4 items, in at most 2 levels."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"a whole number of {x.bit_length():,} bits"

    def repr_type(self, x: type, level: int) -> str:
        return f"a {x.__name__}"


_QUOTING = _Quoting()
_QUOTING.maxlevel, _QUOTING.maxstring, _QUOTING.maxother = 2, 80, 80
_QUOTING.maxdict = _QUOTING.maxlist = _QUOTING.maxtuple = 4


def quote(value: Any) -> str:
    """Return a value from a file for a message: the start of a long one, of which no more is
    formatted.

    >>> quote("fast"), quote([[["a"]], 1.5]), quote(list(range(9))), quote(10**4000)
    ("'fast'", '[[...], 1.5]', '[0, 1, 2, 3, ...]', 'a whole number of 13,288 bits')
    """
    return _QUOTING.repr(value)


def install_command(extras: str = "", *packages: str) -> str:
    """Return the command that installs loradiag with extras and other packages.

    loradiag is on no package index; there, anyone may register its name.

    >>> install_command("hub,remote", "s3fs")
    "pip install '.[hub,remote]' s3fs, in a clone of loradiag"
    >>> install_command()
    'pip install ., in a clone of loradiag'
    """
    target = f"'.[{extras}]'" if extras else "."
    return f"pip install {' '.join([target, *packages])}, in a clone of loradiag"


def flag(name: str) -> str:
    """Return the name of an option on the command line, given its name in Python, which ends in
    ``_`` if the word is reserved.

    >>> flag("memory_budget"), flag("for_")
    ('--memory-budget', '--for')
    """
    return f"--{name.rstrip('_').replace('_', '-')}"


def _name_in_message(name: str) -> str:
    return "-o" if name == "output" else flag(name)


@dataclass(frozen=True, slots=True)
class Given:
    """The option that an error is about.

    Args:
        option: Its name in Python.
        value: Its value, if the message quotes it.
    """

    option: str
    value: Any = None

    def __str__(self) -> str:
        name = _name_in_message(self.option)
        return name if self.value is None else f"{name} {_format_value(self.value)}"

    def in_python(self) -> str:
        """Return the option as a keyword argument.

        >>> str(Given("ranks", [0, 4])), Given("ranks", [0, 4]).in_python()
        ('--ranks 0,4', 'ranks=[0, 4]')
        """
        value = str(self.value) if isinstance(self.value, os.PathLike) else self.value
        return self.option if value is None else f"{self.option}={value!r}"


def _format_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_format_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Text(Template):
    """A text in which ``$name`` is an option."""

    idpattern = "[a-z][a-z_]*"
    flags = re.ASCII


class _Flags(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return _name_in_message(name)


class _Parameters(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return name


class LoradiagError(Exception):
    """Base of all errors meant for the user; ``exit_code`` is the process's exit code.

    Its arguments are a whole message, or ``(subject, problem, fix)``: what it is about, such as a
    path or an option (``Given``); what is wrong; and what to do. In the last two, ``$name`` is an
    option: its flag on the command line, its parameter in a call from Python.

    Attributes:
        in_python: Whether the message names parameters.

    >>> error = UsageError(Given("kfac"), "needs second moments", "add $activations FILE")
    >>> str(error)
    '--kfac: needs second moments; add --activations FILE'
    >>> error.in_python = True
    >>> str(error)
    'kfac: needs second moments; add activations FILE'
    """

    exit_code = UNREADABLE
    in_python = False

    def __str__(self) -> str:
        subject, *texts = self.args or ("",)
        if self.in_python and isinstance(subject, Given):
            subject = subject.in_python()
        names = _Parameters() if self.in_python else _Flags()
        text = "; ".join(_Text(text).safe_substitute(names) for text in texts if text)
        return shorten(f"{subject}: {text}" if text else str(subject))


class UsageError(LoradiagError):
    """The request is invalid, such as an option or a policy, an output may not be written, or a
    package is missing.
    """

    exit_code = USAGE


class InputError(LoradiagError):
    """An input cannot be read or measured: it is missing, malformed, hostile or unsupported."""


@contextmanager
def require(
    purpose: str | Given, extras: str, *packages: str, kind: type[LoradiagError] = UsageError
) -> Iterator[None]:
    """Turn a failed import in the block into one message with the command that installs the
    package.

    Args:
        purpose: What needs the package.
        extras: The extras that contain it.
        packages: Further packages to install.
        kind: Type of the error.

    Raises:
        LoradiagError: A package is missing; the traceback of the import is not shown.

    Example:
        >>> with require("a frame", "magic"):
        ...     import magic_frames  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lora_diag.errors.UsageError: a frame: needs magic_frames; pip install '.[magic]', in ...
    """
    try:
        yield
    except ImportError as error:
        raise kind(
            purpose,
            f"needs {error.name or (extras, *packages)[-1]}",
            install_command(extras, *packages),
        ) from None


def damaged(path: object, problem: str, fix: str = "save it again") -> InputError:
    """Return the error of an invalid or unsupported input; ``fix`` says what the user can do."""
    return InputError(path, problem, fix)


class NothingComparedError(LoradiagError):
    """The inputs were read, but nothing in them can be compared, or no weight is selected."""

    exit_code = NOTHING_COMPARED


class InconclusiveError(LoradiagError):
    """All inputs were read and measured, and no requested result was found."""

    exit_code = INCONCLUSIVE


class MemoryLimitError(LoradiagError):
    """A layer does not fit into the memory limit or the machine's memory; other layers are still
    measured.

    Attributes:
        fro: ‖ΔW‖_F, if it has been measured.
        base_fro: ‖W_base‖_F, if it has been measured.
    """

    fro: float | None = None
    base_fro: float | None = None
