"""Records of ``verify-merge``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

from lora_diag.errors import DONE, GATE_FAILED, INCONCLUSIVE
from lora_diag.layers.lineage import COSINE_TO_BASE, Lineage, Verdict
from lora_diag.records.base import SHAPE, Count, LayerRecord, Norm, Ratio, Share, Shown

MergeStatus = Literal[
    "ok",
    "coarse",
    "inconclusive",
    "dropped",
    "partial",
    "wrong scale",
    "transposed",
    "wrong order",
    "other base",
    "changed",
    "missing",
    "other",
]

# Statuses of a correct merge, exact or in a shorter dtype.
CORRECT = frozenset({"ok", "coarse"})

Outcome = Literal["correct", "failed", "inconclusive"]


# From worst to best: failures come first.
ORDER: tuple[MergeStatus, ...] = (
    "missing", "dropped", "partial", "wrong scale", "transposed", "wrong order", "other base",
    "changed", "other", "inconclusive", "coarse", "ok",
)  # fmt: skip


def _style_status(status: MergeStatus) -> str:
    """Return the style of a status in a table."""
    return (
        ""
        if status == "ok"
        else "bold yellow"
        if status in {"coarse", "inconclusive"}
        else "bold red"
    )


def _pool_differing(records: Sequence[Merge]) -> float | None:
    """Return the fraction of entries that no rounding explains, over the checked layers; None
    without entries.
    """
    checked = [record for record in records if record.differing is not None]
    entries = sum(math.prod(record.shape) for record in checked)
    return sum(record.differing or 0 for record in checked) / entries if entries else None


class Merge(Lineage, LayerRecord):
    """One layer of BASE, and whether MERGED is W + ΔW there, entry by entry.

    Numbers are null if MERGED does not have the layer or an entry of it is not finite.

    Args:
        layer: The weight's name in BASE; one matrix of a stack is ``name[3]``, rows that the
            adapter adds to a vocabulary are ``name (added rows)``.
        shape: ``(out, in)``; of a 1-D tensor ``(n,)``.
        adapted: Whether the adapter changes the layer; else MERGED must be W.
        status: Whether MERGED is W + ΔW. ``ok``: every entry is a rounding of W + ΔW. ``coarse``:
            likewise, if ΔW was computed less precisely than MERGED's dtype allows, as in bfloat16;
            merge in float32 to keep all of it. ``inconclusive``: a rounding of W + ΔW and of W
            alone, or of W + c·ΔW with c 5% off, so that this file cannot distinguish them; merge
            into a finer format. ``dropped``: M = W: the update is missing; check that the merge
            loaded this adapter and saved after it. ``partial``: some rows or columns have ΔW, the
            others have W; check sharding and fused weights. ``wrong scale``: W + c·ΔW, c further
            from 1 than rounding allows; check α, rsLoRA and whether it was added twice.
            ``transposed``: W + ΔWᵀ; check fan_in_fan_out. ``wrong order``: the ΔW of another expert
            or layer, or with its halves swapped; check how names map to stacked weights.
            ``other base``: ΔW is there, on top of other weights than BASE's, or MERGED is unrelated
            to BASE (``lineage``); give the BASE of the merge. ``changed``: the adapter never
            touched it, MERGED differs; check what else was trained or converted. ``missing``:
            MERGED has no such weight; save it again. ``other``: none of these; merge again from the
            original files.
        dtype: The dtype that represents MERGED's values, which can be shorter than the stored one;
            null if missing.
        differing: Entries that no rounding of W + ΔW explains.
        differing_share: Fraction of the entries that no rounding of W + ΔW explains.
        max_ulp: The largest |M − (W + ΔW)|, in units of the spacing there. The spacing is that at
            the largest of |M|, |W| and the terms of ΔW (|B||A|), or the step of a quantized M where
            that is larger.
        scale: Fraction of ΔW in MERGED, c = ⟨M − W, ΔW⟩ / ‖ΔW‖². It is 1 for a merge without loss;
            null if ΔW = 0.
        scale_expected: c* = ⟨M* − W, ΔW⟩ / ‖ΔW‖² with M* = W + ΔW rounded once to ``dtype``: what
            ``scale`` is in a right merge. Null where ΔW = 0 and in files of versions before it was
            recorded.
        scale_error: Standard error of ``scale`` about ``scale_expected`` from the roundings in a
            right merge: those that M shows, and those of the adapter's factors. Null where ΔW = 0,
            where BASE and MERGED are both quantized, and in older files.
        retained: ``scale`` if the layer is correct, else null: the fraction of ΔW left by rounding.
        residual: ‖M − W − ΔW‖_F / ‖ΔW‖_F; null if ΔW = 0.
        unchanged: Fraction of the entries with M = W, or W rounded to ``dtype``.
        expected_fro: ‖ΔW‖_F.
        observed_fro: ‖M − W‖_F.
        base_fro: ‖W‖_F.
        cause: Likely cause as text; empty if the status is ``ok``. Sought on a sample of rows, and
            tested on the whole layer.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        "status",
        SHAPE,
        "dtype",
        "differing_share",
        "max_ulp",
        "unchanged",
        "scale",
        "residual",
        COSINE_TO_BASE,
    )
    record: Literal["merge"] = "merge"
    layer: str
    shape: tuple[int, ...]
    adapted: bool
    status: Annotated[
        MergeStatus,
        Shown(
            title="merge",
            main=True,
            pool=lambda records: min((record.status for record in records), key=ORDER.index),
            head="status",
            style=_style_status,
        ),
    ]
    dtype: Annotated[
        str | None,
        Shown(title="numbers", pool="each", drop=5, head="dtype", terminal=True, detail=True),
    ]
    differing: Count | None
    differing_share: Annotated[
        Share | None, Shown(title="differing", main=True, pool=_pool_differing, form="percent")
    ]
    max_ulp: Annotated[float | None, Shown(pool="max", drop=4, terminal=True, detail=True)]
    scale: Annotated[float | None, Shown(title="scale c", main=True, form="factor")]
    scale_expected: float | None = None
    scale_error: float | None = None
    retained: float | None
    residual: Annotated[Ratio | None, Shown(drop=3, terminal=True)]
    unchanged: Annotated[Share | None, Shown(drop=2, form="percent", terminal=True)]
    expected_fro: Norm | None
    observed_fro: Norm | None
    base_fro: Norm | None
    cause: str

    @property
    def lineage(self) -> Verdict | None:
        """As of ``judge_cosine``; None where a large ΔW, and not another BASE, explains a small
        cosine.
        """
        verdict = super().lineage
        return (
            None
            if verdict == "unrelated" and self.status not in {"other base", "changed", "other"}
            else verdict
        )

    @property
    def failed(self) -> bool:
        """Whether MERGED is certainly not W + ΔW."""
        return self.status not in CORRECT and self.status != "inconclusive"


def exit_code(records: Iterable[Merge]) -> int:
    """Return the exit code of ``verify-merge``, which depends on the outcome alone."""
    return {"correct": DONE, "failed": GATE_FAILED, "inconclusive": INCONCLUSIVE}[outcome(records)]


def outcome(records: Iterable[Merge]) -> Outcome:
    """Return the outcome of the merge over its layers.

    The merge fails if one layer does. It is inconclusive if a layer is, or if no adapted layer
    changed: even if rounding explains that, it cannot be distinguished from a dropped adapter.
    """
    layers = list(records)
    if any(record.failed for record in layers):
        return "failed"
    expected = [record for record in layers if record.adapted and record.expected_fro]
    has_changed = any(record.unchanged is not None and record.unchanged < 1 for record in expected)
    if any(record.status == "inconclusive" for record in layers) or not has_changed:
        return "inconclusive"
    return "correct"
