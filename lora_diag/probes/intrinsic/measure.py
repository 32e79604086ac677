"""Training in a random subspace: θ = θ_0 + P·z with P a Fastfood projection that is never materialized.

This is the definition of the intrinsic dimension by Li et al. 2018; Aghajanyan et al. 2020 add one scale per layer
(SAID). BASE's weights are unchanged: the model is called with other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_diag.errors import UsageError
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, measure
from lora_diag.models.opening import Model
from lora_diag.models.training import Cell, Training, train
from lora_diag.records.names import depth_of, tower_of

Method = Literal["plain", "said"]

# Size of the factors of a Hadamard matrix: 2²² entries in blocks of 1024 took 38 ms of one core by additions of pairs,
# and 7, 9 and 12 ms by matrix products with factors of 16, 32 and 64.
FACTOR = 16

# Change of a layer's scale in one step at the peak rate, independent of the learning rate of z.
SCALE_STEP = 0.01


def hadamard(x: Tensor) -> Tensor:
    """Return H·x for the rows of x, where H is the Hadamard matrix with entries ±1 in Sylvester's order.

    H of size b is a Kronecker product of small factors, each applied along its own axis, in O(b·log b) operations.

    Args:
        x: ``(q, b)``, b a power of two.

    Example:
        >>> hadamard(torch.eye(2)).tolist()
        [[1.0, 1.0], [1.0, -1.0]]
    """
    rows, size = x.shape
    done = 1
    while done < size:
        width = min(FACTOR, size // done)
        small = _make_sylvester(width).to(x)
        x = x.reshape(-1, width) @ small if done == 1 else torch.matmul(small, x.reshape(-1, width, done))
        done *= width
    return x.reshape(rows, size)


def _make_sylvester(size: int) -> Tensor:
    """Return the Hadamard matrix of a power of two: H_1 = [1], H_2k = [[H_k, H_k], [H_k, −H_k]]."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


class Fastfood:
    r"""The rows of P that belong to one tensor: blocks M = H·G·Π·H·B of b × b, b the smallest power of two ≥ d.

    B are random signs, Π is a permutation, G are standard normal numbers, all fixed by the seed; memory is five bytes
    per entry of the tensor. An entry of M has mean 0 and variance b, so that with the factor 1/√(b·D) the columns of P,
    over all D rows, have mean norm 1.

    Args:
        size: Entries of the tensor, n.
        dim: d.
        total: Entries of all tensors, D.
        generator: Generator of the random numbers.
        device: Device that keeps them.

    Reference:
        Le, Sarlós and Smola 2013, "Fastfood"; Aghajanyan et al. 2020, section 3.
    """

    def __init__(self, size: int, dim: int, total: int, generator: torch.Generator, device: torch.device) -> None:
        block = 1 << (dim - 1).bit_length()
        blocks = -(-size // block)
        signs = torch.randint(0, 2, (blocks, block), generator=generator, dtype=torch.int8) * 2 - 1
        self._signs = signs.to(device)
        self._order = torch.randperm(block, generator=generator).to(device)
        self._normal = torch.randn(blocks, block, generator=generator).to(device)
        self._size, self._factor = size, 1 / math.sqrt(block * total)

    def times(self, z: Tensor) -> Tensor:
        """Return the tensor's part of P·z, ``(n,)``, for z ``(d,)``; differentiable in z."""
        padded = nn.functional.pad(z, (0, self._signs.shape[1] - len(z)))
        mixed = hadamard(self._signs * padded).index_select(1, self._order)
        return hadamard(self._normal * mixed).reshape(-1)[: self._size] * self._factor


class Subspace(nn.Module):
    """A model with weights θ_0 + P·z, or θ_0 + λ_ℓ·P·z with one scale λ_ℓ per layer; only z and λ are trained.

    Args:
        inner: The model; its own parameters are constant.
        dim: d, the total number of trained parameters, including scales.
        seed: Seed of P.
        method: ``plain`` or ``said``.
        lr: Peak learning rate, which determines the step of the scales.

    Raises:
        UsageError: ``said`` has at least as many scales as dimensions, or there are more dimensions than parameters.
    """

    def __init__(self, inner: nn.Module, dim: int, seed: int, method: Method, lr: float) -> None:
        super().__init__()
        self.inner = inner
        parameters = dict(inner.named_parameters())
        total = sum(parameter.numel() for parameter in parameters.values())
        layers = list(dict.fromkeys(map(_find_layer, parameters))) if method == "said" else []
        check_dim(dim, total, len(layers))
        device = next(iter(parameters.values())).device
        generator = torch.Generator().manual_seed(seed)
        z_dim = dim - len(layers)
        self._parts = {
            name: Fastfood(parameter.numel(), z_dim, total, generator, device) for name, parameter in parameters.items()
        }
        self._scale_of = {name: layers.index(_find_layer(name)) for name in parameters} if layers else {}
        self.z = nn.Parameter(torch.zeros(z_dim, device=device))
        self.scales = nn.Parameter(torch.zeros(len(layers), device=device)) if layers else None
        self._unit = SCALE_STEP / lr
        self._fixed: dict[str, Tensor] | None = None

    def weights(self) -> dict[str, Tensor]:
        """Return all weights by their names in the model."""
        tensors = {}
        for name, parameter in self.inner.named_parameters():
            change = self._parts[name].times(self.z)
            if self.scales is not None:
                change = change * (1 + self._unit * self.scales[self._scale_of[name]])
            tensors[name] = parameter + change.view_as(parameter)
        return tensors

    def fix(self) -> None:
        """Compute the weights once for all following calls."""
        with torch.no_grad():
            self._fixed = self.weights()

    def forward(self, **inputs: Any) -> Any:
        """Call the model with these weights."""
        return functional_call(self.inner, self._fixed or self.weights(), (), inputs)


def check_dim(dim: int, total: int, layers: int) -> None:
    """Check a dimension against the ``total`` number of parameters and ``layers`` scales.

    Raises:
        UsageError: The dimension is too large or too small.
    """
    if dim > total:
        raise UsageError(f"--dims {dim}: the model has only {total} parameters; use smaller dimensions")
    if dim <= layers:
        raise UsageError(f"--dims {dim}: --projection said trains {layers} scales, one per layer; d must be larger")


def scales_of(module: nn.Module) -> int:
    """Return the number of scales of SAID: one per block, and one for every weight outside the blocks."""
    return len({_find_layer(name) for name, _ in module.named_parameters()})


def _find_layer(name: str) -> tuple[object, ...]:
    """Return the key of the weights that share a scale with this one: its block, or itself outside the blocks."""
    depth = depth_of(name)
    return (*tower_of(name), depth) if depth is not None else (name,)


def rate_of(pace: float, dim: int, total: int) -> float:
    """Return the rate at which a step of Adam on z moves θ as far as a step of rate ``pace`` on θ: pace·√(D/d).

    A step of Adam changes each parameter by about its rate, and P preserves norms: ‖Δθ‖ is rate·√d against pace·√D.

    >>> rate_of(1e-4, 100, 1_000_000)
    0.01
    """
    return pace * math.sqrt(total / dim)


@dataclass(frozen=True, slots=True)
class Run:
    """One run in a subspace.

    Args:
        dim: d.
        pace: Equivalent learning rate of full fine-tuning.
        seed: Seed of P, and of dropout if BASE has it.
        method: ``plain`` or ``said``.
    """

    dim: int
    pace: float
    seed: int
    method: Method


def subspace_losses(
    model: Model, run: Run, training: Training, sets: Sequence[Texts], after: Callable[[], None]
) -> tuple[list[Losses], float]:
    """Train in a subspace; return the losses on every set, and the mean loss of the last tenth of the steps.

    Args:
        model: BASE; unchanged afterwards.
        run: Dimension, rate, seed.
        training: Settings shared by all runs.
        sets: Evaluation sets, in batches of the size of training.
        after: Called after every step and every batch.
    """
    torch.manual_seed(run.seed)
    total = sum(parameter.numel() for parameter in model.module.parameters())
    lr = rate_of(run.pace, run.dim, total)
    module = Subspace(model.module, run.dim, run.seed, run.method, lr)
    tuned = replace(model, module=module)
    try:
        step_losses = train(tuned, Cell(None, lr, run.seed, "full"), training, after)
        module.eval()
        module.fix()
        losses = [measure(tuned, texts, training.batch, after) for texts in sets]
    finally:
        model.module.eval()
    last = step_losses[-max(1, len(step_losses) // 10) :]
    return losses, sum(last) / len(last)
