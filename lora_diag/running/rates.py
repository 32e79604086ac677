"""Choice of the best learning rate of a grid and extension of the grid at its edge, shared by all probes that train."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

# Upper limit of learning rates.
MAX_FACTOR = 10.0
# Largest step beyond an edge: from 1e-3 and 1e-2 the next rate is 3.3e-2, a common grid step.
STEP = 10 / 3


def find_best_rates(runs: Iterable[tuple[Key, float | None, float | None]]) -> dict[Key, float]:
    """Return the learning rate with the lowest loss for each trained item; omit items that always diverged.

    Args:
        runs: Item, loss and learning rate of each run; of one seed, on the deciding evaluation set.

    >>> find_best_rates([("r=4", 2.0, 1e-3), ("r=4", 1.5, 1e-2), ("r=8", None, 1e-2)])
    {'r=4': 0.01}
    """
    best: dict[Key, tuple[float, float]] = {}
    for key, loss, lr in runs:
        if loss is not None and lr is not None:
            best[key] = min(best.get(key, (math.inf, 0.0)), (loss, lr))
    return {key: lr for key, (_, lr) in best.items()}


def edge(tried: Collection[float], best: float) -> int:
    """Return −1 or 1 if the best rate is the lowest or highest of several, where a better one may be beyond; else 0.

    >>> edge([1e-3, 1e-2], 1e-2), edge([1e-3, 3e-3, 1e-2], 3e-3), edge([1e-2], 1e-2)
    (1, 0, 0)
    """
    if len(set(tried)) < 2:
        return 0
    return -1 if best == min(tried) else int(best == max(tried))


def next_rate(tried: Collection[float], best: float) -> float | None:
    """Return the rate to try next if the best is at the edge: one more grid step, by a factor of at most 10/3.

    None if the best rate is inside the grid, if there is only one rate, or if the limit is reached.

    >>> next_rate([1e-3, 2e-3, 4e-3], 4e-3), next_rate([1e-3, 1e-2], 1e-3), next_rate([1e-3, 3e-3, 1e-2], 3e-3)
    (0.008, 0.0003, None)
    """
    side = edge(tried, best)
    if side == 0:
        return None
    inner = sorted(tried)[1 if side < 0 else -2]
    further = float(f"{best * min(max(best, inner) / min(best, inner), STEP) ** side:.2g}")
    return (
        further if 0 < further < MAX_FACTOR and (further - best) * side > 0 else None
    )  # rounded to two digits, a rate may no longer exceed the edge
