"""Records of ``probe gain``."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import Count, Nats, Norm, Shown, WholeRecord


def count_parts(values: Iterable[float], total: float, share: float) -> int | None:
    """Return the number of the largest values whose sum reaches a share of the total; None if the
    total is not positive or their sum does not reach it.

    >>> count_parts([1.0, 6.0, -1.0, 4.0], 10.0, 0.9), count_parts([1.0], 0.0, 0.9)
    (2, None)
    """
    if total <= 0:
        return None
    sums = accumulate(sorted(values, reverse=True))
    return next((count for count, value in enumerate(sums, 1) if value >= share * total), None)


class LayerGain(WholeRecord):
    """The part of the gain that one layer's update carries: −∫⟨∇L(W_0 + t·ΔW), ΔW_ℓ⟩dt over t from
    0 to 1.

    An attribution along the straight path, by which the layers add up to the gain; not the effect
    of removing the layer, nor of training it alone. All in nats per prediction.

    Args:
        set: File name of the text.
        shifted: Whether it is of another distribution.
        layer: The weight's name in BASE.
        shape: ``(out, in)`` as stored.
        fro: ‖ΔW‖_F.
        gain: a_ℓ; positive where the update lowers the loss.
        gain_error: Its standard error, from blocks of sequences; null for one sequence.
        quadrature_error: Distance of ``gain`` from the rule on every second node.
        along: −⟨∇L, ΔW_ℓ⟩ at each node of the path.
        by_sequence: a_ℓ of each sequence, summed over its predictions, to 6 decimals.
        sigma: Singular values of the directions; empty for a layer that is not split.
        directions: a_i of each direction, to 6 significant digits.
        direction_errors: Their standard errors, to 3 digits; empty for one sequence.
        rest: Gain of the directions beyond ``directions``; 0 if all are there.
        negative: Sum of the negative a_i; of the layer if it is not split.
        count_at: Number of directions with the largest a_i that have 50, 90 and 95% of ``gain``;
            null if it is not positive, or more are needed than were split.
    """

    key: ClassVar[tuple[str, ...]] = ("set", "layer")
    record: Literal["layer_gain"] = "layer_gain"
    set: str
    shifted: bool = False
    layer: str
    shape: tuple[int, int]
    fro: Norm
    gain: Nats
    gain_error: Nats | None
    quadrature_error: Nats
    along: tuple[Nats, ...]
    by_sequence: tuple[Nats, ...]
    sigma: tuple[Norm, ...]
    directions: tuple[Nats, ...]
    direction_errors: tuple[Nats, ...]
    rest: Nats
    negative: Nats
    count_at: dict[str, int | None]

    @property
    def energy(self) -> float:
        """‖ΔW‖_F²."""
        return self.fro**2

    @property
    def tails(self) -> tuple[float, ...]:
        """Σ_{i>r} a_i over the directions that lower the loss, for r = 0, 1, …, in the order of σ:
        the gain that ΔW_r leaves out by attribution.
        """
        positive = [max(gain, 0.0) for gain in self.directions]
        return tuple(reversed([*accumulate(reversed(positive), initial=0.0)]))

    @property
    def parts(self) -> list[tuple[float, float]]:
        """Gain and energy of each direction; of the whole layer if it is not split."""
        if not self.sigma:
            return [(self.gain, self.energy)]
        return [(gain, s**2) for gain, s in zip(self.directions, self.sigma, strict=True)]


class Gain(WholeRecord):
    """The gain of the whole update on one text, and whether its layers add up to it.

    Args:
        set: File name of the text.
        shifted: Whether it is of another distribution.
        data: Hash of the text.
        tokens: Number of predictions.
        nodes: t at which the gradients were computed.
        losses: Loss at each t.
        gain: Loss of BASE minus that of TUNED.
        gain_error: Its standard error, from paired differences of blocks of sequences; null for one
            sequence.
        attributed: Σ a_ℓ over all records of layers.
        residual: ``gain`` − ``attributed``; null if layers were not selected or left out, whose
            part it includes.
        quadrature_error: Distance of ``attributed`` from the rule on every second node.
        cancellation: Σ|a_ℓ| / |Σ a_ℓ|; 1 if no layer counteracts another; null for a sum of 0.
        barrier: Largest loss along the path minus the larger one of its ends; 0 or more.
        barrier_error: Standard error of this difference; null for one sequence, or without barrier.
        base_nll: Summed negative log-likelihood of each sequence at BASE, in nats to 6 decimals.
        tuned_nll: Likewise at TUNED.
        predictions: Number of predictions of each sequence.
    """

    key: ClassVar[tuple[str, ...]] = ("set",)
    record: Literal["gain"] = "gain"
    set: str
    shifted: bool = False
    data: str
    tokens: Count
    nodes: tuple[float, ...]
    losses: tuple[Nats, ...]
    gain: Nats
    gain_error: Nats | None
    attributed: Nats
    residual: Nats | None
    quadrature_error: Nats
    cancellation: float | None
    barrier: Nats
    barrier_error: Nats | None
    base_nll: tuple[Nats, ...]
    tuned_nll: tuple[Nats, ...]
    predictions: tuple[Count, ...]

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return len(self.predictions)


Subject = Literal["base", "tuned", "without", "alone", "uniform", "directions", "dropped"]


class GainLoss(WholeRecord):
    """The measured loss of BASE with a part of the update. What is not split into directions is as
    in TUNED, except for ``base`` and ``alone``.

    Args:
        set: Name of the text.
        shifted: Whether it is of another distribution.
        subject: The part: ``without`` or ``alone``, all but ``name`` or only it; ``uniform``,
            ΔW_r of every layer with r = ``amount``; ``directions``, so many with the largest gain
            per parameter; ``dropped``, all but so many whose gain is at most the fraction ``name``
            of what they cost on a shifted text; or none of it, ``base``, or all, ``tuned``.
        name: The module type, layer or fraction; empty otherwise.
        amount: The rank, or number of directions; 0 otherwise.
        params: Σ(out + in) over the directions that are kept; null where they are not counted.
        data: Hash of the text.
        tokens: Number of predictions.
        sequences: Number of sequences.
        loss: Loss in nats.
        gap: Loss minus that of TUNED.
        gap_error: Its standard error, from paired differences of blocks of sequences; null for one
            sequence.
        kept: (loss_base − loss) / (loss_base − loss_tuned); null if TUNED's is BASE's.
        kept_error: Its standard error, likewise.
    """

    key: ClassVar[tuple[str, ...]] = ("set", "subject", "name", "amount")
    record: Literal["gain_loss"] = "gain_loss"
    set: str
    shifted: bool = False
    subject: Subject
    name: str = ""
    amount: Count = 0
    params: Annotated[Count | None, Shown(form="count", terminal=True)] = None
    data: str
    tokens: Count
    sequences: Count
    loss: Annotated[Nats, Shown(main=True, form=".4f")]
    gap: Annotated[
        Nats,
        Shown(title="to TUNED", main=True, form="+.4f", error="gap_error", sequences="sequences"),
    ]
    gap_error: Nats | None
    kept: Annotated[
        float | None,
        Shown(
            title="gain kept",
            main=True,
            form=".3f",
            drop=1,
            error="kept_error",
            sequences="sequences",
        ),
    ]
    kept_error: float | None
