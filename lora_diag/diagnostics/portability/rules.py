"""Rules of consumers: pure functions of an adapter file's contents, each for a range of versions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

from lora_diag.adapters.contents import Contents, Item
from lora_diag.adapters.layouts import why_not_tied
from lora_diag.errors import UsageError

_VERSION = re.compile(r"b?(\d+(?:\.\d+)*)(?:[.-]?(?:post|rc|dev|a|b)\d*)*")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Treatment of one item by a consumer.

    Args:
        does: ``applied`` if it adds ``scale``·B·A; ``intended`` if it applies the item as stored;
            ``full`` if it takes a stored weight; ``dropped`` if it leaves the weight as it is.
        scale: s'; None without factors.
        why: The reason, in one sentence; empty for the usual case.
        unjudged: What may prevent it, which depends on a BASE that is not given; empty if nothing does.
    """

    does: Literal["applied", "intended", "full", "dropped"]
    scale: float | None = None
    why: str = ""
    unjudged: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """Behaviour of some versions of a consumer.

    Args:
        since: First version for which it holds; empty if it holds for all older versions, as far as known.
        until: First version for which it no longer holds; empty if it holds up to the newest version read.
        read: Versions whose source was read, the newest last.
        refuses: Returns the reason for not loading an adapter; empty if it is loaded.
        applies: Returns the treatment of an item of a loaded adapter.
        unjudged: Returns what is not known of an adapter without its BASE; empty if nothing.
    """

    since: str
    until: str
    read: tuple[str, ...]
    refuses: Callable[[Contents], str]
    applies: Callable[[Contents, Item], Outcome]
    unjudged: Callable[[Contents], str] = lambda contents: ""

    @property
    def versions(self) -> str:
        """The range, such as ``< 0.32``; of rules from the newest to the oldest, the first that holds applies."""
        return f"< {self.until}" if self.until else f"≥ {self.since}" if self.since else "all"


@dataclass(frozen=True, slots=True)
class Consumer:
    """A program that loads adapters.

    Args:
        name: Name for ``--consumers``.
        title: Name in tables and figures.
        forms: Layouts of files that it reads, such as ``peft`` or ``gguf``.
        rules: Its rules, the newest first.
        largest_rank: Largest rank that it can be set to serve; None if there is no limit.
        default_rank: Largest rank that it serves by default; None if there is no limit.
        rank_option: The option that sets the largest rank; empty without one.
        rank_choices: Values that this option accepts; empty if any.
    """

    name: str
    title: str
    forms: frozenset[str]
    rules: tuple[Rule, ...]
    largest_rank: int | None = None
    default_rank: int | None = None
    rank_option: str = ""
    rank_choices: tuple[int, ...] = field(default=())

    @property
    def newest(self) -> str:
        """The newest version that was read."""
        return self.rules[0].read[-1]

    def rule(self, version: str) -> Rule:
        """Return the rule for a version; for the newest if none is given.

        Raises:
            UsageError: It is not a version, or older than every rule.
        """
        if not version:
            return self.rules[0]
        if rule_read := next((rule for rule in self.rules if version in rule.read), None):
            return rule_read  # a commit is not a number
        if not _VERSION.fullmatch(version):
            raise UsageError(f"--consumers {self.name}=={version}: not a version; give one such as {self.newest}")
        for rule in self.rules:
            if not rule.since or not is_before(version, rule.since):
                return rule
        raise UsageError(
            f"--consumers {self.name}=={version}: no rule is known for it; the oldest is for {self.rules[-1].versions}"
        )

    def is_newer(self, version: str) -> bool:
        """Return whether a version is newer than all versions read; False for rules of commits, which have no order."""
        return bool(version) and bool(self.rules[0].since) and is_before(self.newest, version)

    def rank_needed(self, contents: Contents) -> int | None:
        """Return the rank that the consumer must be configured to serve; None if its default suffices."""
        rank = largest_rank(contents)
        if self.default_rank is None or rank <= self.default_rank:
            return None
        return next((choice for choice in self.rank_choices if choice >= rank), rank)


def is_before(first: str, second: str) -> bool:
    """Return whether a version is before another, part by part.

    >>> is_before("0.31.2", "0.32"), is_before("0.32", "0.32.0"), is_before("0.9", "0.10")
    (True, False, True)
    """
    parts = ([int(part) for part in _VERSION.fullmatch(text)[1].split(".")] for text in (first, second))  # type: ignore[index]
    for left, right in zip_longest(*parts, fillvalue=0):
        if left != right:
            return bool(left < right)
    return False


def largest_rank(contents: Contents) -> int:
    """Return the largest rank of an adapter, in its factors or in its config; 0 without any."""
    configured = [contents.config.get("r"), *(contents.config.get("rank_pattern") or {}).values()]
    stated = [int(value) for value in configured if isinstance(value, int | float)]
    return max([*stated, *(item.rank or 0 for item in contents.items)], default=0)


def one_scale(config: Mapping[str, Any]) -> float:
    """Return α/r or, with rsLoRA, α/√r, from the config's own α and r: the same for every module."""
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


def tied_refusal(form: str, contents: Contents) -> str:
    """Return why the program of a layout does not load an adapter of a BASE with a tied head; empty if it does."""
    return next((f"{reason} ({item.layer})" for item in contents.items if (reason := why_not_tied(form, item))), "")


def unjudged_tie(form: str, contents: Contents) -> str:
    """Return the problem that an adapter would have if its BASE, which is not given, had a tied head."""
    if contents.tied is not None or not (reason := tied_refusal(form, contents)):
        return ""
    return f"the adapter is refused if {reason}"


def join_reasons(*reasons: str) -> str:
    """Return the non-empty reasons as one sentence; empty if there are none."""
    return "; ".join(reason for reason in reasons if reason)
