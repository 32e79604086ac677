"""One backward pass through a frozen model: the gradient of each sequence's loss with respect to layer outputs.

No weight gradients are needed: the inner products of ∇ℓ with an update follow from the inputs x and the output
gradients g of its layer, ⟨Σ_t g_t x_tᵀ, T⟩ = Σ_t g_tᵀ T x_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lora_diag.errors import InputError
from lora_diag.models.data import Sequence
from lora_diag.models.losses import logits_of, select_predictions
from lora_diag.models.opening import Model

Labels = Literal["data", "model"]
LABELS = ("data", "model")


@dataclass
class Draw:
    """The labels of the loss.

    Args:
        labels: ``data`` for the text's own (the empirical Fisher); ``model`` for labels sampled from the model's
            probabilities (the Fisher itself).
        seed: Seed of the sampled labels.
    """

    labels: Labels = "data"
    seed: int = 0

    def __post_init__(self) -> None:
        """Initialize the random generator."""
        self._random = torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the labels for these logits."""
        if self.labels == "data":
            return labels
        shares = logits.detach().double().softmax(-1).cpu()
        return torch.multinomial(shares, 1, generator=self._random).squeeze(1).to(logits.device)


def backward(model: Model, chosen: list[Sequence], draw: Draw) -> list[int]:
    """Run one batch forward and backward; hooks on the layers receive the gradients.

    Args:
        model: Its weights are frozen; gradients start at the embedding of the tokens.
        chosen: Sequences; padding gets no gradient.
        draw: Which labels.

    Returns:
        The number of predictions of each sequence. The loss of a sequence is the sum over them, so that its gradients
        are independent of the other sequences of the batch.

    Raises:
        InputError: The loss is not finite.
    """
    table = model.module.get_input_embeddings()
    hook = table.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    try:
        with torch.enable_grad():
            logits = logits_of(model, chosen)
            kept = [select_predictions(model, sequence, logits[i]) for i, sequence in enumerate(chosen)]
            losses = [functional.cross_entropy(z.float(), draw(z, labels), reduction="sum") for z, labels in kept]
            loss = torch.stack(losses).sum()
            if not torch.isfinite(loss):
                raise InputError("the loss is not finite; check the weights, or use --dtype float32")
            loss.backward()  # type: ignore[no-untyped-call]
    finally:
        hook.remove()
    return [len(labels) for _, labels in kept]
