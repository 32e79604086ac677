"""Which learning rate of a grid was the best: the one rule of all probes that train."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import TypeVar

What = TypeVar("What", bound=Hashable)


def lowest(runs: Iterable[tuple[What, float | None, float | None]]) -> dict[What, float]:
    """Return for everything that was trained the learning rate of its lowest loss; nothing for what always diverged.

    Args:
        runs: What was trained, the loss, and the learning rate; of one seed, on the set that decides.

    >>> lowest([("r=4", 2.0, 1e-3), ("r=4", 1.5, 1e-2), ("r=8", None, 1e-2)])
    {'r=4': 0.01}
    """
    found: dict[What, tuple[float, float]] = {}
    for what, loss, lr in runs:
        if loss is not None and lr is not None:
            found[what] = min(found.get(what, (math.inf, 0.0)), (loss, lr))
    return {what: lr for what, (_, lr) in found.items()}
