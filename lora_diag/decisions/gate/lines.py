"""Line numbers of values in a TOML file, which ``tomllib`` does not provide.

The file is truncated after each line; the first valid piece with the value ends where the value does, and the value
begins after the previous valid piece. This covers all TOML syntax without a second parser.
"""

from __future__ import annotations

import contextlib
import re
import tomllib
from typing import Any

Path = tuple[str | int, ...]

# A comment or a string of a valid file.
_STRING = re.compile(
    r"""#[^\n]*|"{3}(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}|'{3}(?:[^']|'{1,2}(?!'))*'{3,5}|"(?:[^"\\]|\\.)*"|'[^']*'""",
    re.DOTALL,
)


def line_of(text: str, path: Path) -> int:
    r"""Return the line, counted from 1, on which the value at a path begins; for the longest existing part of the path.

    Args:
        text: The text of a valid file.
        path: Keys of tables and indices of arrays.

    Example:
        >>> line_of("a = 1\n\n[[rule]]\nname = 'x'\n", ("rule", 0, "name"))
        4
    """
    document = tomllib.loads(text)
    while path and not _has_path(document, path):
        path = path[:-1]
    lines = text.split("\n")
    # The value is in none of the pieces of up to ``last`` lines, and in all those of ``within`` and more.
    last, within = 0, len(lines)
    while within - last > 1:
        middle = (last + within) // 2
        number, piece = _parse_longest(lines, middle, last)
        if number == last:
            number, piece = _parse_shortest(lines, middle, within)
        if number == within:
            break
        if _has_path(piece, path):
            within = number
        else:
            last = number
    return last + 1 if path else 1


def lines_of_tables(text: str, key: str) -> list[int]:
    r"""Return the lines, counted from 1, of the headers ``[[key]]`` of a valid file.

    >>> lines_of_tables("[[rule]]\nx = '''\n[[rule]]\n'''\n [[ rule ]] # two\n", "rule")
    [1, 5]
    """
    blank = _STRING.sub(lambda found: "\n" * found[0].count("\n"), text)
    header = re.compile(rf"[ \t]*\[\[[ \t]*{re.escape(key)}[ \t]*\]\]")
    return [number for number, line in enumerate(blank.split("\n"), 1) if header.match(line)]


def _parse_longest(lines: list[str], number: int, first: int) -> tuple[int, Any]:
    """Return the lines of the longest valid piece of at most ``number`` and more than ``first``, and its contents.

    Without one, ``first`` and nothing.
    """
    while number > first:
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return number, tomllib.loads("\n".join(lines[:number]))
        number -= 1
    return first, {}


def _parse_shortest(lines: list[str], number: int, last: int) -> tuple[int, Any]:
    """Return the lines of the shortest valid piece of at least ``number`` and fewer than ``last``, and its contents.

    Without one, ``last`` and nothing.
    """
    while number < last:
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return number, tomllib.loads("\n".join(lines[:number]))
        number += 1
    return last, {}


def _has_path(document: Any, path: Path) -> bool:
    for step in path:
        if isinstance(step, int):
            if not isinstance(document, list) or step >= len(document):
                return False
        elif not isinstance(document, dict) or step not in document:
            return False
        document = document[step]
    return True
