"""Spectrum records → curves over the rank: of one layer, of a block's experts, of all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.rendering.figures.groups import by_depth

# Common ranks of adapters, marked in every panel.
MARKED = (8, 16, 64)

# Points per curve: more are not visible on a log axis, and keep an SVG of a large model small.
POINTS = 56


@dataclass(frozen=True, slots=True)
class Quantity:
    """A quantity over the rank.

    Args:
        values: Returns a layer's values at ranks 1, 2, …, ``(K,)``.
        beyond: Value beyond the last rank of a complete spectrum.
    """

    values: Callable[[Spectrum], NDArray[np.float64]]
    beyond: float

    def at(self, record: Spectrum, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return a layer's values at given ranks; NaN if they were not computed."""
        values = self.values(record)
        inside = values[np.minimum(ranks, len(values)) - 1]
        return np.where(ranks <= len(values), inside, self.beyond if record.complete else np.nan)


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: of one layer, or the pointwise median of a block's layers of one type (experts).

    Args:
        layer: Name of the layer, or of the first of several.
        depth: Index of the block; None outside the blocks.
        ranks: Ranks r.
        values: Values at these ranks.
        signal: Largest r that the files resolve.
        layers: Number of layers it represents.
    """

    layer: str
    depth: int | None
    ranks: NDArray[np.int64]
    values: NDArray[np.float64]
    signal: int
    layers: int


def ranks_drawn(largest: int, marked: Sequence[int] = MARKED) -> NDArray[np.int64]:
    """Return log-spaced ranks from 1 to ``largest``, including the marked ones.

    >>> ranks_drawn(6).tolist(), len(ranks_drawn(4096)) < 64
    ([1, 2, 3, 4, 5, 6], True)
    """
    spaced = np.geomspace(1, largest, POINTS).round().astype(np.int64)
    return np.union1d(spaced, [rank for rank in marked if rank <= largest]).astype(np.int64)


def curves(records: Sequence[Spectrum], quantity: Quantity, grid: NDArray[np.int64]) -> list[Curve]:
    """Return one curve per block: of its one layer, or the median of its layers; zero updates have none."""
    changed = [record for record in records if record.fro > 0]
    return [_make_curve(depth, group, quantity, grid) for depth, group in by_depth(changed).items()]


def _make_curve(depth: int | None, group: Sequence[Spectrum], quantity: Quantity, grid: NDArray[np.int64]) -> Curve:
    last = max(len(record.s) for record in group)
    ranks = np.union1d(grid[grid < last], [last]).astype(np.int64)
    stacked = np.array([quantity.at(record, ranks) for record in group])
    middle = np.median(stacked, axis=0)
    known = np.isfinite(middle)
    signal = sorted(resolved_to(record) for record in group)[len(group) // 2]
    return Curve(group[0].layer, depth, ranks[known], middle[known], signal, len(group))


def resolved_to(record: Spectrum) -> int:
    """Return the largest r that the files resolve; 0 if the update as a whole is not resolved."""
    signal = record.resolution.signal_rank
    if record.resolution.verdict == "unresolved":
        return 0
    return len(record.s) if signal is None else signal


@dataclass(frozen=True, slots=True)
class Band:
    """Median and range over the layers of a type."""

    ranks: NDArray[np.int64]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def band(records: Sequence[Spectrum], quantity: Quantity, grid: NDArray[np.int64]) -> Band | None:
    """Return pointwise median, minimum and maximum at ranks that all layers have; None for zero updates only."""
    changed = [record for record in records if record.fro > 0]
    if not changed:
        return None
    last = max(len(record.s) for record in changed)
    ranks = np.union1d(grid[grid < last], [last]).astype(np.int64)
    stacked = np.array([quantity.at(record, ranks) for record in changed])
    known = np.isfinite(stacked).all(axis=0)
    stacked = stacked[:, known]
    return Band(ranks[known], np.median(stacked, axis=0), stacked.min(axis=0), stacked.max(axis=0))


def largest_rank(records: Iterable[Spectrum]) -> int:
    """Return the largest number of kept singular values of an update."""
    return max((len(record.s) for record in records if record.fro > 0), default=1)


def has_floor(records: Iterable[Spectrum]) -> bool:
    """Return whether any layer has values that the files do not resolve."""
    return any(record.fro > 0 and resolved_to(record) < len(record.s) for record in records)
