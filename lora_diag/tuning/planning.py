"""The plan of a search: the adapted layers, their cost from timed steps, and the reduction to a
time limit.

A plan has stages; omissions, such as successive halving, reduce it until it fits.

Reference: Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
optimization" (successive halving), here over training steps: many learning rates get few steps, the
best of them all steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import zip_longest
from pathlib import Path
from time import monotonic
from typing import Any

from torch import nn

from lora_diag.decisions.allocate.peft_config import PeftScaling, make_config, make_peft_config
from lora_diag.decisions.allocate.record import Allocation
from lora_diag.decisions.plan.measure import plan
from lora_diag.errors import Given, InputError, UsageError
from lora_diag.models.activations import shape_of
from lora_diag.models.data import count_predictions
from lora_diag.models.opening import Model, Weights
from lora_diag.models.training import (
    ALPHA_OVER_RANK,
    RSLORA_ALPHA,
    Cell,
    Lora,
    is_transposed,
    losses_after,
)
from lora_diag.records import Results
from lora_diag.rendering.text import duration
from lora_diag.running.layers import check_ranks
from lora_diag.running.training_runs import StepCost, TrainRun, extrapolate_steps, time_steps
from lora_diag.storage import Checkpoint
from lora_diag.tuning import TuneOptions
from lora_diag.tuning.record import TunePlan, TuneStage
from lora_diag.tuning.trials import find_shortest_names, target_modules

# The short round of halving trains for the steps divided by this, at the smallest and the largest
# rank.
SHORT_ROUND_DIVISOR = 4
# Number of learning rates that continue after it.
KEPT_RATES = 2
# Minimum number of steps of a reduced search; with fewer, ranks cannot be compared.
MIN_STEPS = 5
# Evaluations whose sequences a time limit reduces to about ten minutes in all; the smallest search
# has 17.
EVALUATIONS = 30
# Factor for opening models and writing files.
MARGIN = 1.1
# Evaluations at the end, which compare the chosen adapter with BASE.
COMPARED = 2
# Fraction of a time limit that is kept for the report and the other files.
WRITING = 0.04
# Seconds of one step of each kind, as extrapolated, up to which steps are measured also for a plan.
MEASURED_SECONDS = 3.0
# Fields of a plan that grow with the length of sequences.
TIMES = ("step_seconds", "full_step_seconds", "evaluation_seconds")
# Tensors of the size of the weights that full fine-tuning adds: gradients, and two of AdamW.
FULL_STATES = 3
# Shortest sequences that are proposed for a search that does not fit.
MIN_LENGTH = 32
# A search without omissions; at most 6 runs of stability and escalation, in addition to the seeds
# of confirmed ones.
WHOLE_SEARCH = {
    "halving": False,
    "more_seeds": True,
    "finer": True,
    "redistribute": True,
    "trials": 6,
}


def short_steps(steps: int) -> int:
    """Return the number of steps of the short round, and of batches whose gradients are taken."""
    return max(1, steps // SHORT_ROUND_DIVISOR)


def ranks_within(largest: int) -> tuple[int, ...]:
    """Return up to four ranks to start from: the largest power of two within the budget, and
    fourths (below 4: halves).

    >>> ranks_within(19), ranks_within(3), ranks_within(1)
    ((1, 4, 16), (1, 2), (1,))
    >>> ranks_within(300)
    (4, 16, 64, 256)
    """
    top = 1 << (largest.bit_length() - 1)
    step = 2 if top >= 4 else 1
    return tuple(sorted(top >> (step * i) for i in range(4) if top >> (step * i)))


def bound_sequential_runs(runs: int, rounds: int, slots: int) -> int:
    """Return an upper bound on the runs one after another, if each round waits for the one before.

    Σ⌈nᵢ/s⌉ ≤ ⌈Σnᵢ/s⌉ + rounds − 1 for rounds of nᵢ runs on s slots.

    Args:
        runs: Number of runs of all rounds.
        rounds: Number of rounds.
        slots: Concurrent runs.

    Example:
        >>> bound_sequential_runs(6, 3, 1), bound_sequential_runs(6, 3, 4)
        (6, 4)
    """
    return min(runs, math.ceil(runs / slots) + rounds - 1)


# What each stage decides, in the order of the stages.
DECIDES = {
    "budget": "largest rank within the budget; loss of BASE",
    "rates": "{kept} of {rates} learning rates, by short runs",
    "ranks": "smallest rank within tolerance, tuned rates",
    "full": "the gain of full fine-tuning, for scale",
    "seeds": "the same with more seeds, if these can decide",
    "finer": "whether a rank in between is enough",
    "redistribution": "whether non-uniform ranks beat uniform ones",
    "trials": "stability if needed; gain of more parameters",
}


def list_stages(plan: TunePlan, is_grid_done: bool = False) -> tuple[TuneStage, ...]:
    """Return the stages of a search; runs and seconds are upper estimates.

    Args:
        plan: The search.
        is_grid_done: Whether to count only what follows the runs of every rank and rate with the
            first seed.
    """
    evaluation, seeds, rounds = (
        plan.evaluation_seconds,
        plan.repeats - 1,
        2 + plan.widen,
    )  # rounds: grid, widen, seeds
    run, short = (
        plan.steps * plan.step_seconds + evaluation,
        short_steps(plan.steps) * plan.step_seconds,
    )
    full_run = plan.steps * plan.full_step_seconds + evaluation
    ranks, has_ranks = len(plan.ranks), len(plan.ranks) > 1
    grid = min(KEPT_RATES, len(plan.rates)) if plan.halving else len(plan.rates)
    rates = grid + (plan.widen if grid > 1 else 0)  # at each rank, with all steps
    # Runs, 0 where the plan omits the stage; seconds of one; rounds; further seconds.
    costs = {
        "budget": (0, 0.0, 1, (1 + COMPARED) * evaluation),
        "rates": (
            not is_grid_done and plan.halving * min(ranks, 2) * len(plan.rates),
            short + evaluation,
            1,
            0.0,
        ),
        "ranks": (ranks * (seeds if is_grid_done else rates + seeds), run, rounds, 0.0),
        "full": (
            plan.full * (min(rates, len(plan.rates)) + plan.widen + seeds),
            full_run,
            rounds,
            0.0,
        ),
        "seeds": ((plan.more_seeds and has_ranks) * ranks * plan.repeats, run, 1, 0.0),
        "finer": ((plan.finer and has_ranks) * (rates + seeds), run, rounds, 0.0),
        "redistribution": (plan.redistribute * (3 + seeds), run, 3, 0.0),
        "trials": (plan.trials, run, plan.trials, 0.0),
    }
    stages = []
    for name, (runs, seconds, stage_rounds, further) in costs.items():
        if runs or name == "budget":
            total = seconds * bound_sequential_runs(runs, stage_rounds, plan.slots) + further
            decides = DECIDES[name].format(kept=KEPT_RATES, rates=len(plan.rates))
            stages.append(TuneStage(name=name, runs=runs, seconds=total, decides=decides))
    return tuple(stages)


def seconds_of(plan: TunePlan, is_grid_done: bool = False) -> float:
    """Return the estimated duration of a search, or of what is left of it, as in
    ``list_stages``.
    """
    return MARGIN * sum(stage.seconds for stage in list_stages(plan, is_grid_done))


class Omission(StrEnum):
    """Omitted part of a search, with its description in the records."""

    HALVING = "learning rates: all but two, after short runs"
    MORE_SEEDS = "more seeds"
    WIDER_RATES = "rates beyond the grid"
    TRIALS = "stability and escalation trials"
    FULL = "full fine-tuning"
    FULL_NEEDS_FLOAT32 = "full fine-tuning, which needs float32 weights as they are"
    RANKS = "every second rank"
    INTERMEDIATE_RANK = "the rank in between"
    SEEDS = "all seeds but two"
    REDISTRIBUTION = "non-uniform ranks"
    HALF = "half of the steps"
    THREE_QUARTERS = "three quarters of the steps"
    SEVEN_EIGHTHS = "seven eighths of the steps"
    FIFTEEN_SIXTEENTHS = "fifteen sixteenths of the steps"


# Omissions of steps; each includes the ones before it.
STEP_OMISSIONS = (
    Omission.HALF,
    Omission.THREE_QUARTERS,
    Omission.SEVEN_EIGHTHS,
    Omission.FIFTEEN_SIXTEENTHS,
)

# Changed fields of a plan by omission, in the order in which these are applied until the search
# fits. Of the ranks, the smallest and the largest stay.
_REDUCTIONS: dict[Omission, Callable[[TunePlan], dict[str, Any]]] = {
    Omission.HALVING: lambda plan: {"halving": len(plan.rates) > KEPT_RATES},
    Omission.MORE_SEEDS: lambda plan: {"more_seeds": False},
    Omission.WIDER_RATES: lambda plan: {"widen": 0},
    Omission.TRIALS: lambda plan: {"trials": 0},
    Omission.FULL: lambda plan: {"full": False},
    Omission.RANKS: lambda plan: {"ranks": tuple(sorted({plan.ranks[0], *plan.ranks[::-2]}))},
    Omission.INTERMEDIATE_RANK: lambda plan: {"finer": False},
    Omission.SEEDS: lambda plan: {"repeats": min(plan.repeats, 2)},
    Omission.REDISTRIBUTION: lambda plan: {"redistribute": False},
    **dict.fromkeys(STEP_OMISSIONS, lambda plan: {"steps": max(MIN_STEPS, plan.steps // 2)}),
}


# Omissions that are still possible when the learning rates are chosen, and when all ranks are
# trained with one seed.
AFTER_RATES = frozenset(Omission) - {Omission.HALVING, Omission.FULL_NEEDS_FLOAT32, *STEP_OMISSIONS}
AFTER_GRID = AFTER_RATES - {Omission.RANKS, Omission.WIDER_RATES}


def fit_plan(plan: TunePlan, limit: float | None) -> TunePlan:
    """Return the plan of a search that fits a time limit, with its stages, duration and omissions.

    Args:
        plan: The search without a limit; omissions in its ``left_out`` are kept.
        limit: Seconds; None for none.

    Raises:
        UsageError: Not even the smallest search fits; names the options of the largest one that
            does, with shorter sequences.
    """
    saved: dict[Omission, float] = {}
    whole = plan
    if limit is not None:
        plan, saved = omit(plan, limit, tuple(Omission))
    seconds = seconds_of(plan)
    if limit is not None and seconds > limit:
        raise UsageError(
            Given("time"),
            f"even the smallest search takes about {duration(seconds)}, and {duration(limit)} are "
            "allowed",
            f"give $time {math.ceil(seconds / 60)}min{_describe_largest(whole, limit)}",
        )
    # Of several omissions of steps the last one includes the others.
    of_steps = [omission for omission in saved if omission in STEP_OMISSIONS]
    if of_steps:
        saved[of_steps[-1]] = math.fsum(saved.pop(omission) for omission in of_steps)
    fields = {
        "seconds": seconds,
        "limit": limit,
        "left_out": (*saved, *plan.left_out),
        "saved": saved,
        "stages": list_stages(plan),
    }
    return plan.model_copy(update=fields)


def _describe_largest(plan: TunePlan, limit: float) -> str:
    """Return the options of the search with the longest sequences that fits a limit; empty if none
    does.

    Times are in proportion to the length: too long for shorter sequences, by the constant part of a
    step.
    """
    while plan.length >= 2 * MIN_LENGTH:
        times = {name: getattr(plan, name) / 2 for name in TIMES}
        plan = plan.model_copy(update={**times, "length": plan.length // 2})
        found, _ = omit(plan, limit, tuple(Omission))
        if seconds_of(found) <= limit:
            ranks = ",".join(map(str, found.ranks))
            return (
                f"; or add $no_full $ranks {ranks} $steps {found.steps} $length {found.length} "
                f"$max_sequences {found.sequences}"
            )
    return ""


def omit(
    plan: TunePlan, limit: float, possible: Collection[Omission], is_grid_done: bool = False
) -> tuple[TunePlan, dict[Omission, float]]:
    """Apply omissions in their order until a search fits a limit, or none is left; return it, and
    the seconds saved.

    Args:
        plan: The search.
        limit: Seconds.
        possible: Omissions that may be applied.
        is_grid_done: As in ``list_stages``.
    """
    saved: dict[Omission, float] = {}
    for omission, reduce in _REDUCTIONS.items():
        if (seconds := seconds_of(plan, is_grid_done)) <= limit:
            break
        smaller = plan.model_copy(update=reduce(plan))
        if omission in possible and (difference := seconds - seconds_of(smaller, is_grid_done)) > 0:
            plan, saved[omission] = smaller, difference
    return plan, saved


def repeat_omissions(plan: TunePlan, names: Collection[str]) -> TunePlan:
    """Return the plan with omissions that an interrupted run recorded; its ``left_out`` and
    duration are unchanged.
    """
    for omission in names:
        if omission in _REDUCTIONS and omission not in plan.left_out:
            plan = plan.model_copy(update=_REDUCTIONS[Omission(omission)](plan))
    return plan


@dataclass
class SearchDeadline:
    """The time limit of a search, and the pace of its runs.

    Args:
        limit: Seconds; None for none.

    Attributes:
        began: Start of the search on the clock, later by the time that the confirmation of the plan
            took.
        pace: Measured duration of the last runs divided by the planned one; at least 1, since runs
            of smaller ranks are faster than the largest, which is timed for the plan.
    """

    limit: float | None
    began: float = field(default_factory=lambda: monotonic())
    pace: float = 1.0
    _since: float | None = None
    _planned: float = 0.0

    @property
    def left(self) -> float:
        """Seconds left, without the time to write the results; infinite without a limit."""
        return (
            math.inf
            if self.limit is None
            else self.limit * (1 - WRITING) - (monotonic() - self.began)
        )

    def stop_timing(self) -> None:
        """Do not count the time until the next step in the pace."""
        self._since = None

    def count(self, planned: float, window: float) -> None:
        """Count finished work, and measure the pace.

        Args:
            planned: Its duration by the plan.
            window: Planned duration of the work from which the pace is measured, such as one run.
        """
        now = monotonic()
        if self._since is None:
            self._since, self._planned = now, 0.0
            return
        self._planned += planned
        if self._planned >= window > 0:
            self.pace = max(1.0, (now - self._since) / self._planned)
            self._since, self._planned = now, 0.0


def halve_rates(losses: Mapping[tuple[int, float], float | None]) -> tuple[float, ...]:
    """Return up to ``KEPT_RATES`` learning rates that continue after the short round, ascending;
    none without a loss.

    They are taken by place: the best rate at each rank, from the largest rank down, then the second
    best at each.

    Args:
        losses: Losses by rank and rate; None where a run diverged.

    Example:
        >>> losses = {
        ...     (1, 1e-3): 2.0,
        ...     (1, 1e-2): 1.0,
        ...     (1, 1e-1): 1.5,
        ...     (8, 1e-3): 1.8,
        ...     (8, 1e-2): 0.9,
        ...     (8, 1e-1): None,
        ... }
        >>> halve_rates(losses)
        (0.001, 0.01)
    """
    finite = sorted((loss, rank, rate) for (rank, rate), loss in losses.items() if loss is not None)
    # The rates at each rank by their losses, the lowest first; the highest rank first.
    orders: dict[int, list[float]] = {}
    for _, rank, rate in sorted(finite, key=lambda found: -found[1]):
        orders.setdefault(rank, []).append(rate)
    places = zip_longest(*orders.values())
    best_first = (rate for place in places for rate in place if rate is not None)
    return tuple(sorted([*dict.fromkeys(best_first)][:KEPT_RATES]))


@dataclass(frozen=True, slots=True)
class TuneTarget:
    """The layers that get an adapter.

    Args:
        layers: Linear layers by their paths in the model.
        stored: The weights' names in BASE, by path.
        shapes: ``(out, in)`` by path.
        names: As PEFT's ``target_modules`` has them.
        transposed: Whether matrices are stored ``(in, out)``.
        task: PEFT's task type; None unless the model is a causal language model.
        total: Parameters of the model.
        kind: Kind of LoRA.
    """

    layers: dict[str, nn.Module]
    stored: dict[str, str]
    shapes: dict[str, tuple[int, int]]
    names: tuple[str, ...]
    transposed: bool
    task: str | None
    total: int
    kind: Lora

    @property
    def per_rank(self) -> int:
        """Number of parameters of one rank on all layers."""
        return sum(sum(shape) for shape in self.shapes.values())

    @property
    def magnitudes(self) -> int:
        """Number of parameters of DoRA's magnitudes, one per output; 0 for LoRA."""
        return sum(outputs for outputs, _ in self.shapes.values()) if self.kind.dora else 0

    def config(self, rank: int) -> dict[str, object]:
        """Return the configuration of one rank everywhere."""
        alpha = RSLORA_ALPHA if self.kind.rslora else ALPHA_OVER_RANK * rank
        return make_config(
            self.names, rank, alpha, self.transposed, self.task, self.kind.rslora, self.kind.dora
        )

    def config_of(self, allocation: Results[Allocation]) -> dict[str, object]:
        """Return the configuration of allocated ranks, of the same kind as that of one rank."""
        config = make_peft_config(allocation, PeftScaling(rslora=self.kind.rslora))
        config["task_type"] = self.task
        if self.kind.rslora:
            config["lora_alpha"] = RSLORA_ALPHA
        if self.kind.dora:
            config["use_dora"] = True
        return config


def target_of(model: Model, stored: Checkpoint, names: Sequence[str], kind: Lora) -> TuneTarget:
    """Return the layers that get an adapter.

    Args:
        model: BASE, opened.
        stored: BASE's checkpoint.
        names: Modules as PEFT names them; empty for all linear layers but the head.
        kind: Kind of LoRA.

    Raises:
        InputError: There is no such layer.
    """
    layers = target_modules(model.module, names)
    if not layers:
        named = f" named {', '.join(names)}" if names else ""
        raise InputError(
            stored.path, f"has no linear layer to adapt{named}", "check $target_modules"
        )
    stored_names = Weights(model.module).base_names(stored)
    paths = [path for path, _ in model.module.named_modules()]
    return TuneTarget(
        layers,
        {path: stored_names.get(f"{path}.weight", f"{path}.weight") for path in layers},
        {path: shape_of(layer) for path, layer in layers.items()},
        tuple(names) or tuple(find_shortest_names(list(layers), paths)),
        is_transposed(model.module),
        "CAUSAL_LM" if model.kind == "causal" else None,
        sum(parameter.numel() for parameter in model.module.parameters()),
        kind,
    )


def plan_of(
    base: Path | str,
    run: TrainRun[TuneOptions],
    target: TuneTarget,
    limit: float | None,
    slots: int,
) -> TunePlan:
    """Return the plan of a search.

    Args:
        base: The model.
        run: Its options, model and texts.
        target: The layers that get an adapter.
        limit: Seconds; None for none.
        slots: Concurrent runs.

    Raises:
        UsageError: The budget is too small for rank 1 or a requested rank, the time for any search,
            an option is invalid, or peft is not installed.
    """
    options = run.options
    tokens = count_predictions(run.training.texts, run.model)
    target_pattern = "^(?:" + "|".join(map(re.escape, target.stored.values())) + ")$"
    budget_plan = plan(
        base,
        layers=target_pattern,
        tokens=max(1, tokens),
        params=options["params"],
        memory_budget=options["memory_budget"],
    )
    assert budget_plan.fit is not None
    assert budget_plan.capacity is not None
    largest = budget_plan.fit.rank
    if target.magnitudes:
        largest = (budget_plan.fit.budget - target.magnitudes) // target.per_rank
    if largest < 1:
        minimum = target.per_rank + target.magnitudes
        params, memory = options["params"], options["memory_budget"]
        raise UsageError(
            Given("memory_budget", memory) if params is None else Given("params", params),
            f"not even r=1 fits, which takes {minimum:,} parameters",
            "give a budget of at least that, or choose fewer layers with $target_modules",
        )
    settings = _make_settings(options, largest)
    if too_large := [rank for rank in settings["ranks"] if rank > largest]:
        raise UsageError(Given("ranks", too_large), f"the budget allows r ≤ {largest}")
    full = not options["no_full"] and options["dtype"] == "float32" and not options["quantized"]
    whole = TunePlan(
        budget=budget_plan.fit.budget,
        per_rank=target.per_rank,
        magnitudes=target.magnitudes,
        kind=target.kind.description,
        slots=slots,
        largest=largest,
        tokens=tokens,
        rules={f"{rule.name} ({rule.source})": rule.rank for rule in budget_plan.capacity.rules},
        steps=options["steps"],
        full=full,
        length=run.model.length,
        sequences=max(len(each.sequences) for each in run.sets),
        **dict.fromkeys((*TIMES, "seconds"), 0.0),
        limit=None,
        left_out=() if full or options["no_full"] else (Omission.FULL_NEEDS_FLOAT32,),
        stages=(),
        **settings,
    )
    timed = _time_plan(whole, run, limit, extrapolate_steps)
    if timed.step_seconds + timed.full_step_seconds > MEASURED_SECONDS:
        excludes = limit is not None and _is_excluded(timed, limit)
        if options["dry_run"] or excludes:
            return fit_plan(timed, limit)
    return fit_plan(_time_plan(timed, run, limit, time_steps), limit)


def _is_excluded(plan: TunePlan, limit: float) -> bool:
    """Return whether no search fits a limit, even at the fastest that the error of times allows."""
    longest = limit / (1 - plan.error)
    smallest, _ = omit(plan, longest, tuple(Omission))
    return seconds_of(smallest) > longest


def _time_plan(
    plan: TunePlan,
    run: TrainRun[TuneOptions],
    limit: float | None,
    measure: Callable[..., StepCost],
) -> TunePlan:
    """Return a plan with times; that of full fine-tuning is measured if it may fit the limit at the
    time of LoRA.

    Args:
        plan: The search without a limit.
        run: Its options, model and texts.
        limit: Seconds; None for none.
        measure: ``time_steps`` or ``extrapolate_steps``.
    """
    train, texts = partial(losses_after, run.model), (run.training, run.sets)
    lora = measure(partial(train, Cell(max(plan.ranks), 1e-6, 0)), *texts)
    times = {
        "step_seconds": lora.seconds,
        "full_step_seconds": lora.seconds * plan.full,
        "evaluation_seconds": lora.evaluation_seconds * run.batches(run.sets),
        "error": lora.error,
        "memory_bytes": max(lora.saved_bytes, plan.memory_bytes),
    }
    plan = plan.model_copy(update=times)
    smallest, _ = omit(plan, (limit or math.inf) / (1 - lora.error), tuple(Omission))
    if not smallest.full:
        return plan
    full = measure(partial(train, Cell(None, 1e-9, 0, "full")), *texts)
    weights = sum(weight.nbytes for weight in run.model.module.parameters())
    needed = full.saved_bytes + FULL_STATES * weights if full.saved_bytes else 0
    of_full = {
        "full_step_seconds": full.seconds,
        "memory_bytes": max(needed, plan.memory_bytes),
    }
    return plan.model_copy(update=of_full)


def _make_settings(options: TuneOptions, largest: int) -> dict[str, Any]:
    """Return the fields of a plan that follow from the options: those of a search without
    omissions.
    """
    return {
        "ranks": tuple(check_ranks(options["ranks"]))
        if options["ranks"]
        else ranks_within(largest),
        "rates": tuple(sorted(set(options["lr"]))),
        "repeats": options["repeats"],
        "widen": options["widen"],
        **WHOLE_SEARCH,
    }


def extend_plan(plan: TunePlan, options: TuneOptions, limit: float, slots: int) -> TunePlan:
    """Return the plan of a search that is given more time: all options as given, as far as this
    limit allows.

    The steps of a run are not raised to the option's: they start from the earlier plan.

    Args:
        plan: The earlier plan.
        options: All options of the run.
        limit: Seconds.
        slots: Concurrent runs.

    Raises:
        UsageError: The limit is below the earlier one or too short for any search, the earlier plan
            has none, or ``ranks`` has one below 1.
    """
    if plan.limit is None or limit < plan.limit:
        planned = "without a limit" if plan.limit is None else f"for {duration(plan.limit)}"
        raise UsageError(
            Given("time"),
            f"allows {duration(limit)}, but the search to resume was planned {planned}",
            "give at least that, or remove $time",
        )
    whole = {
        **_make_settings(options, plan.largest),
        "slots": slots,
        "full": plan.full_step_seconds > 0 and not options["no_full"],
        "left_out": tuple(
            item for item in plan.left_out if item in {Omission.FULL_NEEDS_FLOAT32, *STEP_OMISSIONS}
        ),
    }
    return fit_plan(plan.model_copy(update=whole), limit)
