r"""Rank, α and scale of each module, from the regular expressions of an adapter's config or numbers
in its file.

A key k of ``rank_pattern`` or ``alpha_pattern`` matches module m iff
``re.match(rf"(.*\.)?({k})$", m)``; the first key in the order of the file wins
(``peft.utils.other.get_pattern_key``). ``target_modules`` and ``exclude_modules`` are a list of
names, or one expression for the whole path. The expressions are from untrusted files, and Python's
engine backtracks. Engines that do not have no lookaheads, which trainers write, and static bounds
refuse harmless patterns. Hence the engine is Python's own, in a process that is ended when its time
is over, and ends by itself if this one was killed.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from lora_diag.adapters import matcher
from lora_diag.adapters.source import AdapterFiles, Config, ends_of, is_number
from lora_diag.adapters.updates import read
from lora_diag.errors import InputError, damaged, quote
from lora_diag.storage import Checkpoint

# Seconds for all patterns of one table with all modules, including 0.02 s to start the process.
# Usual tables take 1 ms.
SECONDS = 10.0

# Longest pattern: compiling takes memory in proportion.
MAX_LENGTH = 100_000

# A pattern without these neither repeats nor chooses, so its time is linear and it needs no
# process, unless there are more pairs of a pattern and a name, of which each takes up to 1 µs.
_BRANCHING, MAX_PAIRS = frozenset("*+?{}|()[]"), 1_000_000


@dataclass(frozen=True)
class Pattern:
    """One table of patterns of the config, matched with the adapter's modules.

    Args:
        key: ``rank_pattern`` or ``alpha_pattern``.
        entries: ``(key in the file, value)``, in the order of the file.
        matched: The entries that match each module.
    """

    key: str
    entries: tuple[tuple[str, float], ...]
    matched: Mapping[str, list[tuple[str, float]]]

    def matches(self, module: str) -> list[tuple[str, float]]:
        """Return the keys that match a module and their values, the deciding one first; if none
        does, the equal key.
        """
        return self.matched[module] or [entry for entry in self.entries if entry[0] == module]

    def notes(self, modules: Iterable[str]) -> list[str]:
        """Return notes on keys that match nothing, and on modules matched by contradicting keys."""
        if not self.entries:
            return []
        matches = {module: self.matches(module) for module in modules}
        used = {text for matched in matches.values() for text, _ in matched}
        notes = [
            f"{self.key}: the key {text!r} matches no module"
            for text, _ in self.entries
            if text not in used
        ]
        disputed = {
            module: matched
            for module, matched in matches.items()
            if len({value for _, value in matched}) > 1
        }
        if disputed:
            module, matched = next(iter(disputed.items()))
            example = f"{module} ({', '.join(f'{text!r} = {value:g}' for text, value in matched)})"
            claim = (
                f"{len(disputed)} modules are matched by keys with different values, such as "
                f"{example}"
            )
            rule = (
                "the first in the file decides, and PEFT sorts keys when it saves, so training "
                "may have used another"
            )
            notes.append(f"{self.key}: {claim}; {rule}")
        return notes


def read_pattern(config: Config, key: str, modules: Iterable[str]) -> Pattern:
    """Return one table of patterns, matched with modules.

    Args:
        config: The adapter's config.
        key: ``rank_pattern`` or ``alpha_pattern``.
        modules: The names to match.

    Raises:
        InputError: The setting is not a table; a key is no regular expression, is too long or takes
            too long; a value is not a finite number.
    """
    table = config.table(key)
    for text, value in table.items():
        if not is_number(value):
            problem = f"{key}[{quote(text)}] must be a finite number in float32, not {quote(value)}"
            raise damaged(config.path, problem, "correct it")
    names = tuple(dict.fromkeys(modules))
    rows = _match(
        f"{config.path}: {key}", "match", {rf"(.*\.)?({text})$": text for text in table}, names
    )
    entries = tuple((text, float(value)) for text, value in table.items())
    matched: dict[str, list[tuple[str, float]]] = {name: [] for name in names}
    for entry, row in zip(entries, rows, strict=True):
        for name, digit in zip(names, row, strict=True):
            if digit == "1":
                matched[name].append(entry)
    return Pattern(key, entries, matched)


def find_targets(
    config: Config, modules: Iterable[str], key: str = "target_modules"
) -> frozenset[str]:
    """Return the modules that a setting of PEFT names: equal to a name, ending in ``.`` and it, or
    matched as a whole.

    Args:
        config: The adapter's config.
        modules: Paths of modules.
        key: ``target_modules``, in which ``all-linear`` stands for all of these modules, or
            ``exclude_modules``.

    Raises:
        InputError: The value is neither names nor a regular expression, or it is too long or takes
            too long.
    """
    targets = config.values.get(key) or []
    names = tuple(dict.fromkeys(modules))
    if isinstance(targets, str):
        if targets == "all-linear" and key == "target_modules":
            return frozenset(names)
        (row,) = _match(f"{config.path}: {key}", "fullmatch", {targets: targets}, names)
        return frozenset(name for name, digit in zip(names, row, strict=True) if digit == "1")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        problem = f"{key} must be names or one regular expression, not {quote(targets)}"
        raise damaged(config.path, problem, "correct it")
    wanted = frozenset(targets)
    return frozenset(name for name in names if not wanted.isdisjoint(ends_of(name)))


def _match(
    where: str, method: str, patterns: Mapping[str, str], names: tuple[str, ...]
) -> list[str]:
    """Return for each pattern one digit per name, 1 if it matches.

    Args:
        where: File and key, for the message.
        method: ``match`` or ``fullmatch``.
        patterns: The patterns, and their text in the file.
        names: The names.

    Raises:
        InputError: A pattern is invalid, longer than ``MAX_LENGTH``, or takes too long.
    """
    for text in patterns.values():
        if len(text) > MAX_LENGTH:
            raise InputError(
                f"{where}: the pattern {text[:80]!r}… has {len(text):,} characters; simplify it"
            )
    are_many = len(patterns) * len(names) > MAX_PAIRS
    branching = [p for p, text in patterns.items() if are_many or not _BRANCHING.isdisjoint(text)]
    in_process = _match_in_process(method, tuple(branching), names) if branching else ()
    row_by_pattern = dict[str, str | None].fromkeys(branching) | dict(
        zip(branching, in_process, strict=False)
    )
    rows = []
    for pattern, text in patterns.items():
        is_branching = pattern in row_by_pattern
        row = (
            row_by_pattern[pattern]
            if is_branching
            else matcher.match_names(method, pattern, list(names))
        )
        if row is None:
            problem = (
                f"could not be matched with {len(names)} names in {SECONDS:g} s (nested or "
                "many repeats)"
            )
            raise damaged(
                where,
                f"the pattern {text[:80]!r} {problem}",
                "simplify it, or give a list of names",
            )
        if len(row) != len(names) or row.strip("01"):
            raise damaged(
                where,
                f"the key {text[:80]!r} is not a valid regular expression ({row})",
                "correct it",
            )
        rows.append(row)
    return rows


@lru_cache(maxsize=64)
def _match_in_process(
    method: str, patterns: tuple[str, ...], names: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the rows of ``match_names``, without those of the first pattern that takes too long
    and its successors.
    """
    command = [sys.executable, "-I", "-S", matcher.__file__, str(math.ceil(SECONDS))]
    request = json.dumps([method, patterns, names]).encode()
    try:
        output = subprocess.run(
            command, input=request, capture_output=True, timeout=SECONDS, check=False
        ).stdout
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
    return tuple(json.loads(line) for line in output.split(b"\n")[:-1])


@dataclass(frozen=True, slots=True)
class Scale:
    """s = ``factor``, or ``factor``·α / ``rank`` with α read from the file.

    Args:
        factor: The number.
        alpha: Name of a tensor with one number; empty if there is only the factor. kohya's rule: α
            missing or 0 means α = r.
        rank: The r by which α is divided.
    """

    factor: float = 1.0
    alpha: str = ""
    rank: int = 1

    @property
    def known(self) -> float | None:
        """The factor s if headers determine it; None if its α is stored in the file."""
        return None if self.alpha else self.factor


def make_scale(source: AdapterFiles, alpha: str, rank: int) -> Scale:
    """Return the scale of factors: by the α in the file with this name; if the name is empty, by
    the stated α, or 1.
    """
    return Scale(1.0, alpha, rank) if alpha else Scale(source.scale_without_alpha(rank), "", rank)


def compute_scale(checkpoint: Checkpoint, scale: Scale) -> float:
    """Return s, reading α if it is stored in the file, where an α of 0 counts as the rank."""
    if not scale.alpha:
        return scale.factor
    read_alpha = (
        checkpoint.read_array if checkpoint.decodes(scale.alpha) else partial(read, checkpoint)
    )
    alpha = float(read_alpha(scale.alpha).reshape(-1)[0])
    return scale.factor * (alpha / scale.rank if alpha else 1.0)


@dataclass(frozen=True)
class Scaling:
    """The scale of each module's B·A.

    Args:
        config: The adapter's config.
        ranks: ``rank_pattern``.
        alphas: ``alpha_pattern``.
    """

    config: Config
    ranks: Pattern
    alphas: Pattern

    @staticmethod
    def read(config: Config, modules: list[str]) -> Scaling:
        """Return the scaling of modules by a config."""
        return Scaling(
            config,
            *(read_pattern(config, key, modules) for key in ("rank_pattern", "alpha_pattern")),
        )

    def rank(self, module: str) -> int:
        """Return r of a module."""
        return get_rank(self.config, self.ranks, module)

    def alpha(self, module: str, key: str = "lora_alpha") -> float:
        """Return α of a module: from ``alpha_pattern``, else the setting ``key``."""
        matched = self.alphas.matches(module)
        return matched[0][1] if matched else self.config.number(key)

    def of_module(self, module: str) -> float:
        """Return s of a module: α/r of ``lora_alpha``, or α/√r with rsLoRA."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.config.flag("use_rslora") else rank)

    def describe(self, alpha: str = "lora_alpha") -> str:
        """Return the definition of s and its source as text."""
        return (
            f"{alpha} / {'√r (use_rslora)' if self.config.flag('use_rslora') else 'r'}, from "
            f"{self.config.path.name}"
        )

    def notes(self, modules: list[str]) -> list[str]:
        """Return notes on doubtful patterns."""
        return self.ranks.notes(modules) + self.alphas.notes(modules)


def get_rank(config: Config, ranks: Pattern, module: str) -> int:
    """Return r of a module, given ``rank_pattern``.

    Raises:
        InputError: The rank is not a whole number from 1 up.
    """
    matched = ranks.matches(module)
    if not matched:
        return config.integer("r")
    key, value = matched[0]
    if value < 1 or value != int(value):
        problem = f"rank_pattern[{key!r}] must be a whole number from 1 up, not {value:g}"
        raise damaged(config.path, problem, "correct it")
    return int(value)


def describe_scaling(config: Config, alpha: str = "lora_alpha") -> str:
    """Return r and α as text, with a remark if patterns change them."""
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if config.values.get(key)]
    words = f"r={config.values.get('r')}, alpha={config.values.get(alpha)}"
    return f"{words} (and {', '.join(patterns)})" if patterns else words
