"""Records of ``probe curvature``: curvature of the loss at a point, and its prediction for a
truncated update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import Count, Nats, Record, Share, Shown, WholeRecord

Point = Literal["base", "tuned"]
Matrix = Literal["hessian", "ggn"]


class Surrogate(Record):
    """The gradient at BASE projected on the top eigenpairs: the article's third surrogate of an
    update's spectrum.

    With g = ∇L(W_0) of a layer and v_1, …, v_K the eigenvectors, P = Σ_j ⟨v_j, g⟩ v_j, read as a
    matrix (out, in).

    Args:
        eigenpairs: K.
        joint: Whether the eigenvectors are those of all layers jointly, restricted to this layer;
            else of its own block.
        share: ‖P‖²/‖g‖² of the gradient: of all layers if ``joint``, else of this layer;
            null if g is 0.
        random: Expected fraction in a random K-dimensional space, K over the number of parameters.
        pairs_at: The smallest m such that the first m eigenpairs hold 90% of ‖P‖²; null if P is 0.
        rank_at: Matrix rank of P at 90%, 95% and 99% of its energy; null if P is 0.
        rank: rank(P) up to rounding: at most K times the rank of an eigenvector's matrix.
    """

    eigenpairs: Count
    joint: bool
    share: Share | None
    random: float
    pairs_at: Count | None
    rank_at: dict[str, int | None]
    rank: int


def _pool_norm(records: Sequence[Curvature]) -> float:
    """Return the norm of the gradient of several layers together."""
    return math.hypot(*(record.gradient for record in records))


def _pool_trace_error(records: Sequence[Curvature]) -> float | None:
    """Return the standard error of the sum of traces with independent errors; None if
    one has none.
    """
    errors = [record.trace_error for record in records if record.trace_error is not None]
    return math.hypot(*errors) if len(errors) == len(records) else None


class Curvature(WholeRecord):
    """Curvature of the loss at one point: of one layer, or of all layers jointly.

    The loss is the mean negative log-likelihood over the predictions of the evaluation set, without
    dropout.

    Args:
        set: The evaluation set, by its file's name.
        data: Hash of the evaluation file.
        tokens: Number of predictions in the mean loss.
        layer: The weight's name in BASE; null for all layers jointly.
        at: The point: ``base`` or ``tuned``.
        matrix: ``hessian`` or ``ggn``, the generalised Gauss–Newton matrix.
        params: Number of parameters n.
        loss: Loss at the point, in nats.
        gradient: Norm of the gradient of the loss, ‖∇L‖.
        eigenvalues: The largest eigenvalues, descending; empty if not computed for this layer.
        residual: ‖Hv − λv‖ of the largest; an eigenvalue is within this distance of λ; null if not
            computed.
        smallest: The smallest eigenvalue μ; null if not computed.
        smallest_residual: ‖Hv − μv‖, likewise; null if not computed, and in files of earlier
            versions.
        trace: Hutchinson's estimate of tr(H).
        trace_error: Standard error of ``trace``; null with one random vector.
        trace_vectors: Number of random vectors; null in files of earlier versions.
        products: Number of Hessian-vector products for the eigenvalues.
        surrogate: Surrogate from the gradient; null except for a layer at BASE.
    """

    key: ClassVar[tuple[str, ...]] = ("set", "layer", "at", "matrix")
    table: ClassVar[tuple[Shown | str, ...]] = (
        "params",
        Shown("trace", "trace", "Hutchinson's estimate of tr(H)", main=True, terminal=False),
        "gradient",
        Shown("largest", "λ max", "Largest eigenvalue", pool="max", terminal=True),
        "smallest",
        Shown("trace", "trace", "Hutchinson's estimate of tr(H)", pool="sum", terminal=True),
    )
    record: Literal["curvature"] = "curvature"
    set: str
    data: str
    tokens: Count
    layer: str | None
    at: Point
    matrix: Matrix
    params: Annotated[Count, Shown(pool="sum", form="count", terminal=True)]
    loss: Nats
    gradient: Annotated[float, Shown(title="‖∇L‖", main=True, pool=_pool_norm)]
    eigenvalues: tuple[float, ...] = ()
    residual: float | None = None
    smallest: Annotated[float | None, Shown(title="λ min", pool="min", terminal=True)] = None
    smallest_residual: float | None = None
    trace: float
    trace_error: Annotated[
        float | None, Shown(title="±", pool=_pool_trace_error, drop=1, terminal=True)
    ]
    trace_vectors: Count | None = None
    products: Count = 0
    surrogate: Surrogate | None = None

    @property
    def trace_half(self) -> float | None:
        """Half-width of the interval of ``trace`` (``errors_needed``); None for one
        random vector.
        """
        from lora_diag.metrics.statistics import errors_needed  # imports NumPy

        if self.trace_error is None:
            return None
        return self.trace_error * (
            errors_needed(self.trace_vectors - 1) if self.trace_vectors else 2.0
        )

    @property
    def largest(self) -> float | None:
        """The largest eigenvalue λ; None if not computed."""
        return self.eigenvalues[0] if self.eigenvalues else None

    @property
    def strongly_convex(self) -> bool:
        """Whether μ was computed and is above zero by more than float32 rounding, 1e-4·|λ|."""
        least = (self.smallest or 0.0) - (self.smallest_residual or 0.0)
        return least > 1e-4 * max((0.0, *self.eigenvalues))


class LossBound(WholeRecord):
    """Loss of a truncation by the second-order model at TUNED, and as measured on the same
    sequences.

    E = t(ΔW_r − ΔW) over all truncated layers jointly, and L(W) the loss; all other weights are
    those of TUNED.

    Args:
        set: The evaluation set.
        data: Hash of the evaluation file.
        tokens: Number of predictions in the mean loss.
        rank: r.
        along: t, the fraction of the distance from TUNED (0) to the truncated update (1).
        tail_energy: ‖E‖² = t²·Σ_{i>r}σ_i² over all truncated layers.
        linear: First-order term, ⟨∇L, E⟩.
        quadratic: Second-order term, ½⟨E, HE⟩.
        upper: Upper bound on the second-order term, (λ/2)‖E‖². λ is the joint largest eigenvalue
            at TUNED.
        lower: (μ/2)‖E‖² with μ the smallest eigenvalue if that is above 1e-4·|λ|; else null.
        curvature: ⟨E, H'E⟩/‖E‖² with H' the Hessian or GGN at W_tuned + E; 0 if E is 0.
        loss: L(W_tuned + E), measured.
        gap: Measured loss of the truncated model minus that of TUNED, L(W_tuned + E) − L(W_tuned).
        gap_error: Standard error of ``gap`` over other text of the distribution; on this set the
            gap is exact. Null for one sequence.
        sequences: Number of sequences; null in files of earlier versions.
        holds: Whether ``gap`` ≤ ``linear`` + ``upper``, up to rounding.
    """

    key: ClassVar[tuple[str, ...]] = ("set", "rank", "along")
    table: ClassVar[tuple[Shown | str, ...]] = (
        Shown(
            "gap",
            "gap",
            "Measured loss of the truncated model minus that of TUNED",
            main=True,
            terminal=False,
        ),
        Shown(
            "upper",
            "upper",
            "Upper bound on the second-order term, (λ/2)‖E‖²",
            main=True,
            terminal=False,
        ),
        "tail_energy",
        "linear",
        "quadratic",
        Shown("predicted", "model", "First and second order", form="+.4f", terminal=True),
        Shown("gap", "measured", "Measured loss minus that of TUNED", form="+.4f", terminal=True),
        Shown("predicted_ratio", "model÷", "Model over measured gap", form=".2f", terminal=True),
        Shown(
            "upper", "(λ/2)Σσ²", "Upper bound on the second-order term, (λ/2)‖E‖²", terminal=True
        ),
        Shown("upper_ratio", "bound÷", "Bound over measured gap", terminal=True),
    )
    record: Literal["loss_bound"] = "loss_bound"
    set: str
    data: str
    tokens: Count
    rank: int
    along: float
    tail_energy: Annotated[float, Shown(title="tail Σσ²", drop=3, terminal=True)]
    linear: Annotated[Nats, Shown(title="⟨∇L,E⟩", drop=2, form="+.4f", terminal=True)]
    quadratic: Annotated[Nats, Shown(title="½⟨E,HE⟩", drop=1, form="+.4f", terminal=True)]
    upper: Nats
    lower: Nats | None
    curvature: float
    loss: Nats
    gap: Nats
    gap_error: Nats | None
    holds: bool
    sequences: Count | None = None

    @property
    def gap_half(self) -> float | None:
        """Half-width of the interval of ``gap`` for other text (``paired_half``); None for one
        sequence.
        """
        from lora_diag.metrics.statistics import paired_half  # imports NumPy

        return paired_half(self.gap_error, self.sequences)

    @property
    def predicted(self) -> float:
        """⟨∇L, E⟩ + ½⟨E, HE⟩, the gap of the second-order model."""
        return self.linear + self.quadratic

    @property
    def predicted_ratio(self) -> float | None:
        """``predicted`` over ``gap``; None if the gap is below 1e-6 in size."""
        return self.predicted / self.gap if abs(self.gap) >= 1e-6 else None

    @property
    def upper_ratio(self) -> float | None:
        """``upper`` over ``gap``; None if the gap is below 1e-6."""
        return self.upper / self.gap if self.gap >= 1e-6 else None
