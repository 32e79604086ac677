"""How far a model's outputs are from a fine-tune's: logits, probabilities, choices, and before all of them the loss.

An adapter is applied as its own ΔW on the weights of BASE, so any kind of adapter can be held against any other. Sets
are taken in chunks, so that the logits of only two models and a few sequences are held at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_diag.results import Probe
from lora_diag.results.probe import Subject
from lora_diag.training.data import Texts
from lora_diag.training.losses import Losses, nll, predictions
from lora_diag.training.models import Model
from lora_diag.training.swapping import FULL, Swapped

# What the logits of BASE and TUNED may take together.
LOGIT_BYTES = 2**30


@dataclass(frozen=True)
class Contender:
    """A model that is measured: BASE with an update, or BASE itself.

    Args:
        subject: What it is.
        name: An adapter's or a reference's path.
        swapped: Its update; None for BASE.
    """

    subject: Subject
    name: str
    swapped: Swapped | None


@dataclass
class _Sums:
    """What is added up of one contender over a set."""

    nll: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    squares: float = 0.0
    kl: float = 0.0
    same: int = 0

    @property
    def losses(self) -> Losses:
        return Losses(torch.tensor(self.nll, dtype=torch.float64), torch.tensor(self.counts, dtype=torch.float64))

    def add(self, logits: Tensor, labels: Tensor, tuned: Tensor) -> None:
        """Add one sequence: logits ``(n, classes)``, what they predict, and TUNED's logits there."""
        self.nll.append(float(nll(logits, labels)))
        self.counts.append(len(labels))
        self.squares += float((tuned.double() - logits.double()).square().sum())
        log_p, log_q = tuned.double().log_softmax(-1), logits.double().log_softmax(-1)
        self.kl += float((log_p.exp() * (log_p - log_q)).sum())
        self.same += int((tuned.argmax(-1) == logits.argmax(-1)).sum())


@torch.no_grad()
def outputs(
    model: Model,
    contenders: Sequence[Contender],
    texts: Texts,
    size: int,
    after: Callable[[str], None],
) -> Iterator[Probe]:
    """Yield one record for each contender on one set.

    Args:
        model: BASE; its weights are changed and put back.
        contenders: BASE first, TUNED second, then the others.
        texts: The set.
        size: Sequences in a batch.
        after: Called after every batch.
    """
    sums = [_Sums() for _ in contenders]
    for chunk in chunks(model, texts, size):
        ends = [_logits(model, contender, chunk, size, after) for contender in contenders[:2]]
        for i, contender in enumerate(contenders):
            found = ends[i] if i < 2 else _logits(model, contender, chunk, size, after)
            for (logits, labels), (tuned, _) in zip(found, ends[1], strict=True):
                sums[i].add(logits, labels, tuned)
    for contender, own in zip(contenders, sums, strict=True):
        yield _record(contender, own, sums[0], sums[1], texts)


def chunks(model: Model, texts: Texts, size: int) -> Iterator[Texts]:
    """Yield parts of a set, whole batches, whose logits from two models fit into ``LOGIT_BYTES``."""
    classes = len(model.labels) if model.kind == "classifier" else getattr(model.module.config, "vocab_size", 1)
    longest = max(len(sequence.ids) for sequence in texts.sequences)
    step = size * max(1, LOGIT_BYTES // (2 * 4 * longest * max(1, classes) * size))
    for first in range(0, len(texts.sequences), step):
        yield replace(texts, sequences=texts.sequences[first : first + step])


def _logits(
    model: Model, contender: Contender, chunk: Texts, size: int, after: Callable[[str], None]
) -> list[tuple[Tensor, Tensor]]:
    """Return logits and labels of every sequence, with the contender's weights in place meanwhile."""
    if contender.swapped is not None:
        contender.swapped.arrange(dict.fromkeys(contender.swapped.layers, FULL))
    found = []
    for logits, labels in predictions(model, chunk, size):
        found += [(each.float(), wanted) for each, wanted in zip(logits, labels, strict=True)]
        after(contender.name or contender.subject)
    if contender.swapped is not None:
        contender.swapped.arrange({})
    return found


def _record(contender: Contender, own: _Sums, base: _Sums, tuned: _Sums, texts: Texts) -> Probe:
    gap, error = own.losses.minus(tuned.losses)
    change = base.losses.mean - tuned.losses.mean
    predicted = own.losses.tokens
    return Probe(
        probe="outputs",
        set=texts.name,
        shifted=texts.shifted,
        subject=contender.subject,
        name=contender.name,
        tokens=predicted,
        data=texts.hash,
        loss=own.losses.mean,
        gap=gap,
        gap_error=error,
        kept=(base.losses.mean - own.losses.mean) / change + 0.0 if change else None,
        distance=math.sqrt(own.squares / base.squares) if base.squares else None,
        kl=own.kl / predicted,
        agreement=own.same / predicted,
    )
