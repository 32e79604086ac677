"""Other rules for the same budget: one rank for all, the article's prior, one energy fraction for all.

Each rule orders the steps by a key and takes them in that order, steps with equal keys together, while the budget
lasts. Constraints and caps are those of the allocation, so that only the rules differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_diag.decisions.allocate.candidates import Unit
from lora_diag.decisions.allocate.spending import Floats, Ints, Steps

# Index of the heuristic prior among the rules.
PRIOR = 1


@dataclass(frozen=True)
class Rule:
    """The result of a rule for a budget.

    Args:
        name: Such as ``uniform r=8``.
        ranks: Ranks by unit.
        cost: Cost of the steps above the starting ranks.
    """

    name: str
    ranks: Ints
    cost: int


def rules(units: Sequence[Unit], steps: Steps, budget: int, scores: Floats) -> list[Rule]:
    """Return the results of uniform rank, the prior and an energy threshold for a budget.

    Args:
        units: The units of the allocation.
        steps: Their steps.
        budget: Budget for steps.
        scores: Sensitivity s_u of each unit, for the prior r ∝ s·√(d_in + d_out).

    Reference: The article, "Rank Selection Strategy", step 2 (the prior).
    """
    level, uniform = _take(steps, steps.rank.astype(np.float64), budget)
    slope = scores * np.sqrt([sum(unit.members[0].shape) for unit in units])
    with np.errstate(divide="ignore"):
        _, prior = _take(steps, steps.rank / slope[steps.unit], budget)
    threshold, energy = _take(steps, _share_before(units, steps), budget)
    return [
        Rule(f"uniform r={level:.0f}", *uniform),
        Rule("heuristic prior s·√(d_in+d_out)", *prior),
        Rule(f"same energy share, {threshold:.2f}", *energy),
    ]


def energy_ranks(units: Sequence[Unit], steps: Steps, share: float) -> Ints:
    """Return the smallest allowed rank of each unit that keeps ``share`` of its energy, else its cap."""
    selected = _share_before(units, steps) < share
    ranks = steps.start.copy()
    np.maximum.at(ranks, steps.unit[selected], steps.rank[selected])
    return ranks


def _share_before(units: Sequence[Unit], steps: Steps) -> Floats:
    """Return for each step the fraction of its unit's energy kept without it.

    An error of 1e-9 in the sum of 9-digit values must not increase the rank by one: 0.9 is reached by 0.8999999995.
    """
    share = np.empty(len(steps.gain))
    for unit, first, end in zip(units, steps.first[:-1], steps.first[1:], strict=True):
        stops = np.concatenate([[unit.start], unit.allowed[:-1]]).astype(np.int64)[: end - first]
        share[first:end] = unit.curve[stops] / unit.energy if unit.energy > 0 else 1.0
    return share + 1e-9


def _take(steps: Steps, key: Floats, budget: int) -> tuple[float, tuple[Ints, int]]:
    """Take steps by ascending key, steps with equal keys together, while the budget lasts.

    Returns:
        The last key whose steps were all taken (0 if none), and the ranks with their cost.
    """
    # Steps of a unit stay in order despite rounding of their keys.
    key = key.copy()
    for first, end in zip(steps.first[:-1], steps.first[1:], strict=True):
        key[first:end] = np.maximum.accumulate(key[first:end])
    order = np.argsort(key, kind="stable")
    total = np.cumsum(steps.cost[order])
    fitting = int(np.searchsorted(total, budget, side="right"))
    if fitting < len(order):
        fitting = int(np.searchsorted(key[order], key[order[fitting]], side="left"))
    ranks = steps.start.copy()
    chosen = order[:fitting]
    np.maximum.at(ranks, steps.unit[chosen], steps.rank[chosen])
    return float(key[chosen[-1]]) if fitting else 0.0, (ranks, int(total[fitting - 1]) if fitting else 0)
