"""One step of advice, whatever rule gives it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Advice:
    """One step.

    Args:
        rule: The name of the rule.
        do: What to do.
        because: The evidence, with its numbers.
        condition: When the rule speaks.
        source: Where it comes from.
        command: What to run.
        layers: The layers it is about, all of them; names as the file has them.
    """

    rule: str
    do: str
    because: str
    condition: str
    source: str
    command: str
    layers: tuple[str, ...] = ()
