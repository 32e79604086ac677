"""LoRA trained at several ranks, learning rates and seeds on the same batches in the same order, for as many steps.

A run is a cell: rank, peak learning rate, seed of the factors. BASE is never changed: PEFT's factors come and go.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_diag.errors import InputError, UsageError
from lora_diag.results import Probe
from lora_diag.training.data import Sequence as Tokens
from lora_diag.training.data import Texts
from lora_diag.training.losses import Losses, counted, logits_of, measure, nll
from lora_diag.training.models import Model

# Share of the steps over which the learning rate rises; it then falls to zero along a cosine.
WARMUP = 0.05
CLIP_NORM = 1.0
ALPHA_OVER_RANK = 2


@dataclass(frozen=True, slots=True)
class Cell:
    """One run.

    Args:
        rank: r of every factor pair.
        lr: Peak learning rate.
        seed: Of the factors' initial values, and of dropout where BASE has some.
    """

    rank: int
    lr: float
    seed: int

    @property
    def fields(self) -> dict[str, Any]:
        """By which its records are told from others."""
        return {"subject": "lora", "rank": self.rank, "lr": self.lr, "seed": self.seed}


@dataclass(frozen=True)
class Training:
    """What all cells have in common.

    Args:
        texts: What is trained on.
        steps: Updates of a run.
        batch: Sequences of an update.
        order: Seed of the order in which sequences are taken; each once before any comes again.
        targets: Names of modules, as PEFT takes them; None for all linear layers but the head.
    """

    texts: Texts
    steps: int
    batch: int
    order: int
    targets: tuple[str, ...] | None = None

    def batches(self) -> Iterator[list[Tokens]]:
        """Yield the batch of every step, the same at every call."""
        generator = torch.Generator().manual_seed(self.order)
        pool: list[int] = []
        for _ in range(self.steps):
            while len(pool) < self.batch:
                pool += torch.randperm(len(self.texts.sequences), generator=generator).tolist()
            chosen, pool = pool[: self.batch], pool[self.batch :]
            yield [self.texts.sequences[i] for i in chosen]


def rate_at(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of an update, counted from 0: linear warm-up, then a cosine to zero.

    >>> [round(rate_at(step, 4, 1.0), 3) for step in range(4)]
    [1.0, 0.75, 0.25, 0.0]
    """
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / max(1, steps - warmup)))


def run_cell(
    model: Model, cell: Cell, training: Training, sets: Sequence[Texts], size: int, after: Callable[[], None]
) -> list[Probe]:
    """Train one LoRA and return its losses, one record a set; without a loss where training diverged.

    Args:
        model: BASE; the same after as before.
        cell: The run.
        training: What all runs have in common.
        sets: Evaluation sets.
        size: Sequences in a batch of an evaluation.
        after: Called after every step and every batch.
    """
    torch.manual_seed(cell.seed)
    wrapped = with_lora(model, cell.rank, training.targets)
    tuned = replace(model, module=wrapped)
    try:
        path = train(tuned, cell, training, after)
        wrapped.eval()
        found = [measure(tuned, each, size, after) for each in sets]
    finally:
        wrapped.unload()
        model.module.eval().requires_grad_(False)
    last = path[-max(1, len(path) // 10) :]
    train_loss = sum(last) / len(last)
    return [record_of(each, losses, cell, train_loss) for each, losses in zip(sets, found, strict=True)]


def with_lora(model: Model, rank: int, targets: tuple[str, ...] | None) -> Any:
    """Return BASE with fresh LoRA factors, alpha = 2r, on the layers that are adapted.

    Raises:
        UsageError: peft is not installed.
        InputError: PEFT finds no such module.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError(f"probe sweep: needs {error.name}: pip install 'loradiag[train]'") from error
    transposed = any(type(layer).__name__ == "Conv1D" for layer in model.module.modules())
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=ALPHA_OVER_RANK * rank,
        lora_dropout=0.0,
        target_modules=list(targets) if targets else "all-linear",
        fan_in_fan_out=transposed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return peft.get_peft_model(model.module, config)
        except ValueError as error:
            raise InputError(f"--target: PEFT cannot adapt this model: {error}") from error


def train(model: Model, cell: Cell, training: Training, after: Callable[[], None]) -> list[float]:
    """Train the parameters that can be, and return the loss of every step; ends where it is not finite."""
    parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    model.module.train()
    path: list[float] = []
    for step, batch in enumerate(training.batches()):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, training.steps, cell.lr)
        optimizer.zero_grad()
        loss = mean_loss(model, batch)
        path.append(float(loss.detach()))
        if math.isfinite(path[-1]):
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()
        after()
    return path


def mean_loss(model: Model, batch: list[Tokens]) -> Tensor:
    """Return the mean negative log-likelihood over the predictions of a batch."""
    logits = logits_of(model, batch)
    pairs = [counted(model, sequence, logits[i]) for i, sequence in enumerate(batch)]
    total = torch.stack([nll(each, wanted) for each, wanted in pairs]).sum()
    return total / sum(len(wanted) for _, wanted in pairs)


def record_of(texts: Texts, losses: Losses, cell: Cell | None = None, train_loss: float | None = None) -> Probe:
    """Return the record of a run on one set; of BASE without a run."""
    trained = train_loss if train_loss is not None and math.isfinite(train_loss) else None
    return Probe(
        probe="sweep",
        set=texts.name,
        shifted=texts.shifted,
        subject="lora" if cell else "base",
        rank=cell.rank if cell else None,
        lr=cell.lr if cell else None,
        seed=cell.seed if cell else 0,
        tokens=losses.tokens,
        data=texts.hash,
        loss=losses.mean if losses.is_finite else None,
        train_loss=trained,
    )
