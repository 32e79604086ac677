"""TOML → policy, with errors that name the line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_diag.decisions.gate.lines import line_of, lines_of_tables
from lora_diag.decisions.gate.policy import READY, Policy
from lora_diag.decisions.gate.tables import PlacedError, quote_text
from lora_diag.errors import UsageError

# About 1,000 rules. The parser takes the square of the depth of a key, and no key of a policy is deeper than 3.
MAX_BYTES, MAX_DEPTH = 100_000, 16
_PART = r"""(?:[\w-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')[ \t]*\.[ \t]*"""
_DEEP = re.compile(rf"(?<![\w\\-])(?:{_PART}){{{MAX_DEPTH}}}", re.ASCII)


def read_policy(path: Path | str, content: str | None = None) -> Policy:
    """Read a policy.

    Args:
        path: Its file.
        content: Its text; default read from the file.

    Raises:
        UsageError: The file cannot be read or is invalid; the message names the line.
    """
    if content is None:
        try:
            with Path(path).open("rb") as file:
                content = file.read(4 * MAX_BYTES + 1).decode("utf-8")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8 text"
            problem = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read as a policy: {why}"
            fix = (
                f"for the built-in policy use --policy {path}"
                if str(path) in READY
                else "the order is: loradiag gate POLICY RESULTS..."
            )
            raise UsageError(f"{path}: {problem}; {fix}") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"{path}: has more than {MAX_BYTES:,} characters, too many for a policy; use fewer rules")
    if content.startswith('{"record"'):
        raise UsageError(f"{path}: contains results, not a policy; the order is: loradiag gate POLICY RESULTS...")
    content = content.replace("\r\n", "\n")
    if deep := _DEEP.search(content):
        line = content.count("\n", 0, deep.start()) + 1
        raise UsageError(f"{path}: line {line}: has a key of more than {MAX_DEPTH} parts; correct it")
    try:
        policy = Policy.model_validate(tomllib.loads(content))
    except ValidationError as error:
        where, text = _describe_error(error)
        raise UsageError(f"{path}: line {line_of(content, where)}: {text}") from error
    except (ValueError, RecursionError) as error:  # of tomllib, and of Python for integers of more than 4,300 digits
        if not isinstance(error, tomllib.TOMLDecodeError | RecursionError):
            raise UsageError(f"{path}: is not valid TOML: a number has too many digits; correct it") from error
        position = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        location = f"line {position[1]}" if position else f"line {content.count(chr(10)) + 1}"
        raise UsageError(
            f"{path}: {location}: is not valid TOML: {str(error)[: position.start() if position else None]}"
        ) from error

    def add_lines(key: str, tables: list[Any]) -> list[Any]:
        lines = lines_of_tables(content, key)
        if len(lines) != len(tables):  # some are written inline
            lines = [line_of(content, (key, i)) for i in range(len(tables))]
        return [table.model_copy(update={"line": line}) for table, line in zip(tables, lines, strict=True)]

    return policy.model_copy(
        update={
            "path": str(path),
            "rules": add_lines("rule", policy.rules),
            "regressions": add_lines("baseline", policy.regressions),
            "waivers": add_lines("waiver", policy.waivers),
        }
    )


def _describe_error(error: ValidationError) -> tuple[tuple[str | int, ...], str]:
    """Return the path of keys and indices to the first error, and its description."""
    first = error.errors()[0]
    location, value, details = first["loc"], quote_text(first["input"]), first.get("ctx", {})
    key = next(step for step in reversed(("", *location)) if isinstance(step, str))
    match first["type"]:
        case "missing":
            return location, f"{location[0]}: '{key}' is missing"
        case "literal_error":
            return location, f"{key} is {details['expected'].replace(chr(39), chr(34))}, not {value}"
        case "list_type":
            return location, f"{key} is a list of tables: write [[{key}]], not {value}"
        case "model_type":
            expected = f"a list of tables: write [[{key}]]" if isinstance(location[-1], int) else f"a table, [{key}]"
            return location, f"{key} is {expected}, not {value}"
    cause = details.get("error")
    return (*location, *cause.place) if isinstance(cause, PlacedError) else location, str(cause or first["msg"])
