r"""The exact Fisher of what truncation discards of a layer: Σ_s ⟨∇ℓ_s, T_r⟩², T_r = ΔW − ΔW_r = Σ_{i>r} σ_i u_i v_iᵀ.

No gradient of a weight is formed. In a linear layer ∇ℓ_s = Σ_t g_t x_tᵀ over the tokens of sequence s, with x the input
and g the gradient with respect to the output, so that

    ⟨∇ℓ_s, T_r⟩ = Σ_{i>r} a_{s,i},    a_{s,i} = σ_i Σ_t (u_iᵀ g_t)(v_iᵀ x_t),

and one pass over the text gives the sum for every rank at once. The same projections give the second moments of x and g
in the bases of the singular vectors, and with them the energy of the tail in the metric of the data and in K-FAC's:

    ‖T_r·C^½‖² = Σ_{i>r} σ_i² v_iᵀCv_i,    ‖G^½·T_r·C^½‖² = Σ_{i,j>r} σ_iσ_j (u_iᵀGu_j)(v_iᵀCv_j).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_diag.linalg import Factors
from lora_diag.models.data import Sequence, Texts
from lora_diag.models.gradients import Draw, backward
from lora_diag.models.opening import Model, iterate_batches

# Memory limit of the sums and singular vectors of the layers of one pass over the text.
PASS_BYTES = 2 * 2**30


@dataclass
class Tail:
    """One layer's ΔW = Σσ_i u_i v_iᵀ, and its running sums.

    Args:
        module: The layer.
        s: Singular values, ``(k,)`` float64.
        outer: Singular vectors on the side of the output, as columns ``(out, k)`` float64.
        inner: Those on the side of the input, ``(in, k)``.
        fro: ‖ΔW‖_F.

    Attributes:
        squares: Σ_s ⟨∇ℓ_s, T_r⟩² for r = 0, …, k.
        total: Σ_s ⟨∇ℓ_s, T_r⟩.
        xx: Σ (Vᵀx)(Vᵀx)ᵀ.
        gg: Σ (Uᵀg)(Uᵀg)ᵀ.
        tokens: Number of inputs.
        problem: Why the layer cannot be measured; empty if it can.
        _terms: a_{s,i} of the sequences of the current batch; None before its first gradient.
    """

    module: nn.Module
    s: Tensor
    outer: Tensor
    inner: Tensor
    fro: float
    squares: Tensor = field(init=False)
    total: Tensor = field(init=False)
    xx: Tensor = field(init=False)
    gg: Tensor = field(init=False)
    tokens: int = 0
    problem: str = ""
    _terms: Tensor | None = None

    def __post_init__(self) -> None:
        """Initialize the sums."""
        k, outer = len(self.s), self.outer
        self.squares, self.total = outer.new_zeros(k + 1), outer.new_zeros(k + 1)
        self.xx, self.gg = outer.new_zeros(k, k), outer.new_zeros(k, k)

    def take_input(self, x: Tensor, mask: Tensor) -> Tensor | None:
        """Add the inputs of a batch; return Vᵀx of every token ``(sequences, tokens, k)``, or None with a ``problem``.

        Args:
            x: ``(sequences, tokens, in)``, or ``(sequences, in)`` with one input per sequence.
            mask: True for tokens other than padding, ``(sequences, tokens)``.
        """
        if x.shape[:-1] == mask.shape[:1]:
            x, mask = x[:, None], torch.ones_like(mask[:, :1])
        if x.shape[:-1] != mask.shape:
            self.problem = "its inputs are not laid out by sequence and token"
            return None
        inner = (x.detach().to(torch.float64) @ self.inner) * mask[..., None]
        rows = inner.reshape(-1, inner.shape[-1])
        self.xx.addmm_(rows.T, rows)
        self.tokens += int(mask.sum())
        return inner

    def take_gradient(self, g: Tensor, inner: Tensor) -> None:
        """Add the output gradients of a batch, given the result of ``take_input``; padding has none."""
        outer = g.detach().to(torch.float64).reshape(*inner.shape[:2], -1) @ self.outer
        rows = outer.reshape(-1, outer.shape[-1])
        self.gg.addmm_(rows.T, rows)
        terms = (outer * inner).sum(1) * self.s
        self._terms = terms if self._terms is None else self._terms + terms  # a layer may be used several times

    def end_batch(self) -> None:
        """Add the products ⟨∇ℓ_s, T_r⟩ of the batch and their squares."""
        if self._terms is not None:
            tails = torch.cat([self._terms.flip(1).cumsum(1).flip(1), self._terms.new_zeros(len(self._terms), 1)], 1)
            self.squares += (tails**2).sum(0)
            self.total += tails.sum(0)
        self._terms = None

    @property
    def energies(self) -> tuple[Tensor, Tensor, Tensor]:
        """‖T_r‖², ‖T_r·C^½‖² and ‖G^½·T_r·C^½‖² for r = 0, …, k."""
        c, g = self.xx / max(1, self.tokens), self.gg / max(1, self.tokens)
        weighted = self.s[:, None] * self.s * c * g
        corners = weighted.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1).diagonal()
        return _tail_sums(self.s**2), _tail_sums(self.s**2 * c.diagonal()), torch.cat([corners, corners.new_zeros(1)])


def _tail_sums(values: Tensor) -> Tensor:
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def tail_of(module: nn.Module, factors: Factors) -> Tail:
    """Return a layer with the singular vectors of its update, on their sides of the layer."""
    assert factors.u is not None
    assert factors.vh is not None
    device = next(module.parameters()).device
    left, right = factors.u.to(device, torch.float64), factors.vh.T.to(device, torch.float64)
    outer, inner = (left, right) if isinstance(module, nn.Linear) else (right, left)  # Conv1D stores (in, out)
    return Tail(module, factors.s.to(left.device), outer.contiguous(), inner.contiguous(), factors.fro)


def bytes_of(shape: tuple[int, int]) -> int:
    """Return the memory of one layer's singular vectors and sums during a pass."""
    k = min(shape)
    return 8 * k * (sum(shape) + 2 * k)


def groups_of(layers: Mapping[str, tuple[int, int]], limit: int = PASS_BYTES) -> Iterator[list[str]]:
    """Yield the layers of each pass over the text, grouped by memory.

    >>> [len(group) for group in groups_of({"a": (8, 8), "b": (8, 8), "c": (8, 8)}, limit=2 * 8 * 8 * 32)]
    [2, 1]
    """
    group: list[str] = []
    used_bytes = 0
    for layer, shape in layers.items():
        if group and used_bytes + bytes_of(shape) > limit:
            yield group
            group, used_bytes = [], 0
        group.append(layer)
        used_bytes += bytes_of(shape)
    if group:
        yield group


def add_up(
    model: Model, texts: Texts, tails: Mapping[str, Tail], size: int, draw: Draw, after: Callable[[], None]
) -> int:
    """Run a text forward and backward, and accumulate each layer's products with the gradients of its sequences.

    Args:
        model: TUNED.
        texts: The text.
        tails: Tails by layer.
        size: Sequences per batch, sorted by length to reduce padding.
        draw: Returns the labels of the loss.
        after: Called after every batch.

    Returns:
        The number of predictions.
    """
    mask = torch.ones(1, 1, dtype=torch.bool)

    def listen(tail: Tail) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if not tail.problem and output.requires_grad and (inner := tail.take_input(x, mask)) is not None:
                output.register_hook(lambda g: tail.take_gradient(g, inner))  # type: ignore[no-untyped-call]

        return hook

    hooks = [tail.module.register_forward_hook(listen(tail), with_kwargs=True) for tail in tails.values()]
    predictions = 0
    ordered = sorted(texts.sequences, key=lambda sequence: len(sequence.ids))
    try:
        for batch in iterate_batches(len(ordered), size):
            chosen = [ordered[i] for i in batch]
            mask = _mask(chosen).to(model.device)
            predictions += sum(backward(model, chosen, draw))
            for tail in tails.values():
                tail.end_batch()
            after()
    finally:
        for registered in hooks:
            registered.remove()
    for tail in tails.values():
        if not tail.problem and not tail.tokens:
            tail.problem = "no gradient reaches it on this text"
    return predictions


def _mask(chosen: list[Sequence]) -> Tensor:
    lengths = torch.tensor([len(sequence.ids) for sequence in chosen])
    return torch.arange(int(lengths.max()))[None] < lengths[:, None]
