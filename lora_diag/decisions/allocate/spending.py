"""Spend a budget on steps of decreasing yield, with a bound on the distance from the optimum.

max Σ_u G_u(r_u) subject to Σ_u cost_u·r_u ≤ B, G_u(r) = Σ_{i≤r} gain_{u,i} with decreasing gains. It uses gains, costs
and a budget; independent of layers, files and units.

Derivation. For every price λ ≥ 0, Σ_u G_u(r_u) ≤ λB + Σ_u max_r (G_u(r) − λ·cost_u·r) for all ranks within the budget
(weak duality). G_u is concave on the allowed ranks, so the inner maximum takes exactly the steps whose gain per cost
exceeds λ. The right side is least where those steps just fill the budget: with all steps sorted by gain per cost, at
the first one that does not fit. This is the greedy order, so one sort gives the greedy prefix and its bound. The rest
of the budget is filled with later steps that fit; if the table of all budgets is small, dynamic programming finds the
optimum.

Reference: Everett 1963, "Generalized Lagrange multiplier method"; Dantzig 1957 (the prefix); Bellman 1957 (the table).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Largest table of the exact method: about 1 s and 100 MB (2 cores in 2026; 40 M entries took 0.4 s).
MAX_TABLE, MAX_WORK = 4e7, 2e8


@dataclass(frozen=True)
class Steps:
    """All steps of all units, unit by unit, in order of rank.

    Args:
        gain: Gain of each step, ``(n,)``; decreasing in ``gain / cost`` within a unit.
        cost: Cost of each step, ``(n,)``, positive.
        unit: Index of its unit, ``(n,)``, ascending.
        rank: The unit's rank after it, ``(n,)``.
        start: The unit's rank before its first step, ``(units,)``.
    """

    gain: Floats
    cost: Ints
    unit: Ints
    rank: Ints
    start: Ints

    @property
    def first(self) -> Ints:
        """Index of each unit's first step; one past the end closes the last."""
        return np.searchsorted(self.unit, np.arange(len(self.start) + 1))


@dataclass(frozen=True)
class BudgetedRanks:
    """Ranks within a budget.

    Args:
        ranks: Ranks by unit, ``(units,)``.
        gain: Total gain of the steps.
        cost: Total cost of the steps.
        bound: Upper bound on the gain within the budget.
        price: Gain of one more unit of the budget, at the bound; 0 if the budget covers all steps.
        optimal: True if this is the optimum: found by the exact method, or because all steps were taken.
    """

    ranks: Ints
    gain: float
    cost: int
    bound: float
    price: float
    optimal: bool


def make_steps(curves: Sequence[Floats], costs: Sequence[int], starts: Sequence[int], allowed: Sequence[Ints]) -> Steps:
    """Return the steps from each unit's starting rank over its allowed ranks.

    Args:
        curves: By unit: G(0), …, G(cap), concave, ``(cap + 1,)``.
        costs: By unit: cost of one rank.
        starts: By unit: its minimum rank.
        allowed: By unit: allowed ranks above the minimum, ascending.
    """
    gain, cost, rank, sizes = [], [], [], []
    for curve, unit_cost, start, ranks in zip(curves, costs, starts, allowed, strict=True):
        stops = np.concatenate([[start], ranks]).astype(np.int64)
        gain.append(np.diff(curve[stops]))
        cost.append(np.diff(stops) * unit_cost)
        rank.append(stops[1:])
        sizes.append(len(ranks))
    return Steps(
        gain=np.concatenate([*gain, np.empty(0)]),
        cost=np.concatenate([*cost, np.empty(0, np.int64)]),
        unit=np.repeat(np.arange(len(sizes)), sizes),
        rank=np.concatenate([*rank, np.empty(0, np.int64)]),
        start=np.asarray(starts, np.int64),
    )


def spend(steps: Steps, budget: int, exact: bool = True) -> BudgetedRanks:
    """Choose steps within a budget.

    Args:
        steps: Available steps.
        budget: Budget for steps, from 0 up.
        exact: Whether to find the optimum if its table is small.

    Returns:
        A choice whose gain is at least that of the greedy prefix, and a bound on every choice.

    Example:
        >>> curves = [np.array([0.0, 4.0, 5.0]), np.array([0.0, 3.0])]
        >>> steps = make_steps(curves, [2, 1], [0, 0], [np.arange(1, 3), np.arange(1, 2)])
        >>> spent = spend(steps, 3)
        >>> spent.ranks.tolist(), spent.gain, spent.bound
        ([1, 1], 7.0, 7.0)
    """
    order = _order_by_yield(steps)
    total = np.cumsum(steps.cost[order])
    fitting = int(np.searchsorted(total, budget, side="right"))
    counts = np.bincount(steps.unit[order[:fitting]], minlength=len(steps.start)).astype(np.int64)
    if fitting == len(order):
        gain = math.fsum(steps.gain[order])
        return BudgetedRanks(
            _reached_ranks(steps, counts), gain, int(total[-1]) if fitting else 0, gain, 0.0, optimal=True
        )
    left = budget - int(total[fitting - 1] if fitting else 0)
    next_step = order[fitting]
    price = float(steps.gain[next_step] / steps.cost[next_step])
    bound = math.fsum(steps.gain[order[:fitting]]) + left * price
    _fill(steps, counts, left)
    choice = _find_best_steps(steps, counts, budget) if exact else counts
    chosen = _make_mask(steps, choice)
    gain = math.fsum(steps.gain[chosen])
    return BudgetedRanks(
        ranks=_reached_ranks(steps, choice),
        gain=gain,
        cost=int(steps.cost[chosen].sum()),
        bound=max(bound, gain),  # equal if the prefix fills the budget, up to rounding of sums
        price=price,
        optimal=exact and (_is_table_small(steps, budget) or left == 0),
    )


def _order_by_yield(steps: Steps) -> Ints:
    """Return the steps with a positive gain by decreasing gain per cost; the steps of one unit keep their order."""
    density = steps.gain / steps.cost
    for unit_first, unit_end in zip(steps.first[:-1], steps.first[1:], strict=True):
        # Rounding of sums must not reorder the steps of a unit.
        density[unit_first:unit_end] = np.minimum.accumulate(density[unit_first:unit_end])
    order = np.argsort(-density, kind="stable")
    return order[density[order] > 0]


def _fill(steps: Steps, counts: Ints, left: int) -> None:
    """Take the next step of the unit with the largest yield per cost while any fits."""
    first = steps.first
    while True:
        upcoming = first[:-1] + counts
        open_units = np.flatnonzero(upcoming < first[1:])
        steps_at = upcoming[open_units]
        fits = (steps.cost[steps_at] <= left) & (steps.gain[steps_at] > 0)
        if not fits.any():
            return
        steps_at, open_units = steps_at[fits], open_units[fits]
        best = int(np.argmax(steps.gain[steps_at] / steps.cost[steps_at]))
        counts[open_units[best]] += 1
        left -= int(steps.cost[steps_at[best]])


def _size_table(steps: Steps, budget: int) -> tuple[int, int]:
    """Return the unit in which costs are exact integers, and the budget in this unit."""
    coarse = int(np.gcd.reduce(steps.cost))
    return coarse, budget // coarse


def _is_table_small(steps: Steps, budget: int) -> bool:
    _, cells = _size_table(steps, budget)
    return (cells + 1) * len(steps.start) <= MAX_TABLE and (cells + 1) * len(steps.gain) <= MAX_WORK


def _find_best_steps(steps: Steps, counts: Ints, budget: int) -> Ints:
    """Return the optimal number of steps of each unit by dynamic programming; ``counts`` if the table is too large.

    best[b] after unit u = max over its number of steps k of best[b − cost(k)] before it + gain(k).
    """
    if not _is_table_small(steps, budget):
        return counts
    coarse, cells = _size_table(steps, budget)
    first = steps.first
    best = np.zeros(cells + 1)
    choice = np.zeros((len(steps.start), cells + 1), np.uint16)
    for unit in range(len(steps.start)):
        previous = best.copy()
        span = slice(first[unit], first[unit + 1])
        for k, (gain, cost) in enumerate(
            zip(np.cumsum(steps.gain[span]), np.cumsum(steps.cost[span]) // coarse, strict=True), 1
        ):
            if cost > cells:
                break
            candidate = previous[: cells + 1 - cost] + gain
            better = candidate > best[cost:]
            best[cost:][better] = candidate[better]
            choice[unit, cost:][better] = k
    exact = np.zeros_like(counts)
    cell = cells
    for unit in reversed(range(len(steps.start))):
        exact[unit] = choice[unit, cell]
        if exact[unit]:
            span = slice(first[unit], first[unit] + exact[unit])
            cell -= int(steps.cost[span].sum()) // coarse
    # Of equal choices, the greedy one: its ranks do not jump with a rounding error.
    gains = [math.fsum(steps.gain[_make_mask(steps, taken)]) for taken in (counts, exact)]
    return exact if gains[1] > gains[0] else counts


def _make_mask(steps: Steps, counts: Ints) -> NDArray[np.bool_]:
    """Return a mask of steps from the number of steps per unit."""
    position = np.arange(len(steps.unit)) - steps.first[steps.unit]
    return np.asarray(position < counts[steps.unit])


def _reached_ranks(steps: Steps, counts: Ints) -> Ints:
    """Return the rank of each unit after a number of its steps."""
    ranks = steps.start.copy()
    moved = np.flatnonzero(counts)
    ranks[moved] = steps.rank[steps.first[moved] + counts[moved] - 1]
    return ranks
