"""``probe sensitivity``: measure the loss gain of adapting each layer alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from lora_diag.checkpoints import Checkpoint, open_checkpoint
from lora_diag.deltas import selector
from lora_diag.errors import NothingComparedError
from lora_diag.models.activations import linear_layers
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, measure
from lora_diag.models.methods import layers_without_head
from lora_diag.models.opening import Model, Weights
from lora_diag.models.training import RECIPE, Cell, Training
from lora_diag.probes.sensitivity.measure import (
    Unit,
    first_order,
    gradients,
    record_of,
    shape_of,
    train_alone,
    units_of,
)
from lora_diag.probes.sensitivity.options import SensitivityOptions
from lora_diag.probes.sensitivity.record import FirstOrder, Sensitivity
from lora_diag.records import LeftOut, Results
from lora_diag.rendering.text import duration
from lora_diag.running.options import show_options
from lora_diag.running.probing import check_files, pluralize
from lora_diag.running.progress import RunRecords
from lora_diag.running.training_runs import Arm, RunPlan, TrainRun, Trial


@show_options
def probe_sensitivity(
    base: Path | str,
    **options: Unpack[SensitivityOptions],
) -> Results[Any]:
    r"""Train a LoRA on each layer alone, on the same batches in the same order, and measure ΔL_ℓ = L(BASE) − L.

    First the gradient of every layer at BASE is computed in one pass, which gives cheap first-order scores. Then each
    unit is adapted alone at every rate with the first seed, and at the rate of its lowest loss on the first evaluation
    set with the other seeds.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        data: Training text or JSONL.
        evaluate: Held-out files of the same distribution; the first decides on the learning rate.
        shifted: Files of another distribution.
        rank: Rank r.
        delta: δ: also train at r + δ, for the marginal gain L_ℓ(r) − L_ℓ(r + δ).
        granularity: Unit of adaptation: each ``layer``, the layers of a ``block``, or of a module ``type``.
        rates: Peak learning rates.
        steps: Number of updates of a run.
        repeats: Number of runs of each unit at its best rate; they differ in the initial factors.
        **options: ``SensitivityOptions``.

    Returns:
        The records are in ``whole``: a ``FirstOrder`` for every layer, then ``Sensitivity``: BASE's losses, and those
        of every run, set by set.

    Raises:
        UsageError: An option is invalid, the training text is also an evaluation set, or the extra ``train`` is
            missing.
        InputError: An input cannot be read, or the model cannot be opened or adapted.
        NothingComparedError: No linear layer is selected.

    Example:
        >>> found = probe_sensitivity("sample_checkpoints/base",  # doctest: +SKIP
        ...     data="train.txt", evaluate=["held_out.txt"], granularity="type", steps=50)
        >>> {record.record for record in found.whole}  # doctest: +SKIP
    """
    run = TrainRun("probe sensitivity", options, SensitivityOptions, ("rates",), ("rank", "delta", "steps", "repeats"))
    data, evaluate, shifted = (run.options[name] for name in ("data", "evaluate", "shifted"))
    rank, delta, per = (run.options[name] for name in ("rank", "delta", "granularity"))
    rates, steps, seeds = (run.options[name] for name in ("rates", "steps", "repeats"))
    check_files([base], evaluate, *shifted, data)
    selected = selector(**run.selection)
    stored = open_checkpoint(base)
    model = run.open(base)
    run.read_all(data, evaluate, shifted, steps)
    names, left_out = _choose_layers(model, stored, selected)
    linear = {name: layer for name, layer in linear_layers(model.module).items() if name in names}
    settings = {
        "per": per,
        "rank": rank,
        "delta": delta,
        "rates": sorted(set(rates)),
        **run.trained(seeds),
        **run.selection,
        "kind": run.training.kind.description,
        "optimizer": RECIPE,
    }

    def measure_missing(kept: RunRecords[Any]) -> list[LeftOut]:
        ranks = (rank, rank + delta) if delta is not None else (rank,)
        plan = run.walk(kept, seeds)
        probe = _Probe(model, units_of(linear, names, per), ranks, tuple(sorted(set(rates))), plan)
        probe.report_cost()
        probe.score(linear, names)
        probe.run(probe.measure_base())
        return left_out

    return run.over(run.inputs(stored), settings, measure_missing)


def _choose_layers(
    model: Model, stored: Checkpoint, selected: Callable[[str], bool]
) -> tuple[dict[str, str], list[LeftOut]]:
    """Return the linear layers to adapt by their names in the model, with those in BASE; and the skipped ones.

    Raises:
        NothingComparedError: No linear layer is selected.
    """
    weights, inner = Weights(model.module), layers_without_head(model.module)
    known = {name: stored_name for stored_name in stored if (name := weights.name(stored_name)) is not None}
    names: dict[str, str] = {}
    left_out = []
    for name, layer in linear_layers(model.module).items():
        base_name = known.get(name, name)
        if name in inner and name in known and selected(base_name):
            names[name] = base_name
            continue
        detail = "the head is not adapted" if name not in inner else "was not selected"
        if name not in known:
            detail = "not stored under a name of its own in BASE (tied)"
        left_out.append(LeftOut(layer=base_name, shape=shape_of(layer), reason="not_selected", detail=detail))
    if not names:
        raise NothingComparedError(
            f"{stored.path}: no linear layer is selected, so there is nothing to adapt; change --layers or --exclude"
        )
    return names, left_out


@dataclass(frozen=True, slots=True)
class _Probe:
    """State of a run."""

    model: Model
    units: Sequence[Unit]
    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    plan: RunPlan

    def arm(self, unit: Unit, rank: int, bases: Mapping[str, Losses]) -> Arm:
        """Return one unit at one rank, at every rate; its gains are over the losses of BASE, by set."""
        return Arm((rank,), self.rates, partial(self._make_trial, unit, bases))

    def _make_trial(self, unit: Unit, bases: Mapping[str, Losses], rank: int | None, lr: float, seed: int) -> Trial:
        cell = Cell(rank, lr, seed)
        fields = {"record": "sensitivity", "unit": unit.name, "rank": rank, "lr": lr, "seed": seed}

        def train(training: Training, sets: Sequence[Texts], after: Callable[[], None]) -> list[Sensitivity]:
            return train_alone(self.model, unit, cell, training, sets, bases, after)

        return Trial(fields, f"{unit.name} {cell.label}", train)

    def score(self, layers: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Compute the gradient of every layer at BASE, and its first-order records."""
        if self._has_scores():
            return
        texts, plan = self._select_used_sequences(), self.plan
        layer_gradients = gradients(
            self.model, layers, texts, plan.training.batch, partial(plan.watch.batch, "gradient")
        )
        plan.kept.put(
            *(first_order(names[name], gradient, self.ranks[0], texts) for name, gradient in layer_gradients.items())
        )

    def measure_base(self) -> dict[str, Losses]:
        """Measure BASE; repeated after an interruption, because errors need its losses by sequence."""
        plan = self.plan
        after = partial(plan.watch.batch, "BASE")
        bases = {texts.name: measure(self.model, texts, plan.training.batch, after) for texts in plan.sets}
        plan.kept.put(*(record_of(texts, bases[texts.name]) for texts in plan.sets))
        return bases

    def run(self, bases: Mapping[str, Losses]) -> None:
        """Adapt every unit at every rank."""
        for unit in self.units:
            for rank in self.ranks:
                self.plan.run(self.arm(unit, rank, bases))

    def _has_scores(self) -> bool:
        return any(isinstance(record, FirstOrder) for record in self.plan.kept.records)

    def _select_used_sequences(self) -> Texts:
        """Return the distinct sequences that a run trains on, in order."""
        training = self.plan.training
        sequences = dict.fromkeys(sequence for batch in training.batches() for sequence in batch)
        return replace(training.texts, sequences=tuple(sequences))

    def report_cost(self) -> None:
        """Time one step of the first unit, which has the longest backward pass, and report the estimated cost."""
        plan, steps = self.plan, self.plan.training.steps
        first = plan.sets[0].first(plan.training.batch)
        bases = {first.name: measure(self.model, first, plan.training.batch)}
        step, evaluation = plan.timed(self.arm(self.units[0], self.ranks[-1], bases))
        arms = [self.arm(unit, rank, bases) for unit in self.units for rank in self.ranks]
        runs = sum(map(plan.left, arms))
        passes = 0 if self._has_scores() else -(-len(self._select_used_sequences().sequences) // plan.training.batch)
        plan.watch.total = plan.batches + passes
        plan.expect(runs)
        seconds = (runs * steps + passes) * step + (runs + 1) * plan.batches * evaluation
        entries = sum(
            shape_of(layer)[0] * shape_of(layer)[1] for layer in layers_without_head(self.model.module).values()
        )
        memory = f"; the gradients take {4 * entries / 2**30:.1f} GiB" if passes and 4 * entries >= 2**30 / 10 else ""
        plan.watch.note(
            f"about {duration(seconds)}: {pluralize(runs, 'run', 'runs')} of {steps} steps of {step:.2g} s "
            f"at most ({pluralize(len(self.units), 'unit', 'units')}), each evaluated on "
            f"{pluralize(len(plan.sets), 'set', 'sets')}{plan.more(arms)}{memory}"
        )
