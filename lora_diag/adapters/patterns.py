r"""``rank_pattern`` and ``alpha_pattern``: PEFT's rule for values that differ by module; slow patterns are refused.

A key k matches module m iff ``re.match(rf"(.*\.)?({k})$", m)``; the first key in the order of the file wins
(``peft.utils.other.get_pattern_key``). The keys are regular expressions from untrusted files, and Python's engine
backtracks, so matching can take years; keys with a large worst case are rejected.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_diag.adapters.keys import is_named
from lora_diag.adapters.source import Config, is_number
from lora_diag.errors import InputError

# Longest key, and the limit of the worst case in engine steps over all modules: about 10 s.
MAX_LENGTH = 1000
MAX_STEPS = 2e9

# An escape, a character class, the start of a group, a counted repeat, or one character.
TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[^()]*?[:=!>]|\{\d*,?\d*\}|.", re.DOTALL)


@dataclass(frozen=True)
class Pattern:
    """One pattern table of the config, with compiled keys.

    Args:
        key: ``rank_pattern`` or ``alpha_pattern``.
        entries: ``(key in the file, compiled, value)``, in the order of the file.
    """

    key: str
    entries: tuple[tuple[str, re.Pattern[str], float], ...]

    def matches(self, module: str) -> list[tuple[str, float]]:
        """Return the keys that match a module and their values, the deciding one first."""
        matched = [(text, value) for text, compiled, value in self.entries if compiled.match(module)]
        return matched or [(text, value) for text, _, value in self.entries if text == module]

    def notes(self, modules: Iterable[str]) -> list[str]:
        """Return notes on keys that match nothing, and on modules matched by contradicting keys."""
        if not self.entries:
            return []
        matches = {module: self.matches(module) for module in modules}
        used = {text for matched in matches.values() for text, _ in matched}
        notes = [f"{self.key}: the key {text!r} matches no module" for text, *_ in self.entries if text not in used]
        disputed = {module: matched for module, matched in matches.items() if len({value for _, value in matched}) > 1}
        if disputed:
            module, matched = next(iter(disputed.items()))
            claims = ", ".join(f"{text!r} = {value:g}" for text, value in matched)
            notes.append(
                f"{self.key}: {len(disputed)} modules are matched by keys with different values, such as {module} "
                f"({claims}); the first in the file decides, and PEFT sorts keys when it saves, so training may "
                "have used another"
            )
        return notes


def read_pattern(config: Config, key: str, modules: Iterable[str]) -> Pattern:
    """Read and check one table of patterns.

    Args:
        config: The adapter's config.
        key: ``rank_pattern`` or ``alpha_pattern``.
        modules: The names to match; their number enters the worst case.

    Raises:
        InputError: A key is not a regular expression or could take too long; a value is not a finite number.
    """
    table = config.table(key)
    lengths = [len(module) for module in modules] if table else []
    entries = []
    for text, value in table.items():
        if not is_number(value):
            raise InputError(f"{config.path}: {key}[{text!r}] must be a finite number, not {value!r}; correct it")
        entries.append((text, _compile(text, f"{config.path}: {key}", lengths), float(value)))
    return Pattern(key, tuple(entries))


def _compile(text: str, where: str, lengths: list[int]) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # "possible nested set" is for authors, not for readers
            compiled = re.compile(rf"(.*\.)?({text})$") if len(text) <= MAX_LENGTH else None
        if compiled is None or sum(worst_case(text, length) for length in lengths) > MAX_STEPS:
            raise InputError(
                f"{where}: the key {text[:80]!r} could take too long to match (nested repeats, or too many "
                "wildcards); simplify it"
            )
        return compiled
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"{where}: the key {text!r} is not a valid regular expression ({error}); correct it"
        ) from error


def worst_case(text: str, length: int) -> float:
    r"""Return an upper bound on the number of ways in which a backtracking engine can match a pattern with a name.

    q repeats, with the one that PEFT puts in front, split a name of n characters in at most C(n+q, q) ways; every
    optional part doubles it, a group of k alternatives multiplies it by k. A repeat of a group that can match in
    several ways is exponential in n, and counted as infinite.

    >>> worst_case(r"model\.layers\.0\.(q|k)_proj", 40)
    82.0
    >>> worst_case(r"(a+)+", 40)
    inf
    """
    unbounded, paths = 1, 1.0
    alternatives = [1]  # per open group
    choice = [False]  # per open group: whether its content can match in several ways
    after_choice = False  # whether the previous item is a group with such a choice
    for token in TOKEN.findall(text):
        repeat = token in {"*", "+", "?"} or (token[0] == "{" and len(token) > 2)
        if repeat and after_choice and token != "?":
            return math.inf
        after_choice = False
        if token[0] == "(":
            alternatives.append(1)
            choice.append(False)
        elif token == ")" and len(choice) > 1:
            paths *= alternatives.pop()
            after_choice = choice.pop()
            choice[-1] |= after_choice
        elif token == "|":
            alternatives[-1] += 1
            choice[-1] = True
        elif token == "?":
            paths *= 2
            choice[-1] = True
        elif repeat and token.strip("{}").isdecimal() is False:
            unbounded += 1
            choice[-1] = True
    return math.comb(length + unbounded, unbounded) * paths * alternatives[0]


def is_target(module: str, names: str | list[str], path: Path) -> bool:
    """Return whether a module is one of PEFT's targets: equal to a name, or ending in ``.`` and a name.

    Args:
        module: Its path.
        names: ``target_modules``: a list, one regular expression for the whole path, or ``all-linear``.
        path: The config, for the message.

    Raises:
        InputError: It is not a regular expression.
    """
    if not isinstance(names, str):
        return any(is_named(module, name) for name in names)
    try:
        return names == "all-linear" or re.fullmatch(names, module) is not None
    except re.error as error:
        raise InputError(f"{path}: target_modules is not a valid regular expression ({error}); correct it") from error


def module_targets(config: Config, modules: Iterable[str]) -> str | list[str]:
    """Return ``target_modules`` after checking that matching is fast.

    Raises:
        InputError: They are invalid, or could take too long to match.
    """
    names = config.values.get("target_modules") or []
    if not isinstance(names, str):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{config.path}: target_modules must be names or one regular expression, not {names!r}")
        return names
    if sum(worst_case(names, len(module)) for module in modules) > MAX_STEPS:
        raise InputError(f"{config.path}: target_modules could take too long to match; simplify it, or give a list")
    return names
