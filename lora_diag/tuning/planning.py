"""The plan of a search: the adapted layers, their cost from timed steps, and the reduction to a time limit.

A plan has stages; omissions, such as successive halving, reduce it until it fits.

Reference: Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization"
(successive halving), here over training steps: many learning rates get few steps, the best of them all steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import nn

from lora_diag.checkpoints import Checkpoint
from lora_diag.decisions.allocate.peft_config import Scaling, peft_config
from lora_diag.decisions.allocate.record import Allocation
from lora_diag.decisions.plan.run import plan
from lora_diag.errors import InputError, UsageError
from lora_diag.models.activations import input_dimension
from lora_diag.models.data import count_predictions
from lora_diag.models.opening import Model, Weights
from lora_diag.models.training import Cell, Lora, is_transposed
from lora_diag.records import Results
from lora_diag.rendering.text import duration
from lora_diag.running.layers import check_ranks
from lora_diag.running.training_runs import TrainRun
from lora_diag.tuning.record import TunePlan, TuneStage
from lora_diag.tuning.trials import RSLORA_ALPHA, find_shortest_names, step_seconds, target_modules, uniform

# The short round of halving trains for the steps divided by this, at the smallest and the largest rank.
SHORT_ROUND_DIVISOR = 4
# Number of learning rates that continue after it.
KEPT_RATES = 2
# Minimum number of steps of a reduced search; with fewer, ranks cannot be compared.
MIN_STEPS = 10
# Maximum number of runs of stability and escalation, in addition to the seeds of confirmed ones.
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

    def seconds(self, runs: int, run_seconds: float, rounds: int) -> float:
        """Return an upper bound on the duration of runs in rounds, each of which waits for the one before.

        Σ⌈nᵢ/s⌉ ≤ ⌈Σnᵢ/s⌉ + rounds − 1 for rounds of nᵢ runs on s slots.

        Args:
            runs: Number of runs of all rounds.
            run_seconds: Seconds of one run.
            rounds: Number of them.

        Example:
            >>> Costs(1.0, 0.0).seconds(6, 2.0, 3), Costs(1.0, 0.0, slots=4).seconds(6, 2.0, 3)
            (12.0, 8.0)
        """
        return run_seconds * min(runs, math.ceil(runs / self.slots) + rounds - 1)


@dataclass(frozen=True, slots=True)
class Search:
    """The runs of a search.

    Args:
        ranks: Shared ranks, ascending.
        rates: Learning rates.
        steps: Updates of a run.
        repeats: Seeds.
        widen: Number of rates beyond the grid, at each rank.
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
        """Maximum number of rates that a rank is trained at with all steps."""
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
    """Return the number of steps of the short round, and of batches whose gradients are taken."""
    return max(1, steps // SHORT_ROUND_DIVISOR)


def ranks_within(largest: int) -> tuple[int, ...]:
    """Return up to four ranks to start from: the largest power of two within the budget, and fourths (below 4: halves).

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
    """Return a search with half of the steps, but at least ``MIN_STEPS``."""
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

    At every rank the rate with the lowest loss continues. Where all agree, so does the second best of the largest
    rank; where more than ``KEPT_RATES`` are best somewhere, those of the largest ranks.

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
    """Return the rates tried at a rank by their losses, the lowest first, without those that diverged."""
    at_rank = [(loss, rate) for (tried_rank, rate), loss in losses.items() if tried_rank == rank and loss is not None]
    return [rate for _, rate in sorted(at_rank)]


@dataclass(frozen=True, slots=True)
class Target:
    """The layers that get an adapter.

    Args:
        layers: Linear layers by their paths in the model.
        stored: The weights' names in BASE, by path.
        shapes: ``(out, in)`` by path.
        names: As PEFT's ``target_modules`` has them.
        transposed: Whether matrices are stored ``(in, out)``.
        task: PEFT's task type.
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
        """Parameters of one rank on all of them."""
        return sum(sum(shape) for shape in self.shapes.values())

    @property
    def magnitudes(self) -> int:
        """Parameters of DoRA's magnitudes, one per output; 0 for LoRA."""
        return sum(outputs for outputs, _ in self.shapes.values()) if self.kind.dora else 0

    def config(self, rank: int) -> dict[str, object]:
        """Return the configuration of one rank everywhere."""
        return uniform(self.names, rank, self.transposed, self.task, self.kind.rslora, self.kind.dora)

    def config_of(self, allocation: Results[Allocation]) -> dict[str, object]:
        """Return the configuration of allocated ranks, of the same kind as that of one rank.

        Raises:
            InputError: No layer has a rank, or PEFT cannot express them.
        """
        config = {**peft_config(allocation, Scaling(rslora=self.kind.rslora)), "task_type": self.task}
        alpha = {"lora_alpha": RSLORA_ALPHA} if self.kind.rslora else {}
        return {**config, **alpha, **({"use_dora": True} if self.kind.dora else {})}


def target_of(model: Model, stored: Checkpoint, names: Sequence[str], kind: Lora) -> Target:
    """Return the layers that get an adapter.

    Args:
        model: BASE, opened.
        stored: BASE, its file.
        names: Modules as PEFT names them; empty for all linear layers but the head.
        kind: Kind of LoRA.

    Raises:
        InputError: There is no such layer.
    """
    layers = target_modules(model.module, names)
    if not layers:
        named = f" named {', '.join(names)}" if names else ""
        raise InputError(f"{stored.path}: has no linear layer to adapt{named}; check --target-modules")
    weights = Weights(model.module)
    stored_names = {inner: name for name in stored if (inner := weights.name(name)) is not None}
    paths = [path for path, _ in model.module.named_modules()]
    return Target(
        layers,
        {path: stored_names.get(f"{path}.weight", f"{path}.weight") for path in layers},
        {path: _layer_shape(layer) for path, layer in layers.items()},
        tuple(names) or tuple(find_shortest_names(list(layers), paths)),
        is_transposed(model.module),
        "CAUSAL_LM" if model.kind == "causal" else None,
        sum(parameter.numel() for parameter in model.module.parameters()),
        kind,
    )


def _layer_shape(layer: nn.Module) -> tuple[int, int]:
    """Return ``(out, in)`` of a layer."""
    weight, inputs = layer.get_parameter("weight"), input_dimension(layer)
    return weight.numel() // inputs, inputs


def plan_of(base: Path | str, run: TrainRun, target: Target, limit: float | None, slots: int) -> TunePlan:
    """Return the plan of a search.

    Args:
        base: The model.
        run: Its options, model and texts.
        target: The layers that get an adapter.
        limit: Seconds; None for none.
        slots: Concurrent runs.

    Raises:
        UsageError: The budget is too small for rank 1 or a requested rank, or the time for any search.
    """
    options = run.options
    tokens = count_predictions(run.training.texts, run.model)
    budgets = {name: options[name] for name in ("params", "memory_budget")}
    target_pattern = "^(?:" + "|".join(map(re.escape, target.stored.values())) + ")$"
    budget_plan = plan(base, layers=target_pattern, tokens=max(1, tokens), **budgets)
    assert budget_plan.fit is not None
    assert budget_plan.capacity is not None
    largest = budget_plan.fit.rank
    if target.magnitudes:
        largest = (budget_plan.fit.budget - target.magnitudes) // target.per_rank
    if largest < 1:
        minimum = target.per_rank + target.magnitudes
        raise UsageError(
            f"{budget_plan.fit.asked}: not even r=1 fits, which takes {minimum:,} parameters; "
            "give a budget of at least that, or choose fewer layers with --target-modules"
        )
    ranks = tuple(check_ranks(options["ranks"])) if options["ranks"] else ranks_within(largest)
    if too_large := [rank for rank in ranks if rank > largest]:
        raise UsageError(f"--ranks {','.join(map(str, too_large))}: {budget_plan.fit.asked} allows r ≤ {largest}")
    full = not options["no_full"] and options["dtype"] == "float32" and not options["quantized"]
    lora_step, batch_seconds = step_seconds(run.model, Cell(max(ranks), 1e-6, 0), run.training, run.sets)
    full_step = step_seconds(run.model, Cell(None, 1e-9, 0, "full"), run.training, run.sets)[0] if full else 0.0
    costs = Costs(lora_step, batch_seconds * run.batches(run.sets), full_step, slots)
    search = Search(
        ranks, tuple(sorted(set(options["rates"]))), options["steps"], options["repeats"], options["widen"], full=full
    )
    omissions = () if full or options["no_full"] else (Omission.FULL_NEEDS_FLOAT32,)
    return TunePlan(
        budget=budget_plan.fit.budget,
        per_rank=target.per_rank,
        magnitudes=target.magnitudes,
        kind=target.kind.description,
        largest=largest,
        tokens=tokens,
        rules={f"{rule.name} ({rule.source})": rule.rank for rule in budget_plan.capacity.rules},
        step_seconds=lora_step,
        full_step_seconds=full_step,
        evaluation_seconds=costs.evaluation,
        **_plan_within(search, costs, limit, omissions),
    )


def extend_plan(plan: TunePlan, run: TrainRun, limit: float, slots: int) -> TunePlan:
    """Return the plan of a search that is given more time: all options as given, as far as this limit allows.

    The steps of a run stay those of the earlier plan, so that its runs can be compared with new ones.

    Args:
        plan: The earlier plan.
        run: Its options.
        limit: Seconds.
        slots: Concurrent runs.

    Raises:
        UsageError: The limit is below the earlier one, or the earlier plan has none.
    """
    if plan.limit is None or limit < plan.limit:
        planned = "without a limit" if plan.limit is None else f"for {duration(plan.limit)}"
        raise UsageError(
            f"--time: allows {duration(limit)}, but the search to resume was planned {planned}; give at least that, or "
            "remove --time"
        )
    options = run.options
    search = Search(
        tuple(check_ranks(options["ranks"])) if options["ranks"] else ranks_within(plan.largest),
        tuple(sorted(set(options["rates"]))),
        plan.steps,
        options["repeats"],
        options["widen"],
        full=plan.full_step_seconds > 0,
    )
    costs = Costs(plan.step_seconds, plan.evaluation_seconds, plan.full_step_seconds, slots)
    kept = tuple(item for item in plan.left_out if item in {Omission.FULL_NEEDS_FLOAT32, *STEP_OMISSIONS})
    return plan.model_copy(update=_plan_within(search, costs, limit, kept))


def _plan_within(search: Search, costs: Costs, limit: float | None, left_out: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of a plan that follow from its limit.

    Args:
        search: The search without one.
        costs: Times.
        limit: Seconds; None for none.
        left_out: Omissions for other reasons.
    """
    reduced, omissions = narrow_search(search, costs, limit)
    fields = {field.name: getattr(reduced, field.name) for field in dataclass_fields(reduced)}
    return {
        **fields,
        "seconds": seconds_of(reduced, costs),
        "limit": limit,
        "slots": costs.slots,
        "left_out": (*omissions, *left_out),
        "stages": tuple(
            TuneStage(name=stage.name, runs=stage.runs, seconds=stage.seconds, decides=stage.decides)
            for stage in list_stages(reduced, costs)
        ),
    }
