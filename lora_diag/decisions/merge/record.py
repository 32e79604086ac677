"""Records of ``merge``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import (
    Count,
    Guard,
    LayerRecord,
    Nats,
    Norm,
    Ratio,
    Share,
    Shown,
    WholeRecord,
)


def _pool(field: str) -> Callable[[Sequence[Merged]], float | None]:
    """Return a function that pools a field over layers with weights ‖ΔW_k‖²."""
    return lambda records: pooled_kept(records, field)


# An update collides with the others where they remove more than this fraction of it, and more than
# this number of standard deviations of random updates.
COLLISION, COLLISION_ERRORS = 0.1, 3.0


class Merged(LayerRecord):
    """One update of a layer, and what is left of it in the merge M that was written; none for an
    update of zero.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``; of a 1-D tensor ``(n,)``.
        update: Path of the input with ΔW_k.
        weight: w_k.
        fro: ‖ΔW_k‖_F.
        merged_fro: ‖M‖_F of the exact merge, before truncation and rounding.
        norm_ratio: Norm of the merge over that of the update, ``merged_fro`` / ``fro``.
        kept: Factor with which the update is in the written M, ⟨M, ΔW_k⟩ / ‖ΔW_k‖². It is 1 for a
            whole update, 1/K for the mean of orthogonal ones, below 0 for a reversed one.
        kept_mean: Value of ``kept`` for the mean of all updates, (1/K)·Σ_j ⟨ΔW_j, ΔW_k⟩ / ‖ΔW_k‖².
        kept_random: Value of ``kept`` for random updates with the same singular values. It is λw_k
            for an untruncated weighted sum, whose expectation it is; else an estimate, from one
            random draw. Null for updates without factors, except for the sum, and for 1-D tensors.
        others: Fraction of the update that the others add to it, ⟨Σ_{j≠k} w_jΔW_j, ΔW_k⟩ /
            (w_k‖ΔW_k‖²), below 0 where they remove some of it; null for w_k = 0.
        others_random: Root mean square of ``others`` for randomly rotated updates, whose mean is 0.
        directions: Energy fraction of the update in the spaces of the written M, ‖UᵀΔW_kV‖² /
            ‖ΔW_k‖² with U and V its singular vectors; null for a checkpoint whose M has no factors.
        directions_random: The same for random updates, as ``kept_random``; null for an untruncated
            weighted sum.
        sign_conflict: Fraction of entries with opposite signs in the update and the weighted sum of
            the others, ½ by chance. It is of the entries in which both are nonzero, in up to 64
            random rows; null for 1-D tensors, and without such an entry.
        sign_conflict_error: Standard error of ``sign_conflict`` over the rows; 0 if all rows are
            measured.
        rank: Rank of the written factors; 0 for a merge of zero. Null for a checkpoint.
        params: rank·(out + in); null for a checkpoint.
        epsilon: ‖M − M_written‖_F / ‖M‖_F, from truncation and rounding of factors; for a
            checkpoint from rounding W + M. Null for M = 0.
        epsilon_min: The smallest of any update of this rank (Eckart–Young), up to ``energy_error``;
            null also for a checkpoint.
        energy_error: Bound on the error of ``epsilon_min``²; null likewise.
        dtype: Dtype of the written values.
        method: Method of the singular vectors; empty without.
    """

    key: ClassVar[tuple[str, ...]] = ("layer", "update")
    part_label: ClassVar[str] = "{update}"
    table: ClassVar[tuple[Shown | str, ...]] = (
        "kept",
        "kept_random",
        "kept_mean",
        "others",
        "directions",
        "sign_conflict",
    )
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard(
            "kept",
            "lower",
            "less of the update survives the merge than before: check weights, rank and conflicts",
        ),
    )
    record: Literal["merged"] = "merged"
    layer: str
    shape: tuple[int, ...]
    update: str
    weight: float
    fro: Norm
    merged_fro: Norm
    norm_ratio: Annotated[Ratio, Shown(title="‖M‖/‖ΔW‖", main=True, drop=2)]
    kept: Annotated[float, Shown(main=True, pool=_pool("kept"), form=".3f", terminal=True)]
    kept_mean: Annotated[
        float, Shown(title="mean", drop=4, pool=_pool("kept_mean"), form=".3f", terminal=True)
    ]
    kept_random: Annotated[
        float | None, Shown(title="chance", pool=_pool("kept_random"), form=".3f", terminal=True)
    ] = None
    others: Annotated[
        float | None, Shown(drop=6, pool=_pool("others"), form=".3f", terminal=True, detail=True)
    ] = None
    others_random: Ratio | None = None
    directions: Annotated[
        Share | None, Shown(drop=3, pool=_pool("directions"), form="percent", terminal=True)
    ] = None
    directions_random: Share | None = None
    sign_conflict: Annotated[
        Share | None,
        Shown(title="signs", error="sign_conflict_error", drop=5, terminal=True, detail=True),
    ] = None
    sign_conflict_error: Share | None = None
    rank: Count | None = None
    params: Count | None = None
    epsilon: Ratio | None = None
    epsilon_min: Ratio | None = None
    energy_error: Share | None = None
    dtype: str
    method: str = ""

    @property
    def collides(self) -> bool:
        """Whether the others remove more than a tenth of the update, and clearly more than random
        ones could.
        """
        limit = max(COLLISION, COLLISION_ERRORS * (self.others_random or 0.0))
        return self.others is not None and self.others < -limit


def pooled_kept(records: Sequence[Merged], field: str) -> float | None:
    """Return a fraction of updates over several layers, weighted by ‖ΔW_k‖²; None if a layer has
    none.
    """
    values = [(getattr(record, field), record.fro) for record in records if record.fro]
    if not values or any(value is None for value, _ in values):
        return None
    largest = max(fro for _, fro in values)
    weights = [(fro / largest) ** 2 for _, fro in values]
    return math.fsum(v * w for (v, _), w in zip(values, weights, strict=True)) / math.fsum(weights)


def select_layers(records: Sequence[Merged]) -> list[Merged]:
    """Return the first record of each layer, for what its records have in common."""
    return list({record.layer: record for record in reversed(records)}.values())[::-1]


def pooled_epsilon(records: Sequence[Merged], field: str = "epsilon") -> float | None:
    """Return ‖M − M_written‖ / ‖M‖ over several layers, or another error of the layers; None
    without any.
    """
    layers = [r for r in select_layers(records) if getattr(r, field) is not None and r.merged_fro]
    whole = math.hypot(*(r.merged_fro for r in layers))
    return (
        math.hypot(*(getattr(r, field) * r.merged_fro for r in layers)) / whole if whole else None
    )


class MergedLoss(WholeRecord):
    """The loss of one merge on one held-out text; also that of BASE, and of an update alone on the
    text of its task.

    Numbers are null if the loss is not finite. Errors are paired by sequence; null for one
    sequence.

    Args:
        set: Name of the text.
        shifted: False.
        data: Hash of the sequences.
        tokens: Number of predictions in all sequences.
        update: Path of the update whose task it is; null for a text of none.
        method: Method of the merge, ``base`` for BASE, or ``alone`` for the update alone.
        scale: λ; null for ``base`` and ``alone``.
        loss: Held-out loss per prediction, in nats. It is over the sequences after ``skipped``.
        loss_error: Its standard error.
        change: Loss minus that of BASE.
        change_error: Standard error of ``change``.
        gap: Loss minus that of the update alone; null for a text of no update.
        gap_error: Standard error of ``gap``.
        kept: Fraction of the update's gain over BASE; null if it has none, or there is no update.
        skipped: Number of first sequences that chose the merge, and are in no number but ``cost``;
            0 for one merge.
        cost: What the choice minimizes over these sequences (all, if none is skipped): the largest
            rise above the updates alone over the texts, or their mean (``choose``); on a text of no
            update, above BASE.
        chosen: Whether this merge was written.
        nll: Negative log-likelihood of every sequence, in nats.
        predictions: Number of predictions of every sequence; for ``base`` only.
    """

    key: ClassVar[tuple[str, ...]] = ("set", "method", "scale")
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard(
            "loss",
            "higher",
            "the merge is worse on this text than before: compare methods with --method all",
        ),
    )
    record: Literal["merged_loss"] = "merged_loss"
    set: str
    shifted: bool = False
    data: str
    tokens: Count
    update: str | None = None
    method: str
    scale: float | None = None
    loss: Annotated[Nats | None, Shown(main=True, form=".4f")]
    loss_error: Nats | None = None
    change: Annotated[
        Nats | None,
        Shown(title="to BASE", main=True, form="+.4f", error="change_error", sequences="count"),
    ] = None
    change_error: Nats | None = None
    gap: Annotated[
        Nats | None,
        Shown(title="to alone", form="+.4f", terminal=True, error="gap_error", sequences="count"),
    ] = None
    gap_error: Nats | None = None
    kept: Annotated[float | None, Shown(form=".2f", main=True)] = None
    skipped: Count = 0
    cost: Nats | None = None
    chosen: bool = False
    nll: tuple[Nats, ...] = ()
    predictions: tuple[Count, ...] = ()

    @property
    def count(self) -> int:
        """Number of sequences of the loss."""
        return len(self.nll) - self.skipped
