"""One table of a policy, its keys taken one by one: a wrong value and a key that nobody took are errors."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from lora_diag.errors import UsageError

Place = tuple[str | int, ...]

_MISSING: Any = object()


class Table:
    """One table of a policy.

    Args:
        values: What is in it.
        place: Keys and indices that lead to it from the top.
        problem: Makes an error of a place and a text.
    """

    def __init__(self, values: dict[str, Any], place: Place, problem: Callable[[Place, str], UsageError]) -> None:
        self.values, self.place, self.problem = values, place, problem
        self.known: list[str] = []

    def error(self, key: str, text: str) -> UsageError:
        """Return an error at a key; at the table if it is not there."""
        return self.problem((*self.place, key), text)

    def value(self, key: str, default: Any = _MISSING) -> Any:
        """Take a value of any type."""
        self.known.append(key)
        if key in self.values:
            return self.values[key]
        if default is _MISSING:
            raise self.error(key, f"{self.place[0]}: '{key}' is missing")
        return default

    def _checked(self, key: str, default: Any, what: str, is_right: Callable[[Any], bool]) -> Any:
        value = self.value(key, default)
        if key in self.values and not is_right(value):
            raise self.error(key, f"{key} is {what}, not {_shown(value)}")
        return value

    def word(self, key: str, default: Any = _MISSING) -> str:
        """Take a text."""
        return cast(str, self._checked(key, default, "text in quotes", lambda value: isinstance(value, str)))

    def choice(self, key: str, options: Sequence[Any], default: Any = _MISSING) -> Any:
        """Take one of a few values."""
        what = " or ".join(f'"{option}"' for option in options)
        return self._checked(key, default, what, lambda value: value in options)

    def share(self, key: str, default: Any) -> Any:
        """Take a number from 0 to 1."""
        return self._checked(key, default, "a number from 0 to 1", lambda value: is_finite(value) and 0 <= value <= 1)

    def words(self, key: str, options: Sequence[str]) -> list[str]:
        """Take a list of some of a few words."""
        what = f"a list out of {', '.join(options)}"
        return cast(
            list[str],
            self._checked(key, [], what, lambda value: isinstance(value, list) and all(v in options for v in value)),
        )

    def pattern(self, key: str, needed: bool = False) -> re.Pattern[str] | None:
        """Take a regular expression; None if it is not there and need not be."""
        if key not in self.values and not needed:
            self.known.append(key)
            return None
        text = self.word(key)
        try:
            return re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise self.error(key, f"{key}: {_shown(text)} is no regular expression: {error}") from error

    def table(self, key: str) -> Table:
        """Take a table, empty if it is not there."""
        values = self._checked(key, {}, f"a table, [{key}]", lambda value: isinstance(value, dict))
        return Table(values, (*self.place, key), self.problem)

    def tables(self, key: str) -> list[Table]:
        """Take a list of tables."""

        def is_right(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(item, dict) for item in value)

        found = self._checked(key, [], f"a list of tables: write [[{key}]]", is_right)
        return [Table(values, (key, i), self.problem) for i, values in enumerate(found)]

    def close(self) -> None:
        """Refuse the keys that were not taken."""
        for key in self.values:
            if key not in self.known:
                close = difflib.get_close_matches(key, self.known, n=1)
                meant = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(self.known)}"
                raise self.error(key, f"unknown key '{key}'; {meant}")


def is_finite(value: Any) -> bool:
    """Say whether a value is a number, no flag, neither NaN nor infinite."""
    return type(value) in {int, float} and math.isfinite(value)


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
