"""What is adapted, what it costs, and the plan of a search from one timed step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lora_diag.checkpoints import Checkpoint
from lora_diag.decisions.plan.run import plan
from lora_diag.decisions.tune.record import TunePlan, TuneStage
from lora_diag.decisions.tune.schedule import Costs, Search, narrowed, ranks_within, seconds_of, stages
from lora_diag.decisions.tune.trials import step_seconds, target_modules
from lora_diag.decisions.tune.variants import shortest, uniform
from lora_diag.errors import InputError, UsageError
from lora_diag.models.activations import inputs_of
from lora_diag.models.data import predicted
from lora_diag.models.methods import is_transposed
from lora_diag.models.opening import Model, Weights
from lora_diag.models.training import Cell
from lora_diag.running.measuring import checked_ranks
from lora_diag.running.training_runs import TrainRun


@dataclass(frozen=True, slots=True)
class Target:
    """What gets an adapter.

    Args:
        layers: Linear layers by their paths in the model.
        stored: The weights' names in BASE, by path.
        shapes: ``(out, in)`` by path.
        names: As PEFT's ``target_modules`` has them.
        transposed: Whether matrices are stored ``(in, out)``.
        task: PEFT's task type.
        total: Parameters of the model.
    """

    layers: dict[str, nn.Module]
    stored: dict[str, str]
    shapes: dict[str, tuple[int, int]]
    names: tuple[str, ...]
    transposed: bool
    task: str | None
    total: int

    @property
    def per_rank(self) -> int:
        """Parameters of one rank on all of them."""
        return sum(sum(shape) for shape in self.shapes.values())

    def config(self, rank: int) -> dict[str, object]:
        """Return the configuration of one rank everywhere."""
        return uniform(self.names, rank, self.transposed, self.task)


def target_of(model: Model, stored: Checkpoint, asked: Sequence[str]) -> Target:
    """Return what gets an adapter.

    Args:
        model: BASE, opened.
        stored: BASE, its file.
        asked: Modules as PEFT names them; empty for all linear layers but the head.

    Raises:
        InputError: There is no such layer.
    """
    layers = target_modules(model.module, asked)
    if not layers:
        raise InputError(f"{stored.path}: no linear layer to adapt is called {', '.join(asked) or 'anything'}")
    weights = Weights(model.module)
    in_model = {name: called for called in stored if (name := weights.name(called)) is not None}
    every = [path for path, _ in model.module.named_modules()]
    return Target(
        layers,
        {path: in_model.get(f"{path}.weight", f"{path}.weight") for path in layers},
        {path: _shape(layer) for path, layer in layers.items()},
        tuple(asked) or tuple(shortest(list(layers), every)),
        is_transposed(model.module),
        "CAUSAL_LM" if model.kind == "causal" else None,
        sum(each.numel() for each in model.module.parameters()),
    )


def _shape(layer: nn.Module) -> tuple[int, int]:
    weight, inputs = layer.get_parameter("weight"), inputs_of(layer)
    return weight.numel() // inputs, inputs


def plan_of(base: Path | str, run: TrainRun, target: Target, limit: float | None) -> TunePlan:
    """Return the plan of a search.

    Args:
        base: The model.
        run: Its options, model and texts.
        target: What gets an adapter.
        limit: Seconds; None for none.

    Raises:
        UsageError: The budget pays for no rank, or the time for no search.
    """
    given = run.options
    tokens = predicted(run.training.texts, run.model)
    exact = "^(?:" + "|".join(map(re.escape, target.stored.values())) + ")$"
    budgets = {name: given[name] for name in ("params", "memory_budget")}
    counted = plan(base, layers=exact, tokens=max(1, tokens), **budgets)
    assert counted.fit is not None
    assert counted.capacity is not None
    largest = counted.fit.rank
    if largest < 1:
        raise UsageError(
            f"{counted.fit.asked}: not even r=1 fits, it takes {target.per_rank:,} parameters; raise it, or choose "
            "fewer layers with --target-modules"
        )
    asked = tuple(checked_ranks(given["ranks"])) if given["ranks"] else ranks_within(largest)
    if above := [rank for rank in asked if rank > largest]:
        raise UsageError(f"--ranks {','.join(map(str, above))}: {counted.fit.asked} allows r ≤ {largest}")
    full = not given["no_full"] and given["dtype"] == "float32" and not given["quantized"]
    step, batch = step_seconds(run.model, Cell(max(asked), 1e-6, 0), run.training, run.sets)
    full_step = step_seconds(run.model, Cell(None, 1e-9, 0, "full"), run.training, run.sets)[0] if full else 0.0
    costs = Costs(step, batch * run.batches(run.sets), full_step)
    wanted = Search(
        asked, tuple(sorted(set(given["rates"]))), given["steps"], given["repeats"], given["widen"], full=full
    )
    search, left_out = narrowed(wanted, costs, limit)
    if not full and not given["no_full"]:
        left_out = (*left_out, "full fine-tuning as a baseline, which needs float32 weights as they are")
    return TunePlan(
        budget=counted.fit.budget,
        per_rank=target.per_rank,
        largest=largest,
        tokens=tokens,
        rules={f"{rule.name} ({rule.source})": rule.rank for rule in counted.capacity.rules},
        ranks=search.ranks,
        rates=search.rates,
        steps=search.steps,
        repeats=search.repeats,
        widen=search.widen,
        halving=search.halving,
        full=search.full,
        more_seeds=search.more_seeds,
        finer=search.finer,
        redistribute=search.redistribute,
        trials=search.trials,
        step_seconds=step,
        full_step_seconds=full_step,
        evaluation_seconds=costs.evaluation,
        seconds=seconds_of(search, costs),
        limit=limit,
        left_out=left_out,
        stages=tuple(
            TuneStage(name=one.name, runs=one.runs, seconds=one.seconds, decides=one.decides)
            for one in stages(search, costs)
        ),
    )
