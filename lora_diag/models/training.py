"""Training runs with the same batches in the same order and number of steps: LoRA at some rank, or a reference line.

A run is a cell: method, rank, peak learning rate, seed. BASE is restored after every run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_diag.models.data import Sequence as Tokens
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, logits_of, measure, nll, select_predictions
from lora_diag.models.methods import Lora, add_lora, checkpoint_activations, train_in_place
from lora_diag.models.opening import Model
from lora_diag.records import Probe
from lora_diag.records.probe import Subject

# Fraction of the steps over which the learning rate rises; it then decreases to zero along a cosine.
WARMUP = 0.05
CLIP_NORM = 1.0
# Description of these settings in a run record.
RECIPE = f"AdamW, no weight decay, gradient norm {CLIP_NORM:g}, warm-up {WARMUP:g}, cosine to 0"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run.

    Args:
        rank: r of every factor pair; None for ``full`` and ``bitfit``.
        lr: Peak learning rate.
        seed: Seed of the initial factors, and of dropout if BASE has it.
        subject: Method: the factors (``lora``), all of BASE (``full``), its biases and norms (``bitfit``).
    """

    rank: int | None
    lr: float
    seed: int
    subject: Subject = "lora"

    @property
    def fields(self) -> dict[str, Any]:
        """Fields that identify its records."""
        return {"subject": self.subject, "rank": self.rank, "lr": self.lr, "seed": self.seed}

    @property
    def label(self) -> str:
        """Label of the run."""
        subject = self.subject if self.rank is None else f"r={self.rank}"
        return f"{subject} lr={self.lr:g} seed {self.seed}"


@dataclass(frozen=True)
class Training:
    """Settings shared by all cells.

    Args:
        texts: The training text.
        steps: Number of updates of a run.
        batch: Sequences per update.
        order: Seed of the order of sequences; each is used once before any is repeated.
        kind: Kind of LoRA.
        decay: Weight decay of AdamW.
        checkpointing: Whether activations are recomputed in the backward pass.
    """

    texts: Texts
    steps: int
    batch: int
    order: int
    kind: Lora = field(default_factory=Lora)
    decay: float = 0.0
    checkpointing: bool = False

    @property
    def order_hash(self) -> str:
        """16 hex digits of the SHA-256 of the order: positions in the file of every step's sequences."""
        return hashlib.sha256(repr(list(self._locate_batches())).encode()).hexdigest()[:16]

    def batches(self) -> Iterator[list[Tokens]]:
        """Yield the batch of every step, the same in every call."""
        for places in self._locate_batches():
            yield [self.texts.sequences[place] for place in places]

    def _locate_batches(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.order)
        pool: list[int] = []
        for _ in range(self.steps):
            while len(pool) < self.batch:
                pool += torch.randperm(len(self.texts.sequences), generator=generator).tolist()
            chosen, pool = pool[: self.batch], pool[self.batch :]
            yield chosen


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
    model: Model, cell: Cell, training: Training, sets: Sequence[Texts], after: Callable[[], None]
) -> list[Probe]:
    """Train one cell and return one record per set; without a loss if training diverged.

    Args:
        model: BASE; unchanged afterwards.
        cell: The run.
        training: Settings shared by all runs.
        sets: Evaluation sets, in batches of the size of training.
        after: Called after every step and every batch.
    """
    by_set, train_loss = losses_after(model, cell, training, sets, after)
    return [record_of(texts, losses, cell, train_loss) for texts, losses in zip(sets, by_set, strict=True)]


def losses_after(
    model: Model,
    cell: Cell,
    training: Training,
    sets: Sequence[Texts],
    after: Callable[[], None],
    keep: Callable[[Model], None] = lambda tuned: None,
) -> tuple[list[Losses], float]:
    """Train one cell and return its losses on every set, and the mean loss of its last tenth of steps.

    Args:
        model: BASE; unchanged afterwards.
        cell: The run.
        training: Settings shared by all runs.
        sets: Evaluation sets.
        after: Called after every step and every batch.
        keep: Called with the trained model.
    """
    torch.manual_seed(cell.seed)
    with _make_trainable(model, cell, training.kind) as tuned:
        with checkpoint_activations(model.module) if training.checkpointing else nullcontext():
            path = train(tuned, cell, training, after)
        tuned.module.eval()
        losses = [measure(tuned, texts, training.batch, after) for texts in sets]
        keep(tuned)
    last = path[-max(1, len(path) // 10) :]
    return losses, sum(last) / len(last)


def _make_trainable(model: Model, cell: Cell, kind: Lora) -> AbstractContextManager[Model]:
    if cell.rank is None:
        return train_in_place(model, only_vectors=cell.subject == "bitfit")
    return add_lora(model, cell.rank, kind)


def train(model: Model, cell: Cell, training: Training, after: Callable[[], None]) -> list[float]:
    """Train the trainable parameters, and return the loss of every step; a loss that is not finite changes nothing."""
    parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=training.decay)
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
    pairs = [select_predictions(model, sequence, logits[i]) for i, sequence in enumerate(batch)]
    total = torch.stack([nll(outputs, target) for outputs, target in pairs]).sum()
    return total / sum(len(target) for _, target in pairs)


def record_of(
    texts: Texts, losses: Losses, cell: Cell | None = None, train_loss: float | None = None, name: str = ""
) -> Probe:
    """Return the record of a run on one set; without a run, of BASE, rounded to a grid if it has that name."""
    trained = train_loss if train_loss is not None and math.isfinite(train_loss) else None
    return Probe(
        probe="sweep",
        **losses.on(texts),
        **(cell.fields if cell else {"subject": "base"}),
        name=name,
        loss=losses.mean if losses.is_finite else None,
        train_loss=trained,
        nll=losses.rounded if losses.is_finite else (),
        predictions=() if cell else tuple(int(count) for count in losses.counts),
    )
