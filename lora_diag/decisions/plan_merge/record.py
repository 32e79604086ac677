"""Records of ``plan-merge``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import SHAPE, Count, LayerRecord, Norm, Ratio, Record, Share, Shown

Conclusion = Literal["merge", "merge into 16 bit", "serve unmerged"]

# Rules, not results: a merge keeps the update if c is within 1 ± COEFFICIENT_TOLERANCE, and the
# relative error is at most MAX_ERROR, so that the noise has a quarter of the update's energy at
# most. Both were compared with the loss of one LoRA of a 135 M model at three sizes of ΔW, merged
# into bf16: errors of 0.53, 0.71 and 0.84 cost 0%, 9% and 25% of its gain, those of fp16 (0.09 at
# full size) nothing (docs/reference/plan-merge.md).
COEFFICIENT_TOLERANCE = 0.1
MAX_ERROR = 0.5
# Where BASE is served in the format, too, a merge is no worse than the adapter on the rounded BASE
# if c is within the tolerance, and the squared error exceeds that of rounding BASE by at most this
# fraction of it plus MAX_ERROR². It was compared with losses in six formats (docs/evidence.md), of
# which q8_0 and q4_0 were measured afterwards.
MAX_EXCESS = 0.01

_STYLES = {"merge": "", "merge into 16 bit": "bold yellow", "serve unmerged": "bold yellow"}


class FormatEffect(Record):
    """How much of ΔW a format keeps, and the error.

    Args:
        arrived: c = ⟨Q(W + ΔW) − W, ΔW⟩ / ‖ΔW‖²; null if ΔW = 0 or an entry overflows.
        error: ‖Q(W + ΔW) − W − ΔW‖_F / ‖ΔW‖_F; null likewise.
    """

    arrived: float | None
    error: Ratio | None

    @property
    def survives(self) -> bool:
        """Whether a merge keeps the update, by ``COEFFICIENT_TOLERANCE`` and ``MAX_ERROR``; False
        if one is null.
        """
        if self.arrived is None or self.error is None:
            return False
        return abs(self.arrived - 1) <= COEFFICIENT_TOLERANCE and self.error <= MAX_ERROR


def is_no_worse_than_unmerged(target: FormatEffect, base_error: float | None) -> bool:
    """Return whether a merge is as near W + ΔW as Q(W) with the adapter, by ``MAX_EXCESS``; False
    if one is null.

    Where the format holds W itself, so that Q(W) with the adapter loses nothing, the merge has to
    keep the update.
    """
    if target.arrived is None or target.error is None or base_error is None:
        return False
    if base_error <= MAX_ERROR:
        return target.survives
    kept = abs(target.arrived - 1) <= COEFFICIENT_TOLERANCE
    return kept and target.error**2 <= (1 + MAX_EXCESS) * base_error**2 + MAX_ERROR**2


def conclude(
    to: str, target: FormatEffect, sixteen: Iterable[FormatEffect], base_error: float | None
) -> Conclusion:
    """Return the conclusion by the rules.

    ``merge`` if the format keeps the update. Else, where a quantized format holds W itself
    (``base_error`` at most ``MAX_ERROR``), ``serve unmerged``: BASE in that format and the adapter
    lose nothing. Else ``merge into 16 bit`` if bf16 or fp16 keeps it, and ``serve unmerged`` if
    neither does.
    """
    if target.survives:
        return "merge"
    if to not in {"bf16", "fp16"} and base_error is not None and base_error <= MAX_ERROR:
        return "serve unmerged"
    return "merge into 16 bit" if any(effect.survives for effect in sixteen) else "serve unmerged"


class PlannedMerge(LayerRecord):
    """One layer, and the fraction of its ΔW that a merge in a format would keep.

    Q rounds to the format.

    Args:
        layer: The weight's name in BASE; one matrix of a stack is ``name[3]``.
        shape: ``(out, in)``, as it is stored.
        to: The format.
        fro: ‖ΔW‖_F.
        base_fro: ‖W‖_F.
        arrived: Fraction of ΔW that is kept, c = ⟨Q(W + ΔW) − W, ΔW⟩ / ‖ΔW‖²; null where ΔW = 0 or
            an entry overflows.
        error: ‖Q(W + ΔW) − W − ΔW‖_F / ‖ΔW‖_F; null likewise.
        moved: Fraction of the entries whose code in Q(W + ΔW) differs from that in Q(W). A code is
            the number itself in bf16 and fp16, and the number without its scale in the other
            formats.
        overflow: Number of entries of W + ΔW that are not finite in the format.
        base_error: Error of the format without any adapter, ‖Q(W) − W‖_F / ‖ΔW‖_F; null where ΔW =
            0 or W overflows.
        base_error_inside: Part of this error on the inputs that the adapter reads, ‖(Q(W) − W)V‖_F
            / ‖ΔW‖_F. V is an orthonormal basis of the row space of A. Null also then, and for
            updates that are not a product B·A.
        base_noise: Rounding noise of BASE's own quantized format, √(Σ step²/12) / ‖ΔW‖_F over its
            steps. It is about the existing error of BASE; null where BASE is not quantized or
            ΔW = 0.
        bf16: Fraction of ΔW that survives in bf16, and the error.
        fp16: Fraction of ΔW that survives in fp16, and the error.
        conclusion: What to do with this layer. ``merge``: the format keeps the update: c within 10%
            of 1, relative error at most 0.5. ``merge into 16 bit``: it does not, and bf16 or fp16
            does; merge into one of these. ``serve unmerged``: the merge would lose the update;
            serve BASE with the adapter unmerged. Null if ΔW = 0. See ``conclude``.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        "conclusion",
        SHAPE,
    )
    record: Literal["plan_merge"] = "plan_merge"
    layer: str
    shape: tuple[int, int]
    to: str
    fro: Norm
    base_fro: Norm
    arrived: Annotated[
        float | None,
        Shown(
            title="scale c",
            main=True,
            pool=lambda records: pool_effects(records).arrived,
            form="factor",
        ),
    ]
    error: Annotated[
        Ratio | None,
        Shown(
            title="relative error",
            main=True,
            pool=lambda records: pool_effects(records).error,
            head="error",
        ),
    ]
    moved: Annotated[
        Share,
        Shown(
            form="percent",
            drop=2,
            terminal=True,
            pool=lambda records: _pool_moved(records),
            detail=True,
        ),
    ]
    overflow: Count
    base_error: Annotated[
        Ratio | None,
        Shown(
            drop=3,
            terminal=True,
            pool=lambda records: pool_ratios(records, lambda record: record.base_error),
            detail=True,
        ),
    ]
    base_error_inside: Annotated[
        Ratio | None,
        Shown(
            drop=4,
            head="inside",
            terminal=True,
            pool=lambda records: pool_ratios(records, lambda record: record.base_error_inside),
            detail=True,
        ),
    ]
    base_noise: Annotated[
        Ratio | None,
        Shown(
            drop=5,
            terminal=True,
            pool=lambda records: pool_ratios(records, lambda record: record.base_noise),
        ),
    ]
    bf16: FormatEffect
    fp16: FormatEffect
    conclusion: Annotated[
        Conclusion | None,
        Shown(
            main=True,
            pool=lambda records: conclude_together(records),
            style=lambda word: _STYLES.get(word, ""),
        ),
    ]


def pool_effects(
    records: Sequence[PlannedMerge],
    of: Callable[[PlannedMerge], PlannedMerge | FormatEffect] = lambda record: record,
) -> FormatEffect:
    """Return c and error of several layers together; null without an update, or on overflow.

    Args:
        records: The layers.
        of: Returns c and error of a layer in one format; default those in its target format.
    """
    changed = [(of(record).arrived, record.fro) for record in records if record.fro]
    arrived = None
    if changed and all(c is not None for c, _ in changed):
        arrived = sum((c or 0.0) * fro**2 for c, fro in changed) / sum(fro**2 for _, fro in changed)
    return FormatEffect(
        arrived=arrived, error=pool_ratios(records, lambda record: of(record).error)
    )


def pool_ratios(
    records: Sequence[PlannedMerge], of: Callable[[PlannedMerge], float | None]
) -> float | None:
    """Return a norm over ‖ΔW‖, pooled over the layers with an update; None if there is none, or one
    has no value.

    Args:
        records: The layers.
        of: Returns the norm of a layer over its ‖ΔW‖_F.
    """
    pairs = [(of(record), record.fro) for record in records if record.fro]
    if not pairs or any(value is None for value, _ in pairs):
        return None
    return math.hypot(*((value or 0.0) * fro for value, fro in pairs)) / math.hypot(
        *(fro for _, fro in pairs)
    )


def _pool_moved(records: Sequence[PlannedMerge]) -> float:
    entries = [math.prod(record.shape) for record in records]
    return sum(record.moved * size for record, size in zip(records, entries, strict=True)) / sum(
        entries
    )


def conclude_together(records: Sequence[PlannedMerge]) -> Conclusion | None:
    """Return the conclusion for several layers together, by their pooled effects; None if no layer
    has an update.
    """
    if not any(record.fro for record in records):
        return None
    sixteen = [
        pool_effects(records, lambda record: record.bf16),
        pool_effects(records, lambda record: record.fp16),
    ]
    base_error = pool_ratios(records, lambda record: record.base_error)
    return conclude(records[0].to, pool_effects(records), sixteen, base_error)
