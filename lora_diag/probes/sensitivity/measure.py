"""``probe sensitivity``: measure the loss gain of adapting each layer alone, and the gradient of
every layer at BASE.

Handles the model and its layers; losses are interpreted elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from lora_diag.deltas import selector
from lora_diag.errors import InputError, NothingComparedError
from lora_diag.linalg.difference import norm
from lora_diag.linalg.methods import decompose
from lora_diag.models.activations import linear_layers, shape_of
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, measure, nll, predict
from lora_diag.models.opening import Model, Weights
from lora_diag.models.training import (
    ALPHA_OVER_RANK,
    Cell,
    TrainingSettings,
    layers_without_head,
    losses_after,
)
from lora_diag.probes.sensitivity import SensitivityOptions
from lora_diag.probes.sensitivity.gains import Gain, gains_of
from lora_diag.probes.sensitivity.record import FirstOrder, Sensitivity
from lora_diag.records import LeftOut, Results
from lora_diag.records.names import name_unit
from lora_diag.rendering.text import quantity
from lora_diag.running.options import show_options
from lora_diag.running.probing import SEQUENCES
from lora_diag.running.progress import RunRecords
from lora_diag.running.training_runs import Arm, TrainRun, Trial
from lora_diag.storage import Checkpoint, open_checkpoint

# Time of a step of LoRA on one unit, in forward passes of its batch; the mean over depths, to which
# gradients go back.
STEP_ALONE = 1.7
# Fraction of the blocks whose parts are measured, if their gains are significant.
PARTED = 0.25
# Reductions of a run with default options.
REDUCTIONS = (
    *SEQUENCES[:-2],
    ("by", "block"),
    ("widen", 0),
    ("lr", (1e-2,)),
    ("steps", 25),
    ("steps", 10),
)
REDUCTIONS += (SEQUENCES[-2], ("steps", 5), SEQUENCES[-1], ("steps", 3))


@dataclass(frozen=True, slots=True)
class SensitivityUnit:
    """The layers that are adapted together, without others.

    Args:
        name: Name of the unit.
        layers: Names of its weights in BASE.
        targets: Regular expression for its modules in the model, as PEFT takes it.
        size: Σ(out + in) of its modules.
    """

    name: str
    layers: tuple[str, ...]
    targets: str
    size: int


def units_of(
    layers: Mapping[str, nn.Module], base_names: Mapping[str, str], per: str
) -> list[SensitivityUnit]:
    """Return linear layers grouped into units, in the order of their first layers.

    Args:
        layers: Layers by the names of their weights in the model.
        base_names: Names of the same weights in BASE, by those in the model.
        per: ``layer``; ``block`` for the layers of one depth, ``part`` for its attention, MLP and
            so on; ``type`` for those of one module type.
    """
    groups: dict[str, list[str]] = {}
    for weight in layers:
        groups.setdefault(name_unit(base_names[weight], per), []).append(weight)
    return [
        SensitivityUnit(
            name,
            tuple(base_names[weight] for weight in weights),
            "|".join(re.escape(weight.removesuffix(".weight")) for weight in weights),
            sum(sum(shape_of(layers[weight])) for weight in weights),
        )
        for name, weights in groups.items()
    ]


def _make_trial(
    model: Model,
    unit: SensitivityUnit,
    bases: Mapping[str, Losses],
    rank: int | None,
    lr: float,
    seed: int,
) -> Trial:
    """Return the run of one unit, whose records have no loss if training diverged.

    Args:
        model: BASE; unchanged afterwards.
        unit: The adapted unit.
        bases: BASE's losses by set, filled before the unit is trained.
        rank: r.
        lr: Peak learning rate.
        seed: Seed of the run.
    """
    cell = Cell(rank, lr, seed)
    fields = {"unit": unit.name, "rank": rank, "lr": lr, "seed": seed}

    def train_alone(
        training: TrainingSettings, sets: Sequence[Texts], after: Callable[[], None]
    ) -> list[Sensitivity]:
        alone = replace(training, kind=replace(training.kind, targets=unit.targets))
        by_set, train_loss = losses_after(model, cell, alone, sets, after)
        records = []
        for texts, losses in zip(sets, by_set, strict=True):
            own = losses.fields_of_run(texts, train_loss) | losses.by_sequence(is_base=False)
            if losses.is_finite:
                gap, own["gain_error"] = losses.minus(bases[texts.name])
                own["gain"] = -gap
            params = (rank or 0) * unit.size
            records.append(Sensitivity(**own, **fields, layers=unit.layers, params=params))
        return records

    return Trial({"record": "sensitivity", **fields}, f"{unit.name} {cell.label}", train_alone)


def _record_base(texts: Texts, losses: Losses) -> Sensitivity:
    """Return the record of BASE on one set."""
    return Sensitivity(
        **losses.fields_of_run(texts, None)
        | losses.by_sequence(is_base=True)
        | {"loss": losses.mean}
    )


def compute_gradients(
    model: Model,
    layers: Mapping[str, nn.Module],
    texts: Texts,
    size: int,
    after: Callable[[], None],
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss on a set for every weight, ``(out, in)``, summed in
    float32 or better.

    Args:
        model: BASE; unchanged afterwards.
        layers: Layers by the names of their weights.
        texts: The set.
        size: Sequences in a batch.
        after: Called after every batch.

    Raises:
        InputError: A gradient is not finite.
    """
    weights = {
        name: layer.weight for name, layer in layers.items() if isinstance(layer.weight, Tensor)
    }
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
            raise InputError(
                name, "the gradient is not finite", "check the weights, or use $dtype float32"
            )
        by_layer[name] = gradient if isinstance(layer, nn.Linear) else gradient.T
    return by_layer


def predict_first_order(layer: str, gradient: Tensor, rank: int, texts: Texts) -> FirstOrder:
    r"""Return first-order predictions for a LoRA of a given rank from the gradient of one layer.

    The mean over A of ‖P_T G‖², with P_T the projection on the updates that a fresh adapter can
    reach; Σ_{i≤r}σ_i², the maximum of that for any matrix of this rank; and the mean over A of the
    decrease of the loss per unit of learning rate in Adam's first step, ‖s·G Aᵀ‖_1, with the
    entries of A uniform on [−1/√in, 1/√in], so of variance 1/(3·in), and sums of ``in`` terms
    approximated as normal.

    Args:
        layer: Name of the layer in BASE.
        gradient: G, ``(out, in)``.
        rank: r. ``top`` has at most min(out, in) terms, ``fresh`` is at most ‖G‖²; ``adam`` grows
            with any r.
        texts: Text of the gradient.
    """
    (out, inputs), fro = gradient.shape, norm([gradient])
    top = torch.zeros(1)
    if fro:
        top = decompose(gradient.contiguous(), top=min(rank, out, inputs), fro=fro).s
    # (G Aᵀ)_ij is a sum of ``in`` terms, so about normal with variance ‖g_i‖²/(3·in), g_i the rows
    # of G; E|x| = √(2/π) of its deviation, for each of the r columns.
    row_norms = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64).sum()
    expected = math.sqrt(2 / (3 * math.pi * inputs)) * float(row_norms)
    return FirstOrder(
        layer=layer,
        shape=(out, inputs),
        rank=rank,
        gradient_fro=fro,
        top=float((top.double() ** 2).sum()),
        # A projects on a random space of r of ``in`` dimensions.
        fresh=min(rank / inputs, 1.0) * fro**2,
        adam=rank * ALPHA_OVER_RANK * expected,
        sequences=len(texts.sequences),
        data=texts.hash,
    )


@show_options
def probe_sensitivity(base: Path | str, **options: Unpack[SensitivityOptions]) -> Results[Any]:
    r"""Train a LoRA on each layer or unit alone, on the same batches in the same order, and measure
    L(BASE) − L.

    First the gradient of every adapted layer at BASE is computed in one pass, for cheap first-order
    scores. Then each unit is adapted alone at every rate with the first seed, and at the rate of
    its lowest loss on the first evaluation set with the other seeds.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        data: Training text, JSONL or data set.
        eval: Held-out files of the same distribution; the first decides on the learning rate.
        shifted: Files of another distribution.
        rank: Rank r.
        delta: δ: also train at r + δ, for the marginal gain L_ℓ(r) − L_ℓ(r + δ).
        by: Unit of adaptation: each ``layer``, the layers of a ``block``, or of a module
            ``type``.
        lr: Peak learning rates.
        steps: Number of updates of a run.
        repeats: Number of runs of each unit at its best rate; they differ in the initial factors.
        **options: ``SensitivityOptions``.

    Returns:
        The records are in ``whole``: a ``FirstOrder`` for every adapted layer, then
            ``Sensitivity``: BASE's losses,
        and those of every run, on each set.

    Raises:
        UsageError: An option is invalid, BASE is an adapter, the training text is also an
            evaluation set, the output can be neither replaced nor resumed, or the extra ``train``,
            or ``datasets`` for a data set, is not installed.
        InputError: An input cannot be read or the output written, the model cannot be opened or
            adapted, or its loss or a gradient is not finite.
        NothingComparedError: No linear layer is selected.

    Example:
        >>> found = probe_sensitivity(
        ...     "sample_checkpoints/base",  # doctest: +SKIP
        ...     data="train.txt",
        ...     eval=["held_out.txt"],
        ...     by="type",
        ...     steps=50,
        ... )
        >>> {record.record for record in found.whole}  # doctest: +SKIP
    """
    run = TrainRun("probe sensitivity", options, SensitivityOptions)
    rank, delta = run.options["rank"], run.options["delta"]
    run.check_files(base)
    selected = selector(**run.selection)
    stored = open_checkpoint(base)
    model = run.open(base)
    run.read_all()
    base_names, left_out = _choose_layers(model, stored, selected)
    linear = {
        name: layer for name, layer in linear_layers(model.module).items() if name in base_names
    }
    ranks = (rank, rank + delta) if delta is not None else (rank,)

    def count_tokens() -> float:
        units = len(units_of(linear, base_names, run.options["by"])) * (
            1 + 2 * PARTED * ("by" in run.reduced)
        )
        return run.count_train_tokens(units * len(ranks), run.options["lr"], STEP_ALONE)

    run.fit_runs(count_tokens, REDUCTIONS)
    units = units_of(linear, base_names, run.options["by"])
    parts = units_of(linear, base_names, "part")
    parted = math.ceil(PARTED * len(units)) if "by" in run.reduced else 0
    if parted:
        run.reduced["by"] += f" and the parts of {quantity(parted, 'block')}"
    settings = _make_settings(run)

    def measure_missing(run_records: RunRecords[Any]) -> list[LeftOut]:
        plan = run.plan_runs(run_records)
        bases: dict[str, Losses] = {}
        make_arms = partial(_make_arms, model, ranks, tuple(settings["lr"]), bases)
        arms = make_arms(units)
        texts, first_batch = run.training.used_texts, run.sets[0].first(run.batch)
        has_scores = any(isinstance(record, FirstOrder) for record in run_records.records)
        passes = 0 if has_scores else texts.count_batches(run.batch)
        shapes = map(shape_of, layers_without_head(model.module).values())
        entries = sum(map(math.prod, shapes))
        bases[first_batch.name] = measure(model, first_batch, run.batch)
        # The first unit, which has the longest backward pass, is timed at the highest rank.
        timed_first = [arms[len(ranks) - 1], *arms[: len(ranks) - 1], *arms[len(ranks) :]]
        description = f"of LoRA on {quantity(len(units), 'unit')} alone"
        timed_first += make_arms(_list_parts(units[:parted], parts))  # to count the runs
        plan.report_cost({description: timed_first}, 1, 4 * entries if passes else 0, passes)
        if passes:
            run_records.put(*_score_layers(run, model, linear, base_names))
        # BASE is measured again after an interruption, because errors need its losses by sequence.
        for held_out in run.sets:
            after = partial(run.watch.batch, "BASE")
            bases[held_out.name] = measure(model, held_out, run.batch, after)
        run_records.put(*(_record_base(held_out, bases[held_out.name]) for held_out in run.sets))
        for arm in arms:
            plan.run(arm)
        clear = _rank_clear_gains(run, run_records.records)
        for arm in make_arms(_list_parts(clear[:parted], parts)):
            plan.run(arm)
        return left_out

    return run.over(run.inputs(stored), settings, measure_missing)


def _make_settings(run: TrainRun[SensitivityOptions]) -> dict[str, Any]:
    """Return the settings for the run record."""
    return {
        **run.settings("by", "rank", "delta"),
        "lr": sorted(set(run.options["lr"])),
        **run.training_settings(),
        **run.selection,
        "kind": run.training.kind.description,
    }


def _score_layers(
    run: TrainRun[SensitivityOptions],
    model: Model,
    linear: Mapping[str, nn.Module],
    base_names: Mapping[str, str],
) -> list[FirstOrder]:
    """Return the first-order scores of the layers, from their gradients at BASE."""
    texts, after = run.training.used_texts, partial(run.watch.batch, "gradient")
    gradients = compute_gradients(model, linear, texts, run.batch, after)
    return [
        predict_first_order(base_names[name], gradient, run.options["rank"], texts)
        for name, gradient in gradients.items()
    ]


def _make_arms(
    model: Model,
    ranks: Sequence[int],
    rates: tuple[float, ...],
    bases: Mapping[str, Losses],
    units: Sequence[SensitivityUnit],
) -> list[Arm]:
    """Return the runs of each unit alone, at each rank."""
    arms = []
    for unit in units:
        make_trial = partial(_make_trial, model, unit, bases)
        arms += [Arm((rank,), rates, make_trial) for rank in ranks]
    return arms


def _rank_clear_gains(run: TrainRun[SensitivityOptions], records: Iterable[Any]) -> list[Gain]:
    """Return the significant gains of undivided units on the first evaluation set, largest
    first.
    """
    own = run.sets[0].name
    runs = [record for record in records if isinstance(record, Sensitivity)]
    gains = gains_of(runs, own, own, run.options["rank"], run.options["seed"])
    clear = [gain for gain in Gain.undivided(gains) if gain.is_clear]
    return sorted(clear, key=lambda gain: -abs(gain.gain))


def _list_parts(
    blocks: Sequence[SensitivityUnit | Gain], parts: Sequence[SensitivityUnit]
) -> list[SensitivityUnit]:
    """Return the parts of blocks: units with some of the layers of one of them."""
    return [part for part in parts for block in blocks if {*part.layers} < {*block.layers}]


def _choose_layers(
    model: Model, stored: Checkpoint, selected: Callable[[str], bool]
) -> tuple[dict[str, str], list[LeftOut]]:
    """Return the names in BASE of the linear layers to adapt, by their names in the model; and the
    skipped layers.

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
        left_out.append(
            LeftOut(layer=base_name, shape=shape_of(layer), reason="not_selected", detail=detail)
        )
    if not base_names:
        raise NothingComparedError(
            stored.path,
            "no linear layer is selected, so there is nothing to adapt",
            "change $layers or $exclude",
        )
    return base_names, left_out
