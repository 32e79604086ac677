"""Errors that a user can act on.

A message says what is wrong, where (file, then tensor) and what to do about it; the class says with which exit code
the command ends. Everything else that is raised is a bug and shows its traceback.
"""

from __future__ import annotations

DONE, GATE_FAILED, USAGE, UNREADABLE, NOTHING_COMPARED, INCONCLUSIVE = range(6)


def safe(text: str) -> str:
    r"""Return text whose control characters are spelled out: a tensor's name must not move the cursor.

    >>> safe("q_proj\x1b[2J")
    'q_proj\\x1b[2J'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class LoradiagError(Exception):
    """Base of all errors meant for the user; ``exit_code`` is the process's exit code."""

    exit_code = UNREADABLE


class UsageError(LoradiagError):
    """The request itself makes no sense: a bad option, regex or policy."""

    exit_code = USAGE


class InputError(LoradiagError):
    """An input cannot be read or measured: missing, malformed, hostile or of an unsupported kind."""


class NothingComparedError(LoradiagError):
    """Both sides were read, but no weight of one meets a weight of the other."""

    exit_code = NOTHING_COMPARED


class InconclusiveError(LoradiagError):
    """All was read and measured, and nothing of what was asked for could be found."""

    exit_code = INCONCLUSIVE


class MemoryLimitError(LoradiagError):
    """A layer does not fit into the memory that a run may take, by any method; the others go on.

    Attributes:
        fro: ‖ΔW‖_F, if it has been measured.
        base_fro: ‖W_base‖_F, likewise.
    """

    fro: float | None = None
    base_fro: float | None = None
