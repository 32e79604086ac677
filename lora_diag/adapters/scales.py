"""Scales of updates: from a PEFT config, or from a number in the file with the factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from lora_diag.adapters.patterns import Pattern, read_pattern
from lora_diag.adapters.source import Config, Source
from lora_diag.adapters.updates import read
from lora_diag.checkpoints import Checkpoint
from lora_diag.errors import InputError


@dataclass(frozen=True, slots=True)
class Scale:
    """s = ``factor``, or ``factor``·α with α read from the file.

    Args:
        factor: The number.
        alpha: Name of a 0-d tensor; empty if there is only the factor. kohya's rule: α missing or 0 means α = r.
        rank: The r by which α is divided.
    """

    factor: float = 1.0
    alpha: str = ""
    rank: int = 1

    @property
    def known(self) -> float | None:
        """Return s if headers determine it; None if it is stored in the file."""
        return None if self.alpha else self.factor


def scale_in(source: Source, alpha: str, rank: int) -> Scale:
    """Return the scale of factors: from an α in the file, given the name of its tensor, else the known one."""
    return Scale(1.0, alpha, rank) if alpha else Scale(source.scale_without_alpha(rank), "", rank)


def scale_of(checkpoint: Checkpoint, scale: Scale) -> float:
    """Return s, reading α if it is stored in the file."""
    if not scale.alpha:
        return scale.factor
    read_alpha = checkpoint.read_array if checkpoint.decodes(scale.alpha) else partial(read, checkpoint)
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
    def of(config: Config, modules: list[str]) -> Scaling:
        """Read the scaling from a config.

        Raises:
            InputError: A pattern is invalid.
        """
        return Scaling(
            config, read_pattern(config, "rank_pattern", modules), read_pattern(config, "alpha_pattern", modules)
        )

    def rank(self, module: str) -> int:
        """Return r of a module."""
        return rank_of(self.config, self.ranks, module)

    def alpha(self, module: str, key: str = "lora_alpha") -> float:
        """Return α of a module."""
        matched = self.alphas.matches(module)
        return matched[0][1] if matched else self.config.number(key)

    def of_module(self, module: str) -> float:
        """Return s of a module."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.config.flag("use_rslora") else rank)

    def words(self, alpha: str = "lora_alpha") -> str:
        """Return the definition of s and its source as text."""
        return f"{alpha} / {'√r (use_rslora)' if self.config.flag('use_rslora') else 'r'}, from {self.config.path.name}"

    def notes(self, modules: list[str]) -> list[str]:
        """Return notes on doubtful patterns."""
        return self.ranks.notes(modules) + self.alphas.notes(modules)


def rank_of(config: Config, ranks: Pattern, module: str) -> int:
    """Return r of a module, given ``rank_pattern``.

    Raises:
        InputError: It is not a whole number from 1 up.
    """
    matched = ranks.matches(module)
    if not matched:
        return config.integer("r")
    key, value = matched[0]
    if value < 1 or value != int(value):
        raise InputError(
            f"{config.path}: rank_pattern[{key!r}] must be a whole number from 1 up, not {value:g}; correct it"
        )
    return int(value)


def scaling_words(config: Config, alpha: str = "lora_alpha") -> str:
    """Return r and α as text, with a remark if patterns change them."""
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if config.values.get(key)]
    words = f"r={config.values.get('r')}, alpha={config.values.get(alpha)}"
    return f"{words} (and {', '.join(patterns)})" if patterns else words
