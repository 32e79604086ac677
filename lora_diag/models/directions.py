"""Inner products ⟨∇ℓ_s, ΔW⟩ of each sequence's gradient with updates, and with their singular
directions.

No gradient of a weight is formed. In a linear layer ∇ℓ_s = Σ_t g_t x_tᵀ over the tokens of sequence
s, with x the input and g the gradient with respect to the output, so that for ΔW = Σσ_i u_i v_iᵀ

    ⟨∇ℓ_s, σ_i u_i v_iᵀ⟩ = σ_i Σ_t (u_iᵀ g_t)(v_iᵀ x_t).

For any other weight θ of a module f, ⟨∇ℓ_s, Δθ⟩ = Σ g·(∂f/∂θ)Δθ, with the product of the Jacobian
and the update by forward differentiation of that module alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_diag.linalg.exact import Factors
from lora_diag.models.activations import input_of
from lora_diag.models.data import Texts
from lora_diag.models.losses import Draw, Losses, backward
from lora_diag.models.opening import Model, pad_sequences

# Positional and named arguments of a module's call.
Call = tuple[tuple[Any, ...], dict[str, Any]]

_LAYOUT = "its inputs are not laid out by sequence and token"


class Tracker(ABC):
    """The inner products of one update during backward passes.

    Args:
        modules: The modules that use the weight.

    Attributes:
        problem: Why they cannot be computed; empty if they can.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self.problem = ""

    @abstractmethod
    def start(self, sequences: int) -> None:
        """Begin a batch."""

    @abstractmethod
    def on_call(self, module: nn.Module, call: Call, output: Tensor, mask: Tensor) -> Any:
        """Take a call of a module; return another output, or None.

        Args:
            module: The module.
            call: The arguments.
            output: The output.
            mask: True for tokens other than padding, ``(sequences, tokens)``.
        """

    @abstractmethod
    def terms(self) -> Tensor | None:
        """Return the inner products of the batch, ``(sequences, k)`` float64; None if no gradient
        reached the weight.
        """


class Projection(Tracker):
    """⟨∇ℓ_s, σ_i u_i v_iᵀ⟩ for the singular directions of a linear layer's update.

    Args:
        module: The layer.
        s: Singular values, ``(k,)``.
        outer: Singular vectors on the side of the output, as columns ``(out, k)``; their dtype is
            that of the products.
        inner: Those on the side of the input, ``(in, k)``.
    """

    def __init__(self, module: nn.Module, s: Tensor, outer: Tensor, inner: Tensor) -> None:
        super().__init__([module])
        self.s = s
        self.outer = outer
        self.inner = inner
        self._terms: Tensor | None = None

    def start(self, sequences: int) -> None:
        """Begin a batch."""
        self._terms = None

    def on_call(self, module: nn.Module, call: Call, output: Tensor, mask: Tensor) -> None:
        """Take the input of a call, and later the gradient with respect to its output."""
        if self.problem or not output.requires_grad:
            return
        inner = self.take_input(input_of(*call), mask)
        if inner is None:
            return

        def on_gradient(g: Tensor) -> None:
            self.take_gradient(g, inner)

        output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    def take_input(self, x: Tensor, mask: Tensor) -> Tensor | None:
        """Return Vᵀx of every token ``(sequences, tokens, k)``, zeros for padding; None with a
        ``problem``.

        Args:
            x: ``(sequences, tokens, in)``, or ``(sequences, in)`` with one input per sequence.
            mask: True for tokens other than padding, ``(sequences, tokens)``.
        """
        if x.shape[:-1] == mask.shape[:1]:
            x, mask = x[:, None], torch.ones_like(mask[:, :1])
        if x.shape[:-1] != mask.shape:
            self.problem = _LAYOUT
            return None
        return (x.detach().to(self.inner.dtype) @ self.inner) * mask[..., None]

    def take_gradient(self, g: Tensor, inner: Tensor) -> Tensor:
        """Add the products of a batch, given the result of ``take_input``; return Uᵀg of every
        token. Padding has no gradient.
        """
        outer = g.detach().to(self.outer.dtype).reshape(*inner.shape[:2], -1) @ self.outer
        # Summed over the uses of a layer in one pass.
        terms = (outer * inner).sum(1, dtype=torch.float64) * self.s
        self._terms = terms if self._terms is None else self._terms + terms
        return outer

    def terms(self) -> Tensor | None:
        """Return the inner products of the batch, ``(sequences, k)``."""
        return self._terms


def sides_of(module: nn.Module, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the singular values of a linear layer's update, float64, and its vectors on the sides
    of output and input, as columns.
    """
    device = next(module.parameters()).device
    u, vh = factors.vectors
    outer, inner = u.to(device, dtype), vh.T.to(device, dtype)
    if not isinstance(module, nn.Linear):  # Conv1D stores (in, out)
        outer, inner = inner, outer
    return factors.s.to(device), outer.contiguous(), inner.contiguous()


class _Bare(nn.Module):
    """A module without its hooks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


class WholeUpdate(Tracker):
    """⟨∇ℓ_s, Δθ⟩ for the update of any weight of modules without parts: embeddings, norms, biases.

    To each output the hook adds e_s times the change of the output with θ along Δθ, where e is
    zero: the gradient with respect to e_s is the inner product, summed over all uses of the weight.

    Args:
        users: The modules that use the weight, and its name in each.
        update: Δθ, of the weight's shape.
    """

    def __init__(self, users: Sequence[tuple[nn.Module, str]], update: Tensor) -> None:
        super().__init__([module for module, _ in users])
        self._names = {id(module): name for module, name in users}
        self._update = update
        self._scale = torch.zeros(0)

    def start(self, sequences: int) -> None:
        """Begin a batch."""
        self._scale = torch.zeros(sequences, device=self._update.device, requires_grad=True)

    def on_call(self, module: nn.Module, call: Call, output: Tensor, mask: Tensor) -> Tensor | None:
        """Add zero times the change along Δθ to the output of a call."""
        # The positions of an embedding are those of every sequence.
        if output.shape[0] not in {len(mask), 1}:
            self.problem = _LAYOUT
        if self.problem:
            return None
        name = self._names[id(module)]
        weight = module.get_parameter(name)

        def output_at(value: Tensor) -> Any:
            return torch.func.functional_call(_Bare(module), {f"inner.{name}": value}, *call)

        with torch.no_grad():
            change: Tensor = torch.func.jvp(output_at, (weight.data,), (self._update,))[1]
        return output + self._scale.view(-1, *[1] * (output.dim() - 1)) * change

    def terms(self) -> Tensor | None:
        """Return the inner products of the batch, ``(sequences, 1)``."""
        gradient = self._scale.grad
        return None if gradient is None else gradient.double()[:, None]


def users_of(module: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]] | None:
    """Return the modules that own a parameter, and its name in each; None if one has parts, so that
    its output does not belong to the parameter alone.
    """
    users = [
        (owner, name)
        for owner in module.modules()
        for name, own in owner.named_parameters(recurse=False)
        if own is parameter
    ]
    return None if any(next(owner.children(), None) is not None for owner, _ in users) else users


def run_backward(
    model: Model, texts: Texts, trackers: Sequence[Tracker], size: int, draw: Draw
) -> Iterator[tuple[list[int], Losses]]:
    """Run a text forward and backward; the trackers have the terms of the batch that is yielded.

    Args:
        model: The model, with frozen weights.
        texts: The text.
        trackers: The inner products to compute.
        size: Sequences per batch, sorted by length to reduce padding.
        draw: Returns the labels of the loss.

    Yields:
        The positions in the text of the sequences of a batch, and their losses.

    Raises:
        InputError: A loss is not finite.
    """
    mask = torch.ones(1, 1, dtype=torch.bool)

    def hook(
        tracker: Tracker, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> Any:
        return tracker.on_call(module, (args, kwargs), output, mask)

    order = sorted(range(len(texts.sequences)), key=lambda place: len(texts.sequences[place].ids))
    with ExitStack() as hooks:
        for tracker in trackers:
            for module in tracker.modules:
                handle = module.register_forward_hook(partial(hook, tracker), with_kwargs=True)
                hooks.callback(handle.remove)
        for first in range(0, len(order), size):
            places = order[first : first + size]
            batch = [texts.sequences[place] for place in places]
            is_token = [[True] * len(sequence.ids) for sequence in batch]
            mask = pad_sequences(is_token, False).to(model.device)
            for tracker in trackers:
                tracker.start(len(batch))
            yield places, backward(model, batch, draw)
