"""Cost of a search, and its reduction to a time limit: stages, successive halving, omissions.

Uses times and counts only; trains nothing.

Reference: Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization"
(successive halving), here over training steps: many learning rates get few steps, the best of them all steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from lora_diag.errors import UsageError

# The short round of halving trains for this fraction of the steps, at the smallest and the largest rank.
SHORT_ROUND_DIVISOR = 4
# Learning rates that continue after it.
KEPT_RATES = 2
# Minimum number of steps of a reduced search; with fewer, ranks cannot be compared.
MIN_STEPS = 10
# Most runs of stability and escalation, in addition to the seeds of confirmed ones.
TRIALS = 6
# Factor for opening models, writing files and a busy machine.
MARGIN = 1.1


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, measured from one step.

    Args:
        step: Seconds of one step of LoRA at the largest rank.
        evaluation: Seconds of the evaluation on all sets.
        full_step: Seconds of one step of full fine-tuning; 0 without it.
        slots: Concurrent runs.
    """

    step: float
    evaluation: float
    full_step: float = 0.0
    slots: int = 1

    def seconds(self, runs: int, step_seconds: float, rounds: int) -> float:
        """Return an upper bound on the duration of runs in rounds, each of which waits for the one before.

        Σ⌈nᵢ/s⌉ ≤ ⌈Σnᵢ/s⌉ + rounds − 1 for rounds of nᵢ runs on s slots.

        Args:
            runs: Number of runs of all rounds.
            step_seconds: Seconds of one run.
            rounds: Number of them.

        Example:
            >>> Costs(1.0, 0.0).seconds(6, 2.0, 3), Costs(1.0, 0.0, slots=4).seconds(6, 2.0, 3)
            (12.0, 8.0)
        """
        return step_seconds * min(runs, math.ceil(runs / self.slots) + rounds - 1)


@dataclass(frozen=True, slots=True)
class Search:
    """The runs of a search.

    Args:
        ranks: Shared ranks, ascending.
        rates: Learning rates.
        steps: Updates of a run.
        repeats: Seeds.
        widen: Rates beyond the grid, at each rank.
        halving: Whether a short round chooses ``KEPT_RATES`` of the rates.
        full: Whether full fine-tuning is trained as a baseline.
        more_seeds: Whether seeds are added, up to twice as many, where they would decide which rank is enough.
        finer: Whether a rank between the chosen and the next lower one is tried.
        redistribute: Whether non-uniform ranks are trained against uniform ones.
        trials: Runs of stability and escalation at most.
    """

    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    steps: int
    repeats: int
    widen: int = 1
    halving: bool = False
    full: bool = True
    more_seeds: bool = True
    finer: bool = True
    redistribute: bool = True
    trials: int = TRIALS

    @property
    def rates_each(self) -> int:
        """Rates that a rank is trained at with all steps, at most."""
        grid = min(KEPT_RATES, len(self.rates)) if self.halving else len(self.rates)
        return grid + (self.widen if grid > 1 else 0)


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of a search.

    Args:
        name: Its name in decisions.
        runs: At most.
        seconds: Estimated.
        decides: Its result.
    """

    name: str
    runs: int
    seconds: float
    decides: str


def short_steps(steps: int) -> int:
    """Return the steps of the short round, and of the batches whose gradients are taken."""
    return max(1, steps // SHORT_ROUND_DIVISOR)


def ranks_within(largest: int) -> tuple[int, ...]:
    """Return up to four ranks to start from: the largest power of two within the budget, and fourths of it.

    >>> ranks_within(19), ranks_within(3), ranks_within(1)
    ((1, 4, 16), (1, 2), (1,))
    >>> ranks_within(300)
    (4, 16, 64, 256)
    """
    top = 1 << (largest.bit_length() - 1)
    step = 2 if top >= 4 else 1
    return tuple(sorted(top >> (step * i) for i in range(4) if top >> (step * i)))


def list_stages(search: Search, costs: Costs) -> tuple[Stage, ...]:
    """Return the stages of a search with their results; runs and seconds are upper estimates."""
    run_seconds = search.steps * costs.step + costs.evaluation
    further_seeds = search.repeats - 1
    rounds = 2 + search.widen  # rounds of a sweep: the grid, each rate beyond it, the seeds
    stages = [Stage("budget", 0, costs.evaluation, "largest rank within the budget; loss of BASE")]
    if search.halving:
        runs = len({search.ranks[0], search.ranks[-1]}) * len(search.rates)
        short_seconds = short_steps(search.steps) * costs.step + costs.evaluation
        description = f"{KEPT_RATES} of {len(search.rates)} learning rates, by short runs"
        stages.append(Stage("rates", runs, costs.seconds(runs, short_seconds, 1), description))
    runs = len(search.ranks) * (search.rates_each + further_seeds)
    seconds = costs.seconds(runs, run_seconds, rounds)
    stages.append(Stage("ranks", runs, seconds, "smallest rank within tolerance, tuned rates"))
    if search.full:
        runs = min(search.rates_each, len(search.rates)) + search.widen + further_seeds
        seconds = costs.seconds(runs, search.steps * costs.full_step + costs.evaluation, rounds)
        stages.append(Stage("full", runs, seconds, "the gain of full fine-tuning, for scale"))
    if search.more_seeds and len(search.ranks) > 1:
        runs = len(search.ranks) * search.repeats
        stages.append(
            Stage("seeds", runs, costs.seconds(runs, run_seconds, 1), "the same with more seeds, if these can decide")
        )
    if search.finer and len(search.ranks) > 1:
        runs = search.rates_each + further_seeds
        stages.append(
            Stage("finer", runs, costs.seconds(runs, run_seconds, rounds), "whether a rank in between is enough")
        )
    if search.redistribute:
        runs = 4 + further_seeds
        seconds = costs.seconds(runs, run_seconds, 3) + short_steps(search.steps) * costs.step
        stages.append(Stage("redistribution", runs, seconds, "whether non-uniform ranks beat uniform ones"))
    if search.trials:
        stages.append(
            Stage("trials", search.trials, search.trials * run_seconds, "stability if needed; gain of more parameters")
        )
    return tuple(stages)


def seconds_of(search: Search, costs: Costs) -> float:
    """Return the estimated duration of a search."""
    return MARGIN * sum(stage.seconds for stage in list_stages(search, costs))


def _select_every_second(ranks: Sequence[int]) -> tuple[int, ...]:
    """Return every second rank, the largest and the smallest among them."""
    return tuple(sorted({ranks[0], *ranks[::-2]})) if len(ranks) > 2 else tuple(ranks)


class Omission(StrEnum):
    """Omitted part of a search, with its description in the records."""

    HALVING = "learning rates: all but two after a quarter of the steps (successive halving)"
    MORE_SEEDS = "more seeds where these would decide"
    WIDER_RATES = "learning rates beyond the grid"
    TRIALS = "stability and escalation trials, which are proposed only"
    FULL = "full fine-tuning as a baseline"
    FULL_NEEDS_FLOAT32 = "full fine-tuning as a baseline, which needs float32 weights as they are"
    RANKS = "every second rank"
    INTERMEDIATE_RANK = "the rank in between"
    SEEDS = "all seeds but two"
    REDISTRIBUTION = "non-uniform ranks"
    HALF = "half of the steps"
    THREE_QUARTERS = "three quarters of the steps"
    SEVEN_EIGHTHS = "seven eighths of the steps"


# Omissions of steps; each includes the ones before it.
STEP_OMISSIONS = (Omission.HALF, Omission.THREE_QUARTERS, Omission.SEVEN_EIGHTHS)


def _halve_steps(search: Search) -> Search:
    return replace(search, steps=max(MIN_STEPS, search.steps // 2))


# Omissions in the order in which they are applied until the search fits.
_REDUCTIONS: tuple[tuple[Omission, Callable[[Search], Search]], ...] = (
    (Omission.HALVING, lambda s: replace(s, halving=len(s.rates) > KEPT_RATES)),
    (Omission.MORE_SEEDS, lambda s: replace(s, more_seeds=False)),
    (Omission.WIDER_RATES, lambda s: replace(s, widen=0)),
    (Omission.TRIALS, lambda s: replace(s, trials=0)),
    (Omission.FULL, lambda s: replace(s, full=False)),
    (Omission.RANKS, lambda s: replace(s, ranks=_select_every_second(s.ranks))),
    (Omission.INTERMEDIATE_RANK, lambda s: replace(s, finer=False)),
    (Omission.SEEDS, lambda s: replace(s, repeats=min(s.repeats, 2))),
    (Omission.REDISTRIBUTION, lambda s: replace(s, redistribute=False)),
    *((omission, _halve_steps) for omission in STEP_OMISSIONS),
)


def narrow_search(search: Search, costs: Costs, limit: float | None) -> tuple[Search, tuple[str, ...]]:
    """Return a search that fits a time limit, and its omissions.

    Args:
        search: The search without one.
        costs: Times.
        limit: Seconds; None for none.

    Raises:
        UsageError: Not even the smallest search fits.
    """
    left_out: list[str] = []
    for omission, reduce in _REDUCTIONS:
        if limit is None or seconds_of(search, costs) <= limit:
            break
        smaller = reduce(search)
        if smaller != search and seconds_of(smaller, costs) < seconds_of(search, costs):
            search = smaller
            left_out.append(omission)
    if limit is not None and (minimum := seconds_of(search, costs)) > limit:
        raise UsageError(
            f"--time: even the smallest search takes about {minimum:.0f} s, and {limit:.0f} s are allowed; give more "
            "time, fewer --steps or a smaller --eval set"
        )
    return search, _merge_omissions(left_out)


def _merge_omissions(left_out: Sequence[str]) -> tuple[str, ...]:
    """Return the omissions; of several omissions of steps only the last one, which includes the others."""
    steps = [omission for omission in left_out if omission in STEP_OMISSIONS]
    return tuple(omission for omission in left_out if omission not in steps[:-1])


def halve_rates(losses: Mapping[tuple[int, float], float | None]) -> tuple[float, ...]:
    """Return the ``KEPT_RATES`` learning rates that continue after the short round, ascending.

    At every rank the rate with the lowest loss continues. Where all agree, so does the better of its neighbours in the
    order of losses; where more than ``KEPT_RATES`` are best somewhere, those of the largest ranks.

    Args:
        losses: Losses by rank and rate; None where a run diverged.

    Example:
        >>> losses = {(1, 1e-3): 2.0, (1, 1e-2): 1.0, (1, 1e-1): 1.5, (8, 1e-3): 1.8, (8, 1e-2): 0.9, (8, 1e-1): None}
        >>> halve_rates(losses)
        (0.001, 0.01)
    """
    kept: list[float] = []
    ranks = sorted({rank for rank, _ in losses}, reverse=True)
    orders = [_order_rates(losses, rank) for rank in ranks]
    for position in range(max(map(len, orders), default=0)):
        for order in orders:
            if position < len(order) and order[position] not in kept and len(kept) < KEPT_RATES:
                kept.append(order[position])
    return tuple(sorted(kept))


def _order_rates(losses: Mapping[tuple[int, float], float | None], rank: int) -> list[float]:
    at_rank = [(loss, rate) for (tried_rank, rate), loss in losses.items() if tried_rank == rank and loss is not None]
    return [rate for _, rate in sorted(at_rank)]
