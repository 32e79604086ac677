"""Records of curvature at one point, of all layers jointly and of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lora_diag.linalg.eigenpairs import Eigenpairs
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses
from lora_diag.models.opening import Model
from lora_diag.models.swapping import Swapped
from lora_diag.probes.curvature.loss_bound import inner
from lora_diag.probes.curvature.measure import LossFunction, Trace, projected, surrogate, traces
from lora_diag.probes.curvature.record import Curvature, Matrix, Surrogate
from lora_diag.probes.curvature.record import Point as Where


@dataclass(frozen=True)
class Point:
    """A model at a point where curvature is measured.

    Args:
        model: The model.
        loss_function: Its loss as a function of the layers.
        swapped: Its weights, if there is a TUNED.
        texts: The set.
        batch: Sequences in a batch.
        at: Name of the point.
        matrix: ``hessian`` or ``ggn``.
    """

    model: Model
    loss_function: LossFunction
    swapped: Swapped | None
    texts: Texts
    batch: int
    at: Where
    matrix: Matrix


@dataclass(frozen=True, slots=True)
class Effort:
    """Extent of the computation.

    Args:
        top: Number of largest eigenvalues.
        probes: Number of random vectors of the trace.
        seed: Seed of both.
    """

    top: int
    probes: int
    seed: int


def curvatures(
    point: Point,
    effort: Effort,
    per: str,
    gradient: Tensor,
    losses: Losses,
    joint: bool,
    layers: Sequence[str],
) -> Iterator[list[Curvature]]:
    """Yield the requested records; records of one list belong together.

    Args:
        point: The point.
        effort: Extent of the computation.
        per: With ``all``, layers have the gradient, the trace and the surrogate of the joint eigenpairs; with
            ``layer``, their own eigenvalues and surrogate.
        gradient: ∇L, ``(n,)``.
        losses: Losses of the set.
        joint: Whether the joint record is requested.
        layers: Layers whose records are requested.
    """
    if not joint and not layers:
        return
    loss_function, parts = point.loss_function, point.loss_function.split(gradient)
    together, alone = traces(loss_function, effort.probes, effort.seed)
    if joint or (per == "all" and layers):
        largest, smallest = loss_function.ends(effort.top, effort.seed)
        records = [_record(point, losses, None, gradient, together, largest, smallest)]
        if per == "all":
            surrogates = _make_surrogates(loss_function, gradient, largest, joint=True) if point.at == "base" else {}
            records += [
                _record(point, losses, layer, parts[layer], alone[layer], surrogate=surrogates.get(layer))
                for layer in layers
            ]
        yield records
    for layer in layers if per == "layer" else ():
        block, own_gradient = loss_function.only(layer), parts[layer].reshape(-1)
        largest, smallest = block.ends(effort.top, effort.seed)
        surrogates = _make_surrogates(block, own_gradient, largest, joint=False) if point.at == "base" else {}
        yield [_record(point, losses, layer, own_gradient, alone[layer], largest, smallest, surrogates.get(layer))]


def _make_surrogates(
    loss_function: LossFunction, gradient: Tensor, largest: Eigenpairs, joint: bool
) -> dict[str, Surrogate]:
    """Return the surrogate of every layer from the part of the gradient in the span of the eigenpairs."""
    coefficients, whole = projected(gradient, largest.vectors)
    squared = inner(gradient, gradient)
    return {
        layer: surrogate(coefficients, part, joint, loss_function.params, squared)
        for layer, part in loss_function.split(whole).items()
    }


def _record(
    point: Point,
    losses: Losses,
    layer: str | None,
    gradient: Tensor,
    trace: Trace,
    largest: Eigenpairs | None = None,
    smallest: Eigenpairs | None = None,
    surrogate: Surrogate | None = None,
) -> Curvature:
    return Curvature(
        set=point.texts.name,
        data=point.texts.hash,
        tokens=losses.tokens,
        layer=layer,
        at=point.at,
        matrix=point.matrix,
        params=gradient.numel(),
        loss=losses.mean,
        gradient=float(gradient.double().norm()),
        eigenvalues=tuple(largest.values.tolist()) if largest else (),
        residual=largest.residual if largest else None,
        smallest=float(smallest.values[0]) if smallest else None,
        trace=trace.mean,
        trace_error=trace.error,
        trace_vectors=trace.vectors,
        products=(largest.products if largest else 0) + (smallest.products if smallest else 0),
        surrogate=surrogate,
    )
