"""One step of advice, whatever rule gives it: data, of which a page makes sentences and a command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Advice:
    """One step.

    The numbers that ``do`` asks for are fields, and the command is made of the same values: the two cannot disagree.

    Args:
        rule: The name of the rule.
        do: What to do, which is what the command does.
        because: The evidence, with its numbers.
        condition: When the rule speaks.
        source: Where it comes from.
        argv: What to run, word by word.
        ranks: The ranks that the command tries, shows or extracts.
        rates: The learning rates that it tries.
        seeds: The runs of each rank that it asks for.
        params: The trainable parameters that it spends.
        adapters: The adapters that it takes, by their paths.
        layers: The layers it is about, all of them; names as the file has them.
        about: The full fine-tunes it is about, by their paths, where the page has several.
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
        """What to run, as a shell takes it."""
        return shlex.join(self.argv)


def command(*words: str | Sequence[str], **options: object) -> tuple[str, ...]:
    """Return a command of ``loradiag``, word by word; options that are None, False or empty are left out.

    Args:
        words: Command and arguments; of a sequence each is a word.
        options: By their names; a sequence is joined by commas, True is a flag.

    >>> command("probe sweep", "base", ["a", "b"], ranks=(4, 8), full=True, seeds=None)
    ('loradiag', 'probe', 'sweep', 'base', 'a', 'b', '--ranks', '4,8', '--full')
    """
    first, *rest = words
    assert isinstance(first, str)
    found = ["loradiag", *first.split()]
    for word in rest:
        found += [word] if isinstance(word, str) else word
    for name, value in options.items():
        if value is None or value is False or (isinstance(value, list | tuple) and not value):
            continue
        option = f"--{name.replace('_', '-')}" if len(name) > 1 else f"-{name}"
        found += [option] if value is True else [option, _word(value)]
    return tuple(found)


def listed(ranks: Sequence[int]) -> str:
    """Return ranks as a sentence has them.

    >>> listed([4]), listed([4, 8, 16])
    ('r=4', 'r=4, r=8 and r=16')
    """
    words = [f"r={rank}" for rank in ranks]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _word(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
