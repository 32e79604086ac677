"""``probe sensitivity``: measure the loss gain of adapting each layer alone, and the gradient of every layer at BASE.

Handles the model and its layers; losses are interpreted elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from lora_diag.checkpoints import Checkpoint, open_checkpoint
from lora_diag.deltas import selector
from lora_diag.errors import InputError, NothingComparedError
from lora_diag.linalg.difference import norm
from lora_diag.linalg.methods import decompose
from lora_diag.models.activations import linear_layers, shape_of
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, measure, nll, predict
from lora_diag.models.opening import Model, Weights
from lora_diag.models.training import ALPHA_OVER_RANK, RECIPE, Cell, Training, layers_without_head, losses_after
from lora_diag.probes.sensitivity import SensitivityOptions
from lora_diag.probes.sensitivity.record import FirstOrder, Sensitivity
from lora_diag.records import LeftOut, Results
from lora_diag.records.names import depth_of, module_type_of, tower_of
from lora_diag.rendering.text import duration
from lora_diag.running.options import show_options
from lora_diag.running.probing import pluralize
from lora_diag.running.progress import RunRecords
from lora_diag.running.training_runs import Arm, RunPlan, TrainRun, Trial


@dataclass(frozen=True, slots=True)
class Unit:
    """The layers that are adapted together, without others.

    Args:
        name: Name of the unit.
        layers: Names of its weights in BASE.
        modules: Paths of its modules in the model.
        sizes: out + in of each module.
    """

    name: str
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def targets(self) -> str:
        """Regular expression for the modules, as PEFT takes it."""
        return "|".join(map(re.escape, self.modules))


def units_of(layers: Mapping[str, nn.Module], base_names: Mapping[str, str], per: str) -> list[Unit]:
    """Group linear layers into units.

    Args:
        layers: Layers by the names of their weights in the model.
        base_names: Names of the same weights in BASE, by those in the model.
        per: ``layer``; ``block`` for the layers of one depth; ``type`` for those of one module type.
    """
    groups: dict[str, list[str]] = {}
    for weight in layers:
        groups.setdefault(_name_unit(base_names[weight], per), []).append(weight)
    return [
        Unit(
            name,
            tuple(base_names[weight] for weight in weights),
            tuple(weight.removesuffix(".weight") for weight in weights),
            tuple(sum(shape_of(layers[weight])) for weight in weights),
        )
        for name, weights in groups.items()
    ]


def _name_unit(layer: str, per: str) -> str:
    """Return the name of a layer's unit; a layer outside the blocks belongs to its module type, not to a ``block``."""
    if per == "layer":
        return layer
    depth = depth_of(layer)
    if per == "type" or depth is None:
        return module_type_of(layer)
    return ".".join((*tower_of(layer), str(depth)))


def train_alone(
    model: Model,
    unit: Unit,
    cell: Cell,
    training: Training,
    sets: Sequence[Texts],
    bases: Mapping[str, Losses],
    after: Callable[[], None],
) -> list[Sensitivity]:
    """Train one unit alone and return one record per set with its gain; without a loss if training diverged.

    Args:
        model: BASE; unchanged afterwards.
        unit: The adapted unit.
        cell: Rank, rate and seed.
        training: Settings shared by all runs.
        sets: Evaluation sets.
        bases: BASE's losses, by set.
        after: Called after every step and every batch.
    """
    alone = replace(training, kind=replace(training.kind, targets=unit.targets))
    by_set, train_loss = losses_after(model, cell, alone, sets, after)
    return [
        record_of(texts, losses, unit, cell, bases[texts.name], train_loss)
        for texts, losses in zip(sets, by_set, strict=True)
    ]


def record_of(
    texts: Texts,
    losses: Losses,
    unit: Unit | None = None,
    cell: Cell | None = None,
    base: Losses | None = None,
    train_loss: float | None = None,
) -> Sensitivity:
    """Return the record of a run on one set; without a run, of BASE.

    Raises:
        InputError: The loss of BASE is not finite.
    """
    fields = losses.fields_of_run(texts, train_loss) | losses.by_sequence(is_base=unit is None)
    if unit is None or cell is None or base is None:
        return Sensitivity(**fields | {"loss": losses.mean}, seed=0)
    gap, error = losses.minus(base) if losses.is_finite else (None, None)
    return Sensitivity(
        **fields,
        unit=unit.name,
        layers=unit.layers,
        rank=cell.rank,
        params=(cell.rank or 0) * sum(unit.sizes),
        lr=cell.lr,
        seed=cell.seed,
        gain=None if gap is None else -gap,
        gain_error=error,
    )


def compute_gradients(
    model: Model, layers: Mapping[str, nn.Module], texts: Texts, size: int, after: Callable[[], None]
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss on a set for every weight, ``(out, in)``, summed in float32 or better.

    Args:
        model: BASE; unchanged afterwards.
        layers: Layers by the names of their weights.
        texts: The set.
        size: Sequences in a batch.
        after: Called after every batch.

    Raises:
        InputError: A gradient is not finite.
    """
    weights = {name: layer.weight for name, layer in layers.items() if isinstance(layer.weight, Tensor)}
    dtype = torch.promote_types(next(iter(weights.values())).dtype, torch.float32)
    sums = {name: torch.zeros_like(weight, dtype=dtype) for name, weight in weights.items()}
    predictions = 0
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for sequences in texts.batches(size):
            logits, labels = predict(model, sequences)
            torch.stack(list(map(nll, logits, labels))).sum().backward()  # type: ignore[no-untyped-call]
            predictions += sum(map(len, labels))
            for name, weight in weights.items():
                if weight.grad is not None:
                    sums[name] += weight.grad
                    weight.grad = None
            after()
    finally:
        for weight in weights.values():
            weight.grad = None
        model.module.requires_grad_(False)
    by_layer = {}
    for name, layer in layers.items():
        gradient = sums[name] / predictions
        if not torch.isfinite(gradient).all():
            raise InputError(f"{name}: the gradient is not finite; check the weights, or use --dtype float32")
        by_layer[name] = gradient if isinstance(layer, nn.Linear) else gradient.T
    return by_layer


def predict_first_order(layer: str, gradient: Tensor, rank: int, texts: Texts) -> FirstOrder:
    r"""Return first-order predictions for a LoRA of a given rank from the gradient of one layer.

    The mean over A of ‖P_T G‖², with P_T the projection on the updates that a fresh adapter can reach; Σ_{i≤r}σ_i², the
    maximum of that for any matrix of this rank; and the mean over A of the decrease of the loss per unit of learning
    rate in Adam's first step, ‖s·G Aᵀ‖_1, with the entries of A uniform on [−1/√in, 1/√in], so of variance 1/(3·in),
    and sums of ``in`` terms approximated as normal.

    Args:
        layer: Name of the layer in BASE.
        gradient: G, ``(out, in)``.
        rank: r. ``top`` has at most min(out, in) terms, ``fresh`` is at most ‖G‖²; ``adam`` grows with any r.
        texts: Text of the gradient.
    """
    (out, inputs), fro = gradient.shape, norm([gradient])
    top = decompose(gradient.contiguous(), top=min(rank, out, inputs), fro=fro).s if fro else torch.zeros(1)
    row_norms = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64).sum()
    return FirstOrder(
        layer=layer,
        shape=(out, inputs),
        rank=rank,
        gradient_fro=fro,
        top=float((top.double() ** 2).sum()),
        fresh=min(rank / inputs, 1.0) * fro**2,
        adam=rank * ALPHA_OVER_RANK * math.sqrt(2 / (3 * math.pi * inputs)) * float(row_norms),
        sequences=len(texts.sequences),
        data=texts.hash,
    )


@show_options
def probe_sensitivity(base: Path | str, **options: Unpack[SensitivityOptions]) -> Results[Any]:
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
        per: Unit of adaptation: each ``layer``, the layers of a ``block``, or of a module ``type``.
        rates: Peak learning rates.
        steps: Number of updates of a run.
        seeds: Number of runs of each unit at its best rate; they differ in the initial factors.
        **options: ``SensitivityOptions``.

    Returns:
        The records are in ``whole``: a ``FirstOrder`` for every layer, then ``Sensitivity``: BASE's losses, and those
        of every run, on each set.

    Raises:
        UsageError: An option is invalid, the training text is also an evaluation set, or the extra ``train`` is
            missing.
        InputError: An input cannot be read, or the model cannot be opened or adapted.
        NothingComparedError: No linear layer is selected.

    Example:
        >>> found = probe_sensitivity("sample_checkpoints/base",  # doctest: +SKIP
        ...     data="train.txt", evaluate=["held_out.txt"], per="type", steps=50)
        >>> {record.record for record in found.whole}  # doctest: +SKIP
    """
    run = TrainRun("probe sensitivity", options, SensitivityOptions)
    rank, delta, per = run.options.rank, run.options.delta, run.options.per
    run.check_files(base)
    selected = selector(**run.selection)
    stored = open_checkpoint(base)
    model = run.open(base)
    run.read_all()
    base_names, left_out = _choose_layers(model, stored, selected)
    linear = {name: layer for name, layer in linear_layers(model.module).items() if name in base_names}
    settings = {
        **run.settings("per", "rank", "delta"),
        "rates": sorted(set(run.options.rates)),
        **run.training_settings(),
        **run.selection,
        "kind": run.training.kind.description,
        "optimizer": RECIPE,
    }

    def measure_missing(run_records: RunRecords[Any]) -> list[LeftOut]:
        ranks = (rank, rank + delta) if delta is not None else (rank,)
        plan = run.plan_runs(run_records)
        probe = _Probe(model, units_of(linear, base_names, per), ranks, tuple(settings["rates"]), plan)
        probe.report_cost()
        probe.put_scores(linear, base_names)
        bases = probe.measure_base()
        for arm in probe.list_arms(bases):
            plan.run(arm)
        return left_out

    return run.over(run.inputs(stored), settings, measure_missing)


def _choose_layers(
    model: Model, stored: Checkpoint, selected: Callable[[str], bool]
) -> tuple[dict[str, str], list[LeftOut]]:
    """Return the names in BASE of the linear layers to adapt, by their names in the model; and the skipped layers.

    Raises:
        NothingComparedError: No linear layer is selected.
    """
    without_head = layers_without_head(model.module)
    stored_names = Weights(model.module).base_names(stored)
    base_names: dict[str, str] = {}
    left_out = []
    for name, layer in linear_layers(model.module).items():
        base_name = stored_names.get(name, name)
        if name in without_head and name in stored_names and selected(base_name):
            base_names[name] = base_name
            continue
        detail = "the head is not adapted" if name not in without_head else "was not selected"
        if name not in stored_names:
            detail = "not stored under a name of its own in BASE (tied)"
        left_out.append(LeftOut(layer=base_name, shape=shape_of(layer), reason="not_selected", detail=detail))
    if not base_names:
        raise NothingComparedError(
            f"{stored.path}: no linear layer is selected, so there is nothing to adapt; change --layers or --exclude"
        )
    return base_names, left_out


@dataclass(frozen=True, slots=True)
class _Probe:
    """What the measurements of a run share.

    Args:
        model: BASE.
        units: The units, in the order of the model.
        ranks: The trained ranks, ascending.
        rates: The peak learning rates, ascending.
        plan: The sequence of runs, and the records.
    """

    model: Model
    units: Sequence[Unit]
    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    plan: RunPlan

    def list_arms(self, bases: Mapping[str, Losses]) -> list[Arm]:
        """Return each unit at each rank, at every rate; gains are over ``bases``, the losses of BASE by set."""
        trials = [partial(self._make_trial, unit, bases) for unit in self.units]
        return [Arm((rank,), self.rates, make_trial) for make_trial in trials for rank in self.ranks]

    def _make_trial(self, unit: Unit, bases: Mapping[str, Losses], rank: int | None, lr: float, seed: int) -> Trial:
        cell = Cell(rank, lr, seed)
        fields = {"record": "sensitivity", "unit": unit.name, "rank": rank, "lr": lr, "seed": seed}

        def train(training: Training, sets: Sequence[Texts], after: Callable[[], None]) -> list[Sensitivity]:
            return train_alone(self.model, unit, cell, training, sets, bases, after)

        return Trial(fields, f"{unit.name} {cell.label}", train)

    def put_scores(self, layers: Mapping[str, Any], base_names: Mapping[str, str]) -> None:
        """Record first-order scores of every layer from its gradient at BASE, unless the file has them."""
        if self._has_scores():
            return
        texts, plan = self.plan.training.used_texts, self.plan
        after = partial(plan.watch.batch, "gradient")
        by_layer = compute_gradients(self.model, layers, texts, plan.training.batch, after)
        rank = self.ranks[0]
        plan.kept.put(
            *(predict_first_order(base_names[name], gradient, rank, texts) for name, gradient in by_layer.items())
        )

    def measure_base(self) -> dict[str, Losses]:
        """Measure and record BASE, and return its losses by set.

        This is repeated after an interruption, because errors need its losses by sequence.
        """
        plan = self.plan
        after = partial(plan.watch.batch, "BASE")
        bases = {texts.name: measure(self.model, texts, plan.training.batch, after) for texts in plan.sets}
        plan.kept.put(*(record_of(texts, bases[texts.name]) for texts in plan.sets))
        return bases

    def _has_scores(self) -> bool:
        return any(isinstance(record, FirstOrder) for record in self.plan.kept.records)

    def report_cost(self) -> None:
        """Time one step of the first unit, which has the longest backward pass, and report the estimated cost."""
        plan, steps = self.plan, self.plan.training.steps
        first = plan.sets[0].first(plan.training.batch)
        arms = self.list_arms({first.name: measure(self.model, first, plan.training.batch)})
        step, evaluation = plan.time_step(arms[len(self.ranks) - 1])  # the first unit at the highest rank
        runs = sum(map(plan.count_unfinished, arms))
        passes = 0 if self._has_scores() else plan.training.used_texts.count_batches(plan.training.batch)
        plan.watch.total = plan.batches + passes
        plan.expect(runs)
        seconds = (runs * steps + passes) * step + (runs + 1) * plan.batches * evaluation
        entries = sum(math.prod(shape_of(layer)) for layer in layers_without_head(self.model.module).values())
        memory = f"; the gradients take {4 * entries / 2**30:.1f} GiB" if passes and 4 * entries >= 2**30 / 10 else ""
        plan.watch.note(
            f"about {duration(seconds)}: {pluralize(runs, 'run', 'runs')} of {steps} steps of {step:.2g} s "
            f"at most ({pluralize(len(self.units), 'unit', 'units')}), each evaluated on "
            f"{pluralize(len(plan.sets), 'set', 'sets')}{plan.describe_more_runs(arms)}{memory}"
        )
