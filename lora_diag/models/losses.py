"""Forward and backward passes: losses of a model on a set by sequence, and gradients with respect
to layer outputs.

Differences of losses on the same sequences have standard errors. The backward pass runs through a
frozen model, for the loss of each sequence. No weight gradients are needed: the inner products of
∇ℓ with an update follow from the inputs x and the output gradients g of its layer, ⟨Σ_t g_t x_tᵀ,
T⟩ = Σ_t g_tᵀ T x_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lora_diag.errors import InputError
from lora_diag.metrics.statistics import Estimate, degrees_of_freedom, paired_difference
from lora_diag.models.data import IGNORED, Sequence, Texts
from lora_diag.models.opening import Model, pad_sequences


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihoods of one model on one set.

    Args:
        sums: Sum of each sequence in nats, float64.
        counts: Number of predictions of each sequence.
    """

    sums: Tensor
    counts: Tensor

    @property
    def is_finite(self) -> bool:
        """Whether the loss of every sequence is finite."""
        return bool(torch.isfinite(self.sums).all())

    @property
    def mean(self) -> float:
        """Mean per prediction.

        Raises:
            InputError: The loss is not finite.
        """
        if not self.is_finite:
            raise InputError(*NOT_FINITE)
        return float(self.sums.sum() / self.counts.sum())

    @property
    def tokens(self) -> int:
        """Number of predictions."""
        return int(self.counts.sum())

    @property
    def rounded(self) -> tuple[float, ...]:
        """The sums to 6 decimals, as records keep them."""
        return tuple(round(float(value), 6) for value in self.sums)

    def __getitem__(self, sequences: slice) -> Losses:
        """Return the losses of some sequences."""
        return Losses(self.sums[sequences], self.counts[sequences])

    def round(self) -> Losses:
        """Return the losses as records keep them."""
        return Losses(torch.tensor(self.rounded, dtype=torch.float64), self.counts)

    @classmethod
    def of(cls, sums: Iterable[float], counts: Iterable[int]) -> Losses:
        """Return the losses of sequences from the sum and the number of predictions of each."""
        return cls(
            torch.tensor([*sums], dtype=torch.float64), torch.tensor([*counts], dtype=torch.float64)
        )

    def fields_of_run(self, texts: Texts, train_loss: float | None) -> dict[str, Any]:
        """Return the common fields of records of a training run or of BASE; losses that are not
        finite are None.
        """
        if train_loss is not None and not math.isfinite(train_loss):
            train_loss = None
        return {
            **self.on(texts),
            "loss": self.mean if self.is_finite else None,
            "train_loss": train_loss,
        }

    def by_sequence(self, is_base: bool) -> dict[str, Any]:
        """Return the fields of records with a value for each sequence; numbers of predictions only
        for BASE.

        The losses are empty unless all are finite.
        """
        counts = tuple(map(int, self.counts)) if is_base else ()
        return {"nll": self.rounded if self.is_finite else (), "predictions": counts}

    def on(self, texts: Texts) -> dict[str, Any]:
        """Return the common fields of records of a loss: its set, and the number of predictions."""
        return {
            "set": texts.name,
            "shifted": texts.shifted,
            "data": texts.hash,
            "tokens": self.tokens,
        }

    def minus(self, other: Losses) -> tuple[float, float | None]:
        """Return the difference of two losses on the same sequences, and its standard error; see
        ``paired_difference``.

        Example:
            >>> one = Losses(torch.tensor([3.0, 5.0]), torch.tensor([2.0, 2.0]))
            >>> two = Losses(torch.tensor([2.0, 2.0]), torch.tensor([2.0, 2.0]))
            >>> one.minus(two)
            (1.0, 0.5)
        """
        return paired_difference(self.sums.tolist(), other.sums.tolist(), self.counts.tolist())

    def between(self, base: Losses, tuned: Losses) -> dict[str, Any]:
        """Return the fields of a record that compare the losses with those of TUNED and BASE, as
        ``Probe`` documents them.
        """
        gap, error = self.minus(tuned)
        change = base.mean - tuned.mean
        kept = (base.mean - self.mean) / change + 0.0 if change else None
        return {"loss": self.mean, "gap": gap, "gap_error": error, "kept": kept}

    def compare(self, base: Losses) -> dict[str, Any]:
        """Return the fields of a record that compare the losses with those of BASE, as ``Probe``
        documents them.
        """
        change, error = self.minus(base)
        upper = (
            None
            if error is None
            else change + Estimate(change, error, degrees_of_freedom(len(self.sums))).half()
        )
        return {"change": change, "change_error": error, "lost_at_most": upper}


# The losses of one model by evaluation set.
LossesBySet = dict[str, Losses]


def predict(model: Model, sequences: list[Sequence]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits of predictions ``(n_i, classes)`` of every sequence, and their targets
    ``(n_i,)``.

    Gradients are as set by the caller. Padding and tokens without a label are no predictions.
    """
    logits = logits_of(model, sequences)
    outputs, targets = zip(*map(partial(select_predictions, model), sequences, logits), strict=True)
    return list(outputs), list(targets)


def logits_of(model: Model, sequences: list[Sequence]) -> Tensor:
    """Return the logits of sequences, with gradients as set by the caller."""
    logits = forward(model, sequences).logits
    assert isinstance(logits, Tensor)
    return logits


def forward(model: Model, sequences: list[Sequence], hidden: bool = False) -> Any:
    """Return the output of transformers for sequences, padded at the end; optionally with
    ``hidden_states``.
    """
    ids = pad_sequences([sequence.ids for sequence in sequences], model.tokens.pad).to(model.device)
    mask = pad_sequences([[1] * len(sequence.ids) for sequence in sequences], 0).to(model.device)
    extra: dict[str, Any] = {"use_cache": False} if model.kind == "causal" else {}
    if hidden:
        extra["output_hidden_states"] = True
    return model.module(input_ids=ids, attention_mask=mask, **extra)


def select_predictions(model: Model, sequence: Sequence, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of predictions ``(n, classes)`` and their targets ``(n,)``.

    Args:
        model: Gives the kind of prediction.
        sequence: The sequence.
        logits: The model's logits of the padded sequence, ``(tokens, classes)``; of a classifier
            ``(classes,)``.
    """
    labels = torch.tensor(sequence.labels, device=logits.device)
    if model.kind == "classifier":
        return logits[None], labels
    if model.kind == "masked":
        hidden = (labels != IGNORED).nonzero().squeeze(1)
        return logits[hidden], labels[hidden]
    places = (
        (labels[1:] != IGNORED).nonzero().squeeze(1)
    )  # the logits at a place predict the next token
    return logits[places], labels[1:][places]


@torch.no_grad()
def measure(
    model: Model,
    texts: Texts,
    size: int,
    after: Callable[[], None] = lambda: None,
    on_logits: Callable[[Tensor], object] = lambda logits: None,
) -> Losses:
    """Return the losses of a model on the sequences of a set.

    Args:
        model: The model.
        texts: The set.
        size: Sequences in a batch.
        after: Called after every batch.
        on_logits: Called with the logits of the predictions of every sequence, ``(n, classes)``.
    """
    sums, counts = list[float](), list[int]()
    for sequences in texts.batches(size):
        for outputs, target in zip(*predict(model, sequences), strict=True):
            sums.append(float(nll(outputs, target)))
            counts.append(len(target))
            on_logits(outputs)
        after()
    return Losses.of(sums, counts)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed negative log-likelihood, in nats; the sum over positions in float64."""
    return functional.cross_entropy(logits.float(), labels, reduction="none").sum(
        dtype=torch.float64
    )


def divergence(p: Tensor, q: Tensor) -> float:
    """Return KL(p‖q) from logits, in nats, summed over predictions in float64."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum())


@dataclass
class Forgetting:
    """Running comparison of a model's predictions with those of BASE over the sequences of a set.

    KL(p_base ‖ p) on the new task predicted what fine-tunes forget elsewhere better than norms of
    ΔW did (Shenfeld, Pari and Agrawal 2025, "RL's Razor: why online reinforcement learning forgets
    less", arXiv 2509.04259).

    Args:
        kl: Σ KL(p_base ‖ p) over the predictions of each sequence, in nats.
        confident: Number of predictions whose label has a probability above 1/2. Such a token is
            the most likely one, so that greedy decoding repeats it; a mean loss hides a single one
            that is not.
    """

    kl: list[float] = field(default_factory=list)
    confident: int = 0

    def add(self, logits: Tensor, base_logits: Tensor, labels: Tensor) -> None:
        """Add one sequence: logits ``(n, classes)`` of the model and of BASE, and the targets
        ``(n,)``.
        """
        self.kl.append(divergence(base_logits, logits))
        losses = functional.cross_entropy(logits.float(), labels, reduction="none")
        self.confident += int((losses < math.log(2)).sum())

    def compare(self, losses: Losses, base: Losses) -> dict[str, Any]:
        """Return the fields of a record that compare a model with BASE, as ``Probe`` documents
        them.

        Args:
            losses: Losses of the model on the sequences that were added.
            base: Losses of BASE.
        """
        counts = losses.counts.tolist()
        kl_base, kl_base_error = paired_difference(self.kl, [0.0] * len(counts), counts)
        return {
            **losses.compare(base),
            "kl_base": kl_base,
            "kl_base_error": kl_base_error,
            "confident": self.confident / losses.tokens,
        }


Labels = Literal["data", "model"]
LABELS = ("data", "model")

NOT_FINITE = ("loss", "is not finite", "check the weights, or use $dtype float32")


@dataclass
class Draw:
    """The choice of the labels of a loss.

    Args:
        labels: ``data`` for those of the text (the empirical Fisher); ``model`` for labels sampled
            from the model's probabilities (the Fisher itself).
        seed: Seed of the sampled labels.
    """

    labels: Labels = "data"
    seed: int = 0

    def __post_init__(self) -> None:
        """Initialize the random generator."""
        self._random = torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the labels of the predictions, given their logits ``(n, classes)`` and those of
        the text ``(n,)``.
        """
        if self.labels == "data":
            return labels
        probabilities = logits.detach().double().softmax(-1).cpu()
        return (
            torch.multinomial(probabilities, 1, generator=self._random).squeeze(1).to(logits.device)
        )


def backward(model: Model, sequences: list[Sequence], draw: Draw) -> Losses:
    """Run one batch forward and backward; hooks on the layers receive the gradients.

    Args:
        model: A model with frozen weights; gradients start at the embedding of the tokens.
        sequences: The batch; padding gets no gradient.
        draw: Returns the labels of the loss.

    Returns:
        The losses. The loss of a sequence is the sum over its predictions, so that its gradients
            are independent of the other sequences of the batch.

    Raises:
        InputError: The loss is not finite.
    """

    def start_gradients(module: Any, args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    hook = model.module.get_input_embeddings().register_forward_hook(start_gradients)
    try:
        with torch.enable_grad():
            logits, labels = predict(model, sequences)
            losses = [nll(z, draw(z, target)) for z, target in zip(logits, labels, strict=True)]
            each = torch.stack(losses)
            if not torch.isfinite(each).all():
                raise InputError(*NOT_FINITE)
            each.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        hook.remove()
    return Losses.of(each.tolist(), map(len, labels))
