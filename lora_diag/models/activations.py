"""Second moments C = E[xxᵀ] of the inputs of linear layers, accumulated while a model reads a text.

Sums are float64. Layers with the same input tensor, such as query, key and value, share one sum.
With gradients, also G = E[ggᵀ] of the gradient g of a sequence's loss with respect to each output
of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lora_diag.errors import InputError
from lora_diag.models.data import Sequence, Texts
from lora_diag.models.losses import Draw, backward, logits_of
from lora_diag.models.opening import Model

# transformers' name of its linear layer that stores (in, out); GPT-2 has it.
_TRANSPOSED = "Conv1D"


@dataclass
class Moment:
    """Σ xxᵀ over the inputs of one or several layers, or Σ ggᵀ over the output gradients of one.

    Args:
        layers: Names of these layers in the model.
        total: The sum, ``(in, in)``, or ``(out, out)`` of gradients; float64.
        rows: Number of inputs or gradients.
    """

    layers: list[str]
    total: Tensor
    rows: int = 0

    @classmethod
    def zero(cls, x: Tensor, layers: list[str]) -> Moment:
        """Return an empty sum for vectors like the rows of a tensor."""
        return cls(
            layers, torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
        )

    def add(self, x: Tensor) -> None:
        """Add the rows of a tensor ``(…, n)``."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float64)
        self.total.addmm_(rows.T, rows)
        self.rows += len(rows)

    @property
    def mean(self) -> Tensor:
        """The second moment: C of inputs, G of output gradients."""
        return self.total / self.rows


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that multiply their input by one matrix, by the name of the matrix in the
    model.
    """
    return {
        f"{name}.weight": layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or type(layer).__name__ == _TRANSPOSED
    }


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Return ``(out, in)`` of a linear layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(layer, nn.Linear) else (columns, rows)


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a layer, the first argument of its call, from the arguments that its hook
    gets.
    """
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


class Listener:
    """Accumulator of xxᵀ over every input of selected layers.

    Args:
        layers: Layers by name.
        gradients: Whether to also accumulate ggᵀ of the output gradients.

    Attributes:
        moments: Σ xxᵀ, by the name of the first of the layers that share it.
        outputs: Σ ggᵀ, by the name of the layer.
    """

    def __init__(self, layers: dict[str, nn.Module], gradients: bool = False) -> None:
        self.moments: dict[str, Moment] = {}
        self.outputs: dict[str, Moment] = {}
        # The first layer with the input of each layer, and the inputs of the current batch, by
        # these first layers.
        self._leaders: dict[str, str] = {}
        self._inputs: dict[str, Tensor] = {}
        self._hooks = []
        for name, layer in layers.items():
            self._hooks.append(
                layer.register_forward_pre_hook(partial(self._add_input, name), with_kwargs=True)
            )
            if gradients:
                self._hooks.append(layer.register_forward_hook(partial(self._hook_gradient, name)))

    def close(self) -> None:
        """Remove the hooks, and discard the inputs of the last batch."""
        self.discard_inputs()
        for hook in self._hooks:
            hook.remove()

    def discard_inputs(self) -> None:
        """Discard the inputs of the last batch."""
        self._inputs = {}

    def _add_input(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Add the input of a layer to its sum, only once for layers that share the input.

        Raises:
            InputError: Layers that shared an input do not share it in this batch.
        """
        x = input_of(args, kwargs)
        if name not in self._leaders:
            first_name = next(
                (first for first, tensor in self._inputs.items() if tensor is x), name
            )
            self._leaders[name] = first_name
            if first_name == name:
                self.moments[name] = Moment.zero(x, [])
            self.moments[first_name].layers.append(name)
        leader = self._leaders[name]
        if leader == name:
            self._inputs[name] = x  # kept, so that no other tensor of this batch gets its identity
            self.moments[name].add(x)
        elif self._inputs.get(leader) is not x:
            raise InputError(
                f"{name}: had the input of {leader} in an earlier batch, but not in this one"
            )

    def _hook_gradient(
        self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        """Register a hook that adds the gradient of an output, if it gets one."""
        if output.requires_grad:
            output.register_hook(partial(self._add_gradient, name))  # type: ignore[no-untyped-call]

    def _add_gradient(self, name: str, gradient: Tensor) -> None:
        """Add an output gradient of a layer to its sum."""
        if name not in self.outputs:
            self.outputs[name] = Moment.zero(gradient, [name])
        self.outputs[name].add(gradient)


def record(
    model: Model,
    texts: Texts,
    layers: dict[str, nn.Module],
    size: int,
    after: Callable[[], None],
    draw: Draw | None = None,
) -> Listener:
    """Run a model on a text and return the listener with the second moments of its layers, its
    hooks removed.

    Args:
        model: The model.
        texts: The text; batches have sequences of equal length, without padding.
        layers: The requested ones of ``linear_layers``.
        size: Sequences in a batch.
        after: Called after every batch.
        draw: Also accumulate the output gradients of the loss for these labels; None for inputs
            only.
    """
    listener = Listener(layers, draw is not None)
    try:
        for sequences in iterate_equal_batches(texts, size):
            listener.discard_inputs()
            if draw is None:
                with torch.no_grad():
                    logits_of(model, sequences)
            else:
                backward(model, sequences, draw)
            after()
    finally:
        listener.close()
    return listener


def iterate_equal_batches(texts: Texts, size: int) -> Iterator[list[Sequence]]:
    """Yield batches of consecutive sequences of one length, at most ``size`` each, in the order of
    the set.
    """
    for _, group in groupby(texts.sequences, key=lambda sequence: len(sequence.ids)):
        yield from replace(texts, sequences=tuple(group)).batches(size)
