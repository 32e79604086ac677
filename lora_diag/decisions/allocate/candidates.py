"""Candidate layers for adapters, groups with a common rank, and the largest rank of each.

Uses records of ``spectrum`` and constraints; independent of budgets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lora_diag.decisions.allocate.record import CappedBy
from lora_diag.decisions.targets import why_no_target
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import UsageError
from lora_diag.metrics import energy_curve
from lora_diag.records import LeftOut

_STACKED = re.compile(r"(.+)\[\d+\]")


@dataclass(frozen=True)
class Constraints:
    """Constraints of every allocation.

    Args:
        min_rank: Smallest rank of a layer that has any signal.
        max_rank: Largest rank of a layer.
        ranks_from: Allowed ranks besides 0; None for any.
    """

    min_rank: int = 0
    max_rank: int | None = None
    ranks_from: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check that the constraints can be met.

        Raises:
            UsageError: They are invalid or contradict each other.
        """
        if self.min_rank < 0:
            raise UsageError(f"--min-rank {self.min_rank}: must be 0 or more")
        if self.max_rank is not None and self.max_rank < 1:
            raise UsageError(f"--max-rank {self.max_rank}: must be 1 or more")
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise UsageError(f"--min-rank {self.min_rank} is above --max-rank {self.max_rank}")
        if self.ranks_from is not None:
            if not self.ranks_from or min(self.ranks_from) < 1:
                raise UsageError("--allowed-ranks: ranks must be 1 or more, such as 8,16,32,64")
            if not any(self.min_rank <= rank <= (self.max_rank or rank) for rank in self.ranks_from):
                raise UsageError("--allowed-ranks: none of its ranks lies between --min-rank and --max-rank")


@dataclass(frozen=True)
class Unit:
    """Layers with a common rank: one layer, or a stack of experts with one factor pair.

    Args:
        members: Their spectra.
        group: The stack's name; None for a layer on its own.
        weights: Factor of each member's energy.
        start: Its minimum rank.
        allowed: Allowed ranks above ``start``, ascending.
        capped_by: Reason for the largest of them.
        losses: F(0), F(1), … of each member: measured cost of discarding everything beyond a rank; None to use energy.
    """

    members: tuple[Spectrum, ...]
    group: str | None
    weights: tuple[float, ...]
    start: int
    allowed: NDArray[np.int64]
    capped_by: CappedBy
    losses: tuple[NDArray[np.float64], ...] | None = None

    @property
    def cost(self) -> int:
        """Parameters per rank: Σ (out + in)."""
        return sum(sum(member.shape) for member in self.members)

    @property
    def cap(self) -> int:
        """The largest rank it may have."""
        return int(self.allowed[-1]) if len(self.allowed) else self.start

    @property
    def energy(self) -> float:
        """Its weighted energy Σ w‖ΔW‖_F², or ΣF(0)."""
        if self.losses is not None:
            return float(sum(loss[0] for loss in self.losses))
        return sum(weight * member.fro**2 for weight, member in zip(self.weights, self.members, strict=True))

    @property
    def corners(self) -> NDArray[np.int64]:
        """The allowed ranks at the corners of the concave envelope of ``curve``, where the gain per rank decreases.

        Between two corners no rank is better than a mixture of both, and beyond the last there is no gain.
        """
        stops = np.concatenate([[self.start], self.allowed]).astype(np.int64)
        values = self.curve[stops]

        def slope(first: int, last: int) -> float:
            return float((values[last] - values[first]) / (stops[last] - stops[first]))

        kept = [0]
        for index in range(1, len(stops)):
            while len(kept) > 1 and slope(kept[-2], kept[-1]) <= slope(kept[-1], index):
                kept.pop()
            kept.append(index)
        best = int(np.argmax(values[kept]))
        return stops[kept[1 : best + 1]]

    @cached_property
    def curves(self) -> tuple[NDArray[np.float64], ...]:
        """Each member's C(0), …, C(K), ``(K + 1,)``; zeros for a zero update."""
        return tuple(np.concatenate([[0.0], _compute_curve(member)]) for member in self.members)

    @cached_property
    def curve(self) -> NDArray[np.float64]:
        """The weighted energy kept at ranks 0, …, cap: Σ_members w‖ΔW‖_F²·C(r); constant beyond the measured values.

        With losses ΣF(0) − F(r), which may decrease with rank.
        """
        total = np.zeros(self.cap + 1)
        for loss in self.losses or ():
            total += loss[0] - loss[np.minimum(np.arange(self.cap + 1), len(loss) - 1)]
        if self.losses is not None:
            return total
        for weight, member, curve in zip(self.weights, self.members, self.curves, strict=True):
            total += weight * member.fro**2 * curve[np.minimum(np.arange(self.cap + 1), len(curve) - 1)]
        return total


def _compute_curve(record: Spectrum) -> NDArray[np.float64]:
    values = np.asarray(record.s)
    return energy_curve(values, record.fro, record.complete) if record.fro > 0 else np.zeros(len(values))


def split(
    records: Sequence[Spectrum], target: re.Pattern[str] | None, exclude: re.Pattern[str] | None
) -> tuple[list[Spectrum], list[LeftOut]]:
    """Split layers into candidates and skipped ones, with the reason.

    Without ``target``, candidates are the matrices that adapters usually target: no embeddings, no head, no routers.
    With it, all layers whose name contains a match.

    Raises:
        UsageError: There is no candidate.
    """
    candidates, left_out = [], []
    for record in records:
        if why := why_no_target(record.layer, target, exclude):
            left_out.append(_make_left_out(record, why))
        else:
            candidates.append(record)
    if not candidates:
        requested = f"--layers {target.pattern}: matches" if target is not None else "the results hold"
        raise UsageError(f"{requested} no layer that could get an adapter; select layers with --layers")
    return candidates, left_out


def _make_left_out(record: Spectrum, reason: str) -> LeftOut:
    return LeftOut(
        layer=record.layer,
        shape=record.shape,
        reason="not_selected",
        detail=reason,
        fro=record.fro,
        base_fro=record.base_fro,
    )


def units(
    records: Sequence[Spectrum],
    weights: Mapping[str, float],
    constraints: Constraints,
    losses: Mapping[str, Sequence[float]] | None = None,
) -> list[Unit]:
    """Return the units of an allocation, in the order of their first layers."""
    groups: dict[str, list[Spectrum]] = {}
    for record in records:
        stacked = _STACKED.fullmatch(record.layer)
        groups.setdefault(stacked[1] if stacked else record.layer, []).append(record)
    grouped = [_make_unit(tuple(members), name, weights, constraints) for name, members in groups.items()]
    if losses is None:
        return grouped
    known = {layer: np.asarray(values, np.float64) for layer, values in losses.items()}
    return [replace(unit, losses=tuple(known.get(m.layer, np.zeros(1)) for m in unit.members)) for unit in grouped]


def _make_unit(
    members: tuple[Spectrum, ...], name: str, weights: Mapping[str, float], constraints: Constraints
) -> Unit:
    soft, reason = max((_cap_rank(member, constraints.max_rank) for member in members), key=lambda cap: cap[0])
    largest = break_even(members[0].shape)
    hard = min(constraints.max_rank or largest, largest)
    if soft:
        raised = max(soft, min(constraints.min_rank, hard))
        soft, reason = raised, reason if raised == soft else "break_even" if raised == largest else reason
    start, allowed = _allowed_ranks(soft, hard, constraints)
    last = int(allowed[-1]) if len(allowed) else start
    return Unit(
        members=members,
        group=None if members[0].layer == name else name,
        weights=tuple(weights[member.layer] for member in members),
        start=start,
        allowed=allowed,
        capped_by=reason if last == soft else "ranks_from",
    )


def break_even(shape: tuple[int, int]) -> int:
    """Return the largest rank whose factors have no more parameters than the matrix: r(out + in) ≤ out·in.

    >>> break_even((77, 384)), break_even((128, 128)), break_even((1, 64))
    (64, 64, 0)
    """
    return math.prod(shape) // sum(shape)


def _cap_rank(record: Spectrum, max_rank: int | None) -> tuple[int, CappedBy]:
    """Return the largest rank with a measured gain, and the reason for this limit."""
    caps: list[tuple[int, CappedBy]] = [(break_even(record.shape), "break_even")]
    if record.complete:
        caps.append((sum(value > 0 for value in record.s), "update_rank"))
    if record.resolution.signal_rank is not None:
        caps.append((record.resolution.signal_rank, "signal_rank"))
    if not record.complete:
        caps.append((len(record.s), "values_kept"))
    if max_rank is not None:
        caps.append((max_rank, "max_rank"))
    return min(caps, key=lambda cap: cap[0])


def _allowed_ranks(soft: int, hard: int, constraints: Constraints) -> tuple[int, NDArray[np.int64]]:
    """Return the minimum rank of a unit, and the allowed ranks above it.

    In a list of ranks, the last is the first that reaches ``soft``: a signal of rank 5 may get 8 of 8, 16, 32.
    """
    minimum = min(constraints.min_rank, soft)
    if constraints.ranks_from is None:
        return minimum, np.arange(minimum + 1, soft + 1)
    possible = [rank for rank in sorted(set(constraints.ranks_from)) if rank <= hard]
    first = next((i for i, rank in enumerate(possible) if rank >= soft), len(possible) - 1)
    possible = possible[: first + 1] if soft else []
    start = next((rank for rank in possible if rank >= minimum), possible[-1]) if possible and minimum else 0
    return start, np.asarray([rank for rank in possible if rank > start], np.int64)
