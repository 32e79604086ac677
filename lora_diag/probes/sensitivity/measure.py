"""Layers adapted one at a time, and the gradient of every layer at BASE from one pass.

Knows the model and its layers; refuses to know what the losses mean.
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
from lora_diag.models.activations import inputs_of
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, counted, logits_of, nll
from lora_diag.models.methods import ALPHA_OVER_RANK, Lora
from lora_diag.models.opening import Model
from lora_diag.models.training import Cell, Training, losses_after
from lora_diag.probes.sensitivity.record import FirstOrder, Sensitivity
from lora_diag.records.names import depth_of, module_type_of, tower_of


@dataclass(frozen=True, slots=True)
class Unit:
    """What is adapted alone.

    Args:
        name: By which it is called.
        layers: Its weights, by their names in BASE.
        modules: Its modules, by their paths in the model.
        sizes: out + in of each.
    """

    name: str
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def kind(self) -> Lora:
        """LoRA on these modules and no others."""
        return Lora("|".join(map(re.escape, self.modules)))


def units_of(layers: Mapping[str, nn.Module], names: Mapping[str, str], per: str) -> list[Unit]:
    """Group linear layers into what is adapted alone.

    Args:
        layers: By the names of their weights in the model.
        names: The same weights' names in BASE.
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
    weight, inputs = layer.weight, inputs_of(layer)
    assert isinstance(weight, Tensor)
    return weight.numel() // inputs, inputs


def adapted_alone(
    model: Model,
    unit: Unit,
    cell: Cell,
    training: Training,
    sets: Sequence[Texts],
    bases: Mapping[str, Losses],
    after: Callable[[], None],
) -> list[Sensitivity]:
    """Train one unit alone and return what that gained, one record a set; without a loss where training diverged.

    Args:
        model: BASE; the same after as before.
        unit: What is adapted.
        cell: Rank, rate and seed.
        training: What all runs have in common.
        sets: Evaluation sets.
        bases: BASE's losses, by set.
        after: Called after every step and every batch.
    """
    alone = replace(training, kind=replace(training.kind, targets=unit.kind.targets))
    found, train_loss = losses_after(model, cell, alone, sets, after)
    return [
        record_of(each, losses, unit, cell, bases[each.name], train_loss)
        for each, losses in zip(sets, found, strict=True)
    ]


def record_of(
    texts: Texts,
    losses: Losses,
    unit: Unit | None = None,
    cell: Cell | None = None,
    base: Losses | None = None,
    train_loss: float = math.nan,
) -> Sensitivity:
    """Return the record of a run on one set; of BASE without a run."""
    same = losses.on(texts)
    if unit is None or cell is None or base is None:
        counts = tuple(int(count) for count in losses.counts)
        return Sensitivity(**same, seed=0, loss=losses.mean, nll=losses.rounded, predictions=counts)
    is_finite = losses.is_finite
    gap, error = losses.minus(base) if is_finite else (None, None)
    return Sensitivity(
        **same,
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
    """Return the gradient of the mean loss on a set by every weight, ``(out, in)``, summed up in float32 or better.

    Args:
        model: BASE; the same after as before.
        layers: By the names of their weights.
        texts: The set.
        size: Sequences in a batch.
        after: Called after every batch.

    Raises:
        InputError: It is not finite.
    """
    weights = {name: layer.weight for name, layer in layers.items() if isinstance(layer.weight, Tensor)}
    wide = torch.promote_types(next(iter(weights.values())).dtype, torch.float32)
    sums = {name: torch.zeros_like(weight, dtype=wide) for name, weight in weights.items()}
    predictions = 0
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for first in range(0, len(texts.sequences), size):
            chosen = list(texts.sequences[first : first + size])
            logits = logits_of(model, chosen)
            pairs = [counted(model, sequence, logits[i]) for i, sequence in enumerate(chosen)]
            torch.stack([nll(each, wanted) for each, wanted in pairs]).sum().backward()  # type: ignore[no-untyped-call]
            predictions += sum(len(wanted) for _, wanted in pairs)
            for name, weight in weights.items():
                if weight.grad is not None:
                    sums[name] += weight.grad
                    weight.grad = None
            after()
    finally:
        for weight in weights.values():
            weight.grad = None
        model.module.requires_grad_(False)
    found = {}
    for name, layer in layers.items():
        gradient = sums[name] / predictions
        if not torch.isfinite(gradient).all():
            raise InputError(f"{name}: its gradient is not finite: the weights are broken, or --dtype is too small")
        found[name] = gradient if isinstance(layer, nn.Linear) else gradient.T
    return found


def first_order(layer: str, gradient: Tensor, rank: int, texts: Texts) -> FirstOrder:
    r"""Return what the gradient of one layer says of a LoRA of some rank there.

    ‖P_T G‖² with P_T the projection on what a fresh adapter can reach, in the mean over A; Σ_{i≤r}σ_i² for what any
    adapter of that rank could; and the mean fall of the loss in Adam's first step, ‖s·G Aᵀ‖_1 with A uniform on
    ±1/√in, so of variance 1/(3·in), and sums of in terms taken as normal.

    Args:
        layer: Its name.
        gradient: G, ``(out, in)``.
        rank: r; no more than min(out, in) of it count.
        texts: What the gradient is of.
    """
    (out, inputs), fro = gradient.shape, norm([gradient])
    top = decompose(gradient.contiguous(), top=min(rank, out, inputs), fro=fro).s if fro else torch.zeros(1)
    rows = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float64).sum()
    return FirstOrder(
        layer=layer,
        shape=(out, inputs),
        rank=rank,
        gradient_fro=fro,
        top=float((top.double() ** 2).sum()),
        fresh=min(rank / inputs, 1.0) * fro**2,
        adam=rank * ALPHA_OVER_RANK * math.sqrt(2 / (3 * math.pi * inputs)) * float(rows),
        sequences=len(texts.sequences),
        data=texts.hash,
    )
