"""Training of layers adapted one at a time, and the gradient of every layer at BASE from one pass.

Handles the model and its layers; losses are interpreted elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_diag.errors import InputError
from lora_diag.linalg import decompose, norm
from lora_diag.models.activations import input_dimension
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, logits_of, nll, select_predictions
from lora_diag.models.methods import ALPHA_OVER_RANK, Lora
from lora_diag.models.opening import Model
from lora_diag.models.training import Cell, Training, losses_after
from lora_diag.probes.sensitivity.record import FirstOrder, Sensitivity
from lora_diag.records.names import depth_of, module_type_of, tower_of


@dataclass(frozen=True, slots=True)
class Unit:
    """The layers that are adapted together, without others.

    Args:
        name: Its name.
        layers: Its weights, by their names in BASE.
        modules: Its modules, by their paths in the model.
        sizes: out + in of each module.
    """

    name: str
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def kind(self) -> Lora:
        """LoRA on these modules only."""
        return Lora("|".join(map(re.escape, self.modules)))


def units_of(layers: Mapping[str, nn.Module], names: Mapping[str, str], per: str) -> list[Unit]:
    """Group linear layers into units.

    Args:
        layers: Layers by the names of their weights in the model.
        names: Names of the same weights in BASE.
        per: ``layer``; ``block`` for the layers of one depth; ``type`` for those of one module type.
    """
    groups: dict[str, list[str]] = {}
    for weight in layers:
        groups.setdefault(_unit_name(names[weight], per), []).append(weight)
    return [
        Unit(
            name,
            tuple(names[weight] for weight in weights),
            tuple(weight.removesuffix(".weight") for weight in weights),
            tuple(sum(shape_of(layers[weight])) for weight in weights),
        )
        for name, weights in groups.items()
    ]


def _unit_name(layer: str, per: str) -> str:
    if per == "layer":
        return layer
    depth = depth_of(layer)
    if per == "type" or depth is None:
        return module_type_of(layer)
    return ".".join((*tower_of(layer), str(depth)))


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Return ``(out, in)`` of a linear layer."""
    weight, inputs = layer.weight, input_dimension(layer)
    assert isinstance(weight, Tensor)
    return weight.numel() // inputs, inputs


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
    alone = replace(training, kind=replace(training.kind, targets=unit.kind.targets))
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
    train_loss: float = math.nan,
) -> Sensitivity:
    """Return the record of a run on one set; without a run, of BASE."""
    set_fields = losses.on(texts)
    if unit is None or cell is None or base is None:
        counts = tuple(int(count) for count in losses.counts)
        return Sensitivity(**set_fields, seed=0, loss=losses.mean, nll=losses.rounded, predictions=counts)
    is_finite = losses.is_finite
    gap, error = losses.minus(base) if is_finite else (None, None)
    return Sensitivity(
        **set_fields,
        unit=unit.name,
        layers=unit.layers,
        rank=cell.rank,
        params=(cell.rank or 0) * sum(unit.sizes),
        lr=cell.lr,
        seed=cell.seed,
        loss=losses.mean if is_finite else None,
        gain=None if gap is None else -gap,
        gain_error=error,
        train_loss=train_loss if math.isfinite(train_loss) else None,
        nll=losses.rounded if is_finite else (),
    )


def gradients(
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
        for first in range(0, len(texts.sequences), size):
            chosen = list(texts.sequences[first : first + size])
            logits = logits_of(model, chosen)
            pairs = [select_predictions(model, sequence, logits[i]) for i, sequence in enumerate(chosen)]
            torch.stack([nll(outputs, target) for outputs, target in pairs]).sum().backward()  # type: ignore[no-untyped-call]
            predictions += sum(len(target) for _, target in pairs)
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


def first_order(layer: str, gradient: Tensor, rank: int, texts: Texts) -> FirstOrder:
    r"""Return first-order predictions for a LoRA of a given rank from the gradient of one layer.

    ‖P_T G‖², the mean over A, with P_T the projection on the reach of a fresh adapter; Σ_{i≤r}σ_i², the reach of any
    adapter of this rank; and the mean decrease of the loss in Adam's first step, ‖s·G Aᵀ‖_1 with A uniform on ±1/√in,
    so of variance 1/(3·in), with sums of ``in`` terms approximated as normal.

    Args:
        layer: Its name.
        gradient: G, ``(out, in)``.
        rank: r, capped at min(out, in).
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
