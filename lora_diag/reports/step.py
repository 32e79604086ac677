"""A step of advice as data, from which pages derive sentences and a command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Advice:
    """One step.

    The numbers in ``do`` are fields, and the command is derived from the same values, so that the two cannot disagree.

    Args:
        rule: The name of the rule.
        do: The action of the command.
        because: The evidence, with its numbers.
        condition: Condition of the rule.
        source: Source of the rule.
        argv: The command, word by word.
        ranks: Ranks of the command.
        rates: Learning rates of the command.
        seeds: Runs of each rank.
        params: Trainable parameters.
        adapters: Paths of its adapters.
        layers: All layers concerned, with names as in the file.
        about: Paths of the full fine-tunes concerned, if the page has several.
    """

    rule: str
    do: str
    because: str
    condition: str
    source: str
    argv: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    seeds: int | None = None
    params: int | None = None
    adapters: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    about: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command, quoted for a shell."""
        return shlex.join(self.argv)


def command(*words: str | Sequence[str], **options: object) -> tuple[str, ...]:
    """Return a command of ``loradiag``, word by word; options that are None, False or empty are omitted.

    Args:
        words: Command and arguments; sequences are expanded.
        options: Options by name; sequences are joined by commas, True is a flag.

    >>> command("probe sweep", "base", ["a", "b"], ranks=(4, 8), full=True, seeds=None)
    ('loradiag', 'probe', 'sweep', 'base', 'a', 'b', '--ranks', '4,8', '--full')
    """
    first, *rest = words
    assert isinstance(first, str)
    arguments = ["loradiag", *first.split()]
    for word in rest:
        arguments += [word] if isinstance(word, str) else word
    for name, value in options.items():
        if value is None or value is False or (isinstance(value, list | tuple) and not value):
            continue
        option = f"--{name.replace('_', '-')}" if len(name) > 1 else f"-{name}"
        arguments += [option] if value is True else [option, _quote_value(value)]
    return tuple(arguments)


def format_ranks(ranks: Sequence[int]) -> str:
    """Return ranks as part of a sentence.

    >>> format_ranks([4]), format_ranks([4, 8, 16])
    ('r=4', 'r=4, r=8 and r=16')
    """
    words = [f"r={rank}" for rank in ranks]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _quote_value(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_quote_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
