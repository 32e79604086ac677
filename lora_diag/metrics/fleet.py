"""Outliers and near-duplicates in a fleet of adapters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

# |cosine| from which two updates are the same, and nearly the same; overlap from which two column spaces are the same.
MIN_SAME_COSINE, MIN_NEAR_COSINE, MIN_SPACE_OVERLAP = 0.999, 0.95, 0.9

# An adapter is over-ranked if 99% of its energy needs at most this fraction of its rank; and spiked if one direction
# holds at least this fraction.
OVER_RANKED_BELOW, SPIKED_FROM = 0.5, 0.9

# A norm is an outlier if it differs from the median of the logarithms by this many robust standard deviations, and by a
# factor of two.
DEVIATIONS, FACTOR = 3.5, 2.0
_TO_SIGMA = 1.4826

OutlierKind = Literal["dead", "over-ranked", "spiked", "norm"]


class Adapter(Protocol):
    """Properties of an adapter needed to detect outliers, as in the record ``Fleet``."""

    @property
    def dead(self) -> int:
        """Number of zero updates."""
        ...

    @property
    def rank(self) -> int | None:
        """The largest rank of its factors."""
        ...

    @property
    def fro(self) -> float:
        """Its norm."""
        ...

    @property
    def used(self) -> float | None:
        """Fraction of its rank that 99% of the energy needs."""
        ...

    @property
    def spike(self) -> float | None:
        """Fraction of the energy in the largest directions."""
        ...


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Two near-duplicate adapters.

    Args:
        first: Index of the first adapter.
        second: Index of the second adapter.
        cosine: Estimated cosine of their updates.
        overlap: Estimated overlap of their column spaces.
        relation: ``same``, ``near`` (nearly the same) or ``space`` (another update in the same column spaces).
    """

    first: int
    second: int
    cosine: float
    overlap: float
    relation: str


def find_near_duplicates(updates: Sequence[Sequence[float]], spaces: Sequence[Sequence[float]]) -> list[NearDuplicate]:
    """Return the pairs of near-duplicates, the most similar first.

    Args:
        updates: Sketches of the updates.
        spaces: Sketches of the column spaces.

    Example:
        >>> pairs = find_near_duplicates([[1, 0], [2, 0], [0, 1]], [[1, 0], [1, 0], [0, 1]])
        >>> [(pair.first, pair.second, pair.relation) for pair in pairs]
        [(0, 1, 'same')]
    """
    if len(updates) < 2:
        return []
    cosines, overlaps = (_compute_cosines(np.asarray(rows, dtype=np.float64)) for rows in (updates, spaces))
    similar = (np.abs(cosines) >= MIN_NEAR_COSINE) | (overlaps >= MIN_SPACE_OVERLAP)
    pairs = []
    for i, j in zip(*np.nonzero(np.triu(similar, 1)), strict=True):
        cosine = float(cosines[i, j])
        relation = "same" if abs(cosine) >= MIN_SAME_COSINE else "near" if abs(cosine) >= MIN_NEAR_COSINE else "space"
        pairs.append(NearDuplicate(int(i), int(j), cosine, float(overlaps[i, j]), relation))
    return sorted(pairs, key=lambda pair: (-abs(pair.cosine), pair.first, pair.second))


def _compute_cosines(
    rows: np.ndarray[tuple[int, int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    norms = np.linalg.norm(rows, axis=1)
    unit = rows / np.where(norms > 0, norms, 1.0)[:, None]
    return np.clip(unit @ unit.T, -1.0, 1.0)


def find_norm_outliers(norms: Sequence[float]) -> list[float | None]:
    """Return the ratio to the median of each outlying norm, else None; zeros are ignored, and three norms are needed.

    Example:
        >>> find_norm_outliers([1.0, 1.1, 0.9, 1.0, 30.0, 0.0])
        [None, None, None, None, 30.0, None]
    """
    logs = [math.log(norm) for norm in norms if norm > 0]
    if len(logs) < 3:
        return [None] * len(norms)
    middle = float(np.median(logs))
    spread = _TO_SIGMA * float(np.median(np.abs(np.array(logs) - middle)))
    limit = max(DEVIATIONS * spread, math.log(FACTOR))
    return [
        round(math.exp(math.log(norm) - middle), 6) if norm > 0 and abs(math.log(norm) - middle) > limit else None
        for norm in norms
    ]


def find_outlier_kinds(adapters: Sequence[Adapter]) -> list[tuple[OutlierKind, ...]]:
    """Return the properties by which each adapter is an outlier."""
    ratios = find_norm_outliers([adapter.fro for adapter in adapters])
    kinds_by_adapter = []
    for adapter, ratio in zip(adapters, ratios, strict=True):
        kinds: dict[OutlierKind, bool] = {
            "dead": adapter.dead > 0,
            "over-ranked": adapter.used is not None and adapter.fro > 0 and adapter.used <= OVER_RANKED_BELOW,
            "spiked": adapter.spike is not None and adapter.spike >= SPIKED_FROM and adapter.rank != 1,
            "norm": ratio is not None,
        }
        kinds_by_adapter.append(tuple(kind for kind, holds in kinds.items() if holds))
    return kinds_by_adapter


def order_by_rarity(kinds_of: Sequence[tuple[OutlierKind, ...]]) -> list[int]:
    """Return the indices of outliers, those with the rarest properties first.

    Example:
        >>> order_by_rarity([("spiked",), (), ("spiked", "over-ranked"), ("spiked",), ("dead",)])
        [2, 4, 0, 3]
    """
    counts = Counter(kind for kinds in kinds_of for kind in kinds)
    outliers = [i for i, kinds in enumerate(kinds_of) if kinds]
    return sorted(outliers, key=lambda i: (min(counts[kind] for kind in kinds_of[i]), -len(kinds_of[i]), i))
