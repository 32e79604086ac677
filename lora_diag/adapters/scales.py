"""A scaling that is known from headers, or lies as a number in the file beside the factors."""

from __future__ import annotations

from dataclasses import dataclass

from lora_diag.adapters.updates import read
from lora_diag.checkpoints import Checkpoint


@dataclass(frozen=True, slots=True)
class Scale:
    """s = ``factor``, or ``factor``·α with α read from the file.

    Args:
        factor: The number.
        alpha: Name of a 0-d tensor; empty if the factor is all. kohya's rule: a missing α, or one of 0, means α = r.
        rank: The r by which α is divided.
    """

    factor: float = 1.0
    alpha: str = ""
    rank: int = 1

    @property
    def known(self) -> float | None:
        """Return s if headers tell it; None if it lies in the file."""
        return None if self.alpha else self.factor


def scale_of(checkpoint: Checkpoint, scale: Scale) -> float:
    """Return s, reading α if it lies in the file."""
    if not scale.alpha:
        return scale.factor
    alpha = float(read(checkpoint, scale.alpha).reshape(-1)[0])
    return scale.factor * (alpha / scale.rank if alpha else 1.0)
