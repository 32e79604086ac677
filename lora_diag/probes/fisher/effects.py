"""Effect of a weight change on a model's loss and probabilities on a text, relative to the unchanged model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_diag.errors import InputError
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, iterate_predictions, nll
from lora_diag.models.opening import Model
from lora_diag.probes.fisher.record import Effect

# Memory limit of the logits of the unchanged model, which are kept because every change is compared with them.
LOGIT_BYTES = 2 * 2**30


@dataclass(frozen=True)
class BaseOutputs:
    """The unchanged model on a text: its losses, and its logits of every sequence."""

    losses: Losses
    logits: tuple[Tensor, ...]


@torch.no_grad()
def read_before(model: Model, texts: Texts, size: int, after: Callable[[], None]) -> BaseOutputs:
    """Run a model on a text and keep its logits.

    Raises:
        InputError: Its logits take too much memory.
    """
    sums, counts, kept = list[float](), list[int](), list[Tensor]()
    used_bytes = 0
    for logits, labels in iterate_predictions(model, texts, size):
        for outputs, target in zip(logits, labels, strict=True):
            sums.append(float(nll(outputs, target)))
            counts.append(len(target))
            kept.append(outputs.float())
            used_bytes += outputs.numel() * 4
        if used_bytes > LOGIT_BYTES:
            raise InputError(
                f"{texts.path}: the logits of its first {len(kept)} of {len(texts.sequences)} sequences need more "
                f"than {LOGIT_BYTES / 2**30:.0f} GiB of memory; use fewer with --max-sequences"
            )
        after()
    return BaseOutputs(
        Losses(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)), tuple(kept)
    )


@torch.no_grad()
def effect(model: Model, texts: Texts, before: BaseOutputs, size: int, after: Callable[[], None]) -> Effect:
    """Run the changed model on the same text, and return the effect of the change."""
    sums = list[float]()
    kl = 0.0
    index = 0
    for logits, labels in iterate_predictions(model, texts, size):
        for outputs, target in zip(logits, labels, strict=True):
            sums.append(float(nll(outputs, target)))
            log_p, log_q = before.logits[index].double().log_softmax(-1), outputs.double().log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            index += 1
        after()
    losses = Losses(torch.tensor(sums, dtype=torch.float64), before.losses.counts)
    gap, error = losses.minus(before.losses)
    return Effect(loss=losses.mean, gap=gap, gap_error=error, kl=kl / losses.tokens)
