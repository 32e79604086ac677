"""Curvature of the loss: Hessian-vector products of a model's mean loss on a set, and derived quantities.

A product is one backward pass through a gradient (Pearlmutter 1994), which works for every model that torch can
differentiate twice. Forward mode, as in curvlinops 3.0, does not support SiLU, used by every Llama; the tests compare
these products with curvlinops where it runs, and with dense Hessians.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_diag.errors import InputError
from lora_diag.linalg.eigenpairs import Eigenpairs, eigenpairs
from lora_diag.models.data import Texts
from lora_diag.models.losses import logits_of, select_predictions
from lora_diag.models.opening import Model, Weights, iterate_batches
from lora_diag.probes.curvature.record import Matrix, Surrogate

# Fractions of the projected gradient at which eigenpairs are counted, and of its energy at which ranks are.
SHARE = 0.9
SHARES = (0.9, 0.95, 0.99)

# Singular values below this fraction of the largest are rounding errors of float32.
ROUNDING = 1e-6


@dataclass(frozen=True)
class _Location:
    """Location of a layer in the model: a parameter, or one expert of a stack."""

    parameter: nn.Parameter
    index: int | None

    def of(self, whole: Tensor) -> Tensor:
        """Return the layer's part of a tensor with the parameter's shape."""
        return whole if self.index is None else whole[self.index]


class LossFunction:
    """The loss as a function of selected layers: its gradient, and products with its Hessian or GGN.

    The loss is the mean negative log-likelihood over the predictions of the set. All other weights are constant.

    Args:
        model: The model in evaluation mode, float32.
        texts: The set.
        size: Sequences in a batch; products are summed over batches.
        layers: Their shapes, by their names in BASE.
        matrix: ``hessian`` or ``ggn``.
        after: Called after every batch.
    """

    def __init__(
        self,
        model: Model,
        texts: Texts,
        size: int,
        layers: Mapping[str, tuple[int, int]],
        matrix: Matrix = "hessian",
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._texts, self._size, self._matrix, self._after = model, texts, size, matrix, after
        self.layers = dict(layers)
        self._locations = _locate_layers(model.module, self.layers)
        self._parameters = list(
            {id(location.parameter): location.parameter for location in self._locations.values()}.values()
        )

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self._model.device

    @property
    def params(self) -> int:
        """Number of parameters n."""
        return sum(out * into for out, into in self.layers.values())

    def only(self, layer: str) -> LossFunction:
        """Return the same loss as a function of one layer."""
        shapes = {layer: self.layers[layer]}
        return LossFunction(self._model, self._texts, self._size, shapes, self._matrix, self._after)

    def flat(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return one vector ``(n,)`` of all layers' tensors."""
        return torch.cat([parts[layer].reshape(-1) for layer in self.layers])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the layers' matrices ``(out, in)`` of one vector."""
        sizes = [out * into for out, into in self.layers.values()]
        pieces = torch.split(vector, sizes)
        return {layer: piece.view(shape) for (layer, shape), piece in zip(self.layers.items(), pieces, strict=True)}

    def weights(self) -> Tensor:
        """Return a copy of the layers' weights, ``(n,)``."""
        return self.flat({layer: location.of(location.parameter.data) for layer, location in self._locations.items()})

    def put(self, weights: Tensor) -> None:
        """Write the layers' weights."""
        for layer, part in self.split(weights).items():
            location = self._locations[layer]
            target = location.of(location.parameter.data)
            target.copy_(part.view(target.shape))

    def gradient(self) -> Tensor:
        """Return ∇L, ``(n,)``."""
        return self._sum(lambda loss, logits: torch.autograd.grad(loss, self._parameters, materialize_grads=True))

    def product(self, vector: Tensor) -> Tensor:
        """Return H·x or, for the GGN, JᵀBJ·x with B the Hessian of the loss with respect to the logits; ``(n,)``."""
        step = _multiply_hessian if self._matrix == "hessian" else _multiply_ggn
        vectors = self._spread(vector)
        return self._sum(lambda loss, logits: step(loss, logits, self._parameters, vectors))

    def ends(self, count: int, seed: int) -> tuple[Eigenpairs, Eigenpairs]:
        """Return the ``count`` largest eigenpairs, or all if there are fewer, and the smallest one.

        Raises:
            InputError: Lanczos did not converge, or a product is not finite.
        """
        n, device = self.params, self._model.device
        top = eigenpairs(self.product, n, min(count, n), "largest", seed, device)
        return top, eigenpairs(self.product, n, 1, "smallest", seed, device, float(top.values[0]))

    def _sum(self, step: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> Tensor:
        """Sum the results of a step over batches, divided by the number of predictions."""
        total = [torch.zeros_like(parameter) for parameter in self._parameters]
        predictions = 0
        with _enable_gradients(self._parameters):
            for batch in iterate_batches(len(self._texts.sequences), self._size):
                chosen = [self._texts.sequences[i] for i in batch]
                outputs = logits_of(self._model, chosen)
                kept = [select_predictions(self._model, sequence, outputs[i]) for i, sequence in enumerate(chosen)]
                logits = torch.cat([values for values, _ in kept]).float()
                targets = torch.cat([labels for _, labels in kept])
                loss = functional.cross_entropy(logits, targets, reduction="sum")
                for sum_, part in zip(total, step(loss, logits), strict=True):
                    sum_ += part.detach()
                predictions += len(targets)
                self._after()
        by_parameter = {id(parameter): sum_ for parameter, sum_ in zip(self._parameters, total, strict=True)}
        parts = {
            layer: location.of(by_parameter[id(location.parameter)]) for layer, location in self._locations.items()
        }
        return self.flat(parts) / predictions

    def _spread(self, vector: Tensor) -> list[Tensor]:
        """Return a vector as tensors of the parameters' shapes, zero outside the layers."""
        vectors = {id(parameter): torch.zeros_like(parameter) for parameter in self._parameters}
        for layer, part in self.split(vector).items():
            location = self._locations[layer]
            target = location.of(vectors[id(location.parameter)])
            target.copy_(part.view(target.shape))
        return [vectors[id(parameter)] for parameter in self._parameters]


def _locate_layers(module: nn.Module, layers: Mapping[str, tuple[int, int]]) -> dict[str, _Location]:
    names, parameters = Weights(module), dict(module.named_parameters(remove_duplicate=False))
    locations = {}
    for layer in layers:
        stored, _, index = layer.partition("[")
        name = names.name(stored)
        if name is None:
            raise InputError(
                f"{layer}: the model that transformers builds from BASE has no such weight; exclude it with --exclude"
            )
        locations[layer] = _Location(parameters[name], int(index.rstrip("]")) if index else None)
    return locations


@contextmanager
def _enable_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Enable gradients of these parameters only, with attention that can be differentiated twice."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        # The fused kernels of scaled_dot_product_attention have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _multiply_hessian(
    loss: Tensor, logits: Tensor, parameters: Sequence[Tensor], vectors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return ∇⟨∇L, x⟩ (Pearlmutter 1994)."""
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    inner = torch.stack([(part * vector).sum() for part, vector in zip(gradient, vectors, strict=True)]).sum()
    if not inner.requires_grad:  # the loss is linear in these parameters, or does not depend on them
        return [torch.zeros_like(parameter) for parameter in parameters]
    return torch.autograd.grad(inner, parameters, materialize_grads=True)


def _multiply_ggn(
    loss: Tensor, logits: Tensor, parameters: Sequence[Tensor], vectors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return JᵀBJ·x, B = diag(p) − ppᵀ at each prediction (Schraudolph 2002).

    J·x is the derivative of Jᵀw, which is linear in w, in w.
    """
    dummy = torch.zeros_like(logits, requires_grad=True)
    vjp = torch.autograd.grad(logits, parameters, dummy, create_graph=True, materialize_grads=True)
    inner = torch.stack([(part * vector).sum() for part, vector in zip(vjp, vectors, strict=True)]).sum()
    if not inner.requires_grad:  # the logits do not depend on these parameters
        return [torch.zeros_like(parameter) for parameter in parameters]
    (jvp,) = torch.autograd.grad(inner, dummy, retain_graph=True)
    p = logits.detach().softmax(-1)
    hessian_product = p * (jvp - (p * jvp).sum(-1, keepdim=True))
    return torch.autograd.grad(logits, parameters, hessian_product, materialize_grads=True)


@dataclass(frozen=True, slots=True)
class Trace:
    """Hutchinson's estimate of a trace.

    Args:
        mean: Mean of xᵀHx over random signs x.
        error: Its standard error; None for one x.
        vectors: Number of x.
    """

    mean: float
    error: float | None
    vectors: int


def traces(loss_function: LossFunction, probes: int, seed: int) -> tuple[Trace, dict[str, Trace]]:
    """Estimate the trace of the joint Hessian, and of every layer's block, from the same products.

    With random signs x, E[xᵀHx] = tr(H) (Hutchinson 1990); and E[x_ℓᵀ(Hx)_ℓ] = tr(H_ℓℓ), because the other blocks'
    terms have mean zero, though they add to the variance.

    Args:
        loss_function: The loss.
        probes: Number of random vectors.
        seed: Seed of their signs.

    Reference:
        Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix".
    """
    generator = torch.Generator().manual_seed(seed)
    by_layer: dict[str, list[float]] = {layer: [] for layer in loss_function.layers}
    for _ in range(probes):
        signs = (torch.randint(0, 2, (loss_function.params,), generator=generator) * 2 - 1).float()
        signs = signs.to(loss_function.device)
        for layer, part in loss_function.split(signs * loss_function.product(signs)).items():
            by_layer[layer].append(float(part.sum(dtype=torch.float64)))
    together = [sum(terms) for terms in zip(*by_layer.values(), strict=True)]
    return _mean_with_error(together), {layer: _mean_with_error(samples) for layer, samples in by_layer.items()}


def _mean_with_error(samples: Sequence[float]) -> Trace:
    n = len(samples)
    mean = sum(samples) / n
    if n < 2:
        return Trace(mean, None, n)
    return Trace(mean, math.sqrt(sum((sample - mean) ** 2 for sample in samples) / (n - 1) / n), n)


def projected(gradient: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients ⟨v_j, g⟩ ``(k,)`` of a gradient, and Σ_j ⟨v_j, g⟩ v_j ``(n,)``."""
    coefficients = vectors.T @ gradient
    return coefficients, vectors @ coefficients


def surrogate(coefficients: Tensor, matrix: Tensor, joint: bool, size: int, squared: float) -> Surrogate:
    """Return how many eigenpairs, and which matrix rank, hold most of a projected gradient.

    Args:
        coefficients: Coefficients of all eigenpairs in order, ``(k,)``.
        matrix: The projected gradient of this layer, ``(out, in)``.
        joint: Whether the eigenpairs are those of all layers together.
        size: Number of parameters of the eigenvectors.
        squared: ‖g‖² of the projected gradient.
    """
    energy_held = coefficients.double().square().cumsum(0)
    s = torch.linalg.svdvals(matrix.double())
    energy = s.square().cumsum(0)
    has_energy = bool(energy[-1] > 0)
    return Surrogate(
        eigenpairs=len(coefficients),
        joint=joint,
        share=min(1.0, float(energy_held[-1]) / squared) if squared else None,
        random=min(1.0, len(coefficients) / size),
        pairs_at=int((energy_held < SHARE * energy_held[-1]).sum()) + 1 if has_energy else None,
        rank_at={
            f"{share:g}": int((energy < share * energy[-1]).sum()) + 1 if has_energy else None for share in SHARES
        },
        rank=int((s > ROUNDING * s[0]).sum()) if has_energy else 0,
    )
