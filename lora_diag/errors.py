"""Errors that a user can act on.

A message states what is wrong, where (file, then tensor) and how to fix it. The class determines
the exit code of the command. ``__main__`` reports any other exception in one message, with the exit
code ``UNREADABLE``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
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


class LoradiagError(Exception):
    """Base of all errors meant for the user; ``exit_code`` is the process's exit code."""

    exit_code = UNREADABLE

    def __str__(self) -> str:
        return shorten(super().__str__())


class UsageError(LoradiagError):
    """The request is invalid, such as an option or a policy, an output may not be written, or a
    package is missing.
    """

    exit_code = USAGE


class InputError(LoradiagError):
    """An input cannot be read or measured: it is missing, malformed, hostile or unsupported."""


@contextmanager
def require(
    purpose: str, extras: str, *packages: str, kind: type[LoradiagError] = UsageError
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
        lora_diag.errors.UsageError: a frame needs magic_frames; pip install '.[magic]', in ...
    """
    try:
        yield
    except ImportError as error:
        raise kind(
            f"{purpose} needs {error.name or (extras, *packages)[-1]}; "
            f"{install_command(extras, *packages)}"
        ) from None


def damaged(path: object, problem: str, fix: str = "save it again") -> InputError:
    """Return the error of an invalid or unsupported input; ``fix`` says what the user can do."""
    return InputError(f"{path}: {problem}; {fix}")


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
