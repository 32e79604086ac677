"""The adapted layers, their cost, and the plan of a search from one timed step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from torch import nn

from lora_diag.checkpoints import Checkpoint
from lora_diag.decisions.allocate.peft_config import Scaling, peft_config
from lora_diag.decisions.allocate.record import Allocation
from lora_diag.decisions.plan.run import plan
from lora_diag.decisions.tune.record import TunePlan, TuneStage
from lora_diag.decisions.tune.schedule import (
    STEP_OMISSIONS,
    Costs,
    Omission,
    Search,
    list_stages,
    narrow_search,
    ranks_within,
    seconds_of,
)
from lora_diag.decisions.tune.trials import step_seconds, target_modules
from lora_diag.decisions.tune.variants import RSLORA_ALPHA, find_shortest_names, uniform
from lora_diag.errors import InputError, UsageError
from lora_diag.models.activations import input_dimension
from lora_diag.models.data import count_predictions
from lora_diag.models.methods import Lora, is_transposed
from lora_diag.models.opening import Model, Weights
from lora_diag.models.training import Cell
from lora_diag.records import Results
from lora_diag.rendering.text import duration
from lora_diag.running.measuring import check_ranks
from lora_diag.running.training_runs import TrainRun


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

    def allocated(self, ranks: Results[Allocation]) -> dict[str, object]:
        """Return the configuration of allocated ranks, of the same kind as that of one rank.

        Raises:
            InputError: No layer has a rank, or PEFT cannot express them.
        """
        config = {**peft_config(ranks, Scaling(rslora=self.kind.rslora)), "task_type": self.task}
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
        UsageError: The budget is too small for rank 1, or the time for any search.
    """
    options = run.options
    tokens = count_predictions(run.training.texts, run.model)
    budgets = {name: options[name] for name in ("params", "memory_budget")}
    exact = "^(?:" + "|".join(map(re.escape, target.stored.values())) + ")$"
    budget_plan = plan(base, layers=exact, tokens=max(1, tokens), **budgets)
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
    if above := [rank for rank in ranks if rank > largest]:
        raise UsageError(f"--ranks {','.join(map(str, above))}: {budget_plan.fit.asked} allows r ≤ {largest}")
    full = not options["no_full"] and options["dtype"] == "float32" and not options["quantized"]
    step, batch = step_seconds(run.model, Cell(max(ranks), 1e-6, 0), run.training, run.sets)
    full_step = step_seconds(run.model, Cell(None, 1e-9, 0, "full"), run.training, run.sets)[0] if full else 0.0
    costs = Costs(step, batch * run.batches(run.sets), full_step, slots)
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
        step_seconds=step,
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
        UsageError: The limit is not above the earlier one.
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


def _plan_within(wanted: Search, costs: Costs, limit: float | None, left_out: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of a plan that follow from its limit.

    Args:
        wanted: What would be trained without one.
        costs: Times.
        limit: Seconds; None for none.
        left_out: Omissions for other reasons.
    """
    search, omissions = narrow_search(wanted, costs, limit)
    fields = {field.name: getattr(search, field.name) for field in dataclass_fields(search)}
    return {
        **fields,
        "seconds": seconds_of(search, costs),
        "limit": limit,
        "slots": costs.slots,
        "left_out": (*omissions, *left_out),
        "stages": tuple(
            TuneStage(name=stage.name, runs=stage.runs, seconds=stage.seconds, decides=stage.decides)
            for stage in list_stages(search, costs)
        ),
    }
