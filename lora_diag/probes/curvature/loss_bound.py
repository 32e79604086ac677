"""Loss of a truncation: the second-order model at the fine-tuned point, its bounds, and the measured loss.

With E = ΔW_r − ΔW over all truncated layers, L(W_tuned + E) − L(W_tuned) = ⟨∇L, E⟩ + ½⟨E, H(ξ)E⟩ for some point ξ
between the two (Taylor). So it is at most ⟨∇L, E⟩ + (λ/2)‖E‖² if no curvature between them exceeds λ; λ is measured at
one end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, measure
from lora_diag.models.opening import Model
from lora_diag.models.swapping import FULL, Swapped
from lora_diag.probes.curvature.measure import LossFunction
from lora_diag.probes.curvature.record import LossBound

# Rounding to float32 in a mean loss of order 1: two evaluations of one model in different batches differ by 1e-7.
ROUNDING = 1e-6


@dataclass(frozen=True)
class TunedPoint:
    """Quantities at W_tuned.

    Args:
        weights: Weights of the truncated layers, ``(n,)``.
        gradient: ∇L, ``(n,)``.
        losses: Losses of the set.
        largest: The joint largest eigenvalue λ.
        smallest: The smallest eigenvalue μ; None if it is not positive.
    """

    weights: Tensor
    gradient: Tensor
    losses: Losses
    largest: float
    smallest: float | None


def inner(x: Tensor, y: Tensor) -> float:
    """Return ⟨x, y⟩, summed in float64."""
    return float(x.double() @ y.double())


def loss_bounds(
    model: Model,
    loss_function: LossFunction,
    swapped: Swapped,
    tuned: TunedPoint,
    rank: int,
    along: Sequence[float],
    texts: Texts,
    size: int,
    after: Callable[[], None],
) -> list[LossBound]:
    """Return the records of one rank, one for each point between TUNED and the truncated update.

    Args:
        model: The model to change.
        loss_function: Its loss as a function of the truncated layers.
        swapped: Its weights; on return, truncated to ``rank``.
        tuned: Quantities at TUNED.
        rank: r.
        along: Fractions t of the distance.
        texts: The set.
        size: Sequences in a batch.
        after: Called after every batch of a loss.
    """
    swapped.arrange({**dict.fromkeys(swapped.layers, FULL), **dict.fromkeys(loss_function.layers, rank)})
    truncated = loss_function.weights()
    change = truncated - tuned.weights
    loss_function.put(tuned.weights)
    linear = inner(tuned.gradient, change)
    quadratic = 0.5 * inner(change, loss_function.product(change))
    energy = inner(change, change)
    records = []
    for t in along:
        loss_function.put(truncated if t == 1 else tuned.weights + t * change)
        losses = measure(model, texts, size, after)
        curvature = inner(change, loss_function.product(change)) / energy if energy else 0.0
        gap, error = losses.minus(tuned.losses)
        upper = t * t * tuned.largest / 2 * energy
        records.append(
            LossBound(
                set=texts.name,
                data=texts.hash,
                tokens=losses.tokens,
                rank=rank,
                along=t,
                tail_energy=t * t * energy,
                linear=t * linear,
                quadratic=t * t * quadratic,
                upper=upper,
                lower=None if tuned.smallest is None else t * t * tuned.smallest / 2 * energy,
                curvature=curvature,
                loss=losses.mean,
                gap=gap,
                gap_error=error,
                sequences=len(losses.sums),
                holds=gap <= t * linear + upper + ROUNDING * max(1.0, losses.mean),
            )
        )
    loss_function.put(truncated)  # restore the values that ``swapped`` expects
    return records
