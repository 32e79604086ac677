"""Which learning rate of a grid was the best, and which to try beyond its edge: one rule for all probes that train."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable
from typing import TypeVar

What = TypeVar("What", bound=Hashable)

# Learning rates are smaller than this.
MOST = 10.0
# Beyond an edge no step is longer: from 1e-3 and 1e-2 it goes on with 3.3e-2, as grids usually do.
STEP = 10 / 3


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


def edge(tried: Collection[float], best: float) -> int:
    """Return −1 or 1 where the best rate is the lowest or the highest of several, so that a better one may lie beyond.

    >>> edge([1e-3, 1e-2], 1e-2), edge([1e-3, 3e-3, 1e-2], 3e-3), edge([1e-2], 1e-2)
    (1, 0, 0)
    """
    if len(set(tried)) < 2:
        return 0
    return -1 if best == min(tried) else int(best == max(tried))


def beyond(tried: Collection[float], best: float) -> float | None:
    """Return the rate to try next where the best is at the edge: a step of the grid further, 10/3 times at most.

    None where the best lies inside, where one rate alone was asked for, and where there is no room.

    >>> beyond([1e-3, 2e-3, 4e-3], 4e-3), beyond([1e-3, 1e-2], 1e-3), beyond([1e-3, 3e-3, 1e-2], 3e-3)
    (0.008, 0.0003, None)
    """
    side = edge(tried, best)
    if side == 0:
        return None
    inner = sorted(tried)[1 if side < 0 else -2]
    further = float(f"{best * min(max(best, inner) / min(best, inner), STEP) ** side:.2g}")
    return further if 0 < further < MOST and (further - best) * side > 0 else None  # two digits may not be beyond
