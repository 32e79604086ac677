"""Records of ``recover``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Annotated, Any, ClassVar, Literal

from lora_diag.layers.lineage import COSINE_TO_BASE, Lineage
from lora_diag.records.base import Count, LayerRecord, Norm, Share, Shown, Value, pooled_value
from lora_diag.records.vocabulary import Hidden
from lora_diag.rendering.text import median_rank

STATUS = {
    "recovered": "recovered",
    "size_only": "size only",
    "not_hidden": "not hidden",
    "refused": "refused",
}


def _make_ratio(field: str) -> Callable[[Sequence[Any]], Value]:
    """Return a function that pools ‖·‖/‖W‖ over the layers with a value."""

    def pool_ratio(records: Sequence[Any]) -> Value:
        complete = [
            record for record in records if getattr(record, field) is not None and record.base_fro
        ]
        if not complete:
            return None
        return math.hypot(*(getattr(r, field) for r in complete)) / math.hypot(
            *(r.base_fro for r in complete)
        )

    return pool_ratio


def _describe_verdicts(records: Sequence[Any]) -> str:
    """Return the common verdict, or the best with its number of layers."""
    counts: Counter[str] = Counter(record.status for record in records)
    best = next(status for status in STATUS if counts[status])
    return STATUS[best] if len(counts) == 1 else f"{STATUS[best]} {counts[best]}/{len(records)}"


def _pool_file_ranks(records: Sequence[Any]) -> Value:
    """Return the median rank at 90% of ‖D‖²; None where a layer needs more than the values that
    were kept.
    """
    ranks = [rank for record in records if (rank := record.rank_at["0.9"]) is not None]
    return int(median(ranks)) if ranks and len(ranks) == len(records) else None


def _pool_estimated_ranks(records: Sequence[Any]) -> Value:
    """Return the median estimated rank at 90% of ‖X‖², ``> n`` if above n, the median number of
    directions; or None.
    """
    estimated = [record for record in records if record.rank_at_estimate is not None]
    if not estimated:
        return None
    beyond = int(median(record.directions or 0 for record in estimated))
    return median_rank([record.rank_at_estimate["0.9"] for record in estimated], beyond)


def _pool_directions(records: Sequence[Any]) -> Value:
    counts = [record.directions for record in records if record.directions is not None]
    return int(median(counts)) if counts else None


class Recovery(Hidden, Lineage, LayerRecord):
    """One layer's update before rounding, X, and the difference of the files, D; see ``Hidden`` for
    the other fields.

    Where TUNED is unrelated to BASE (``lineage``), the layer is refused: ``energy`` and ``rank_at``
    are null, nothing is written, and ``method`` is ``none``.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``.
        dtypes: Stored dtypes of base and tuned.
        fro: ‖D‖_F of the files.
        base_fro: ‖W_base‖_F.
        energy: C(r) of D, by r; null where D = 0.
        rank_at: Smallest r at which C(r) of D reaches the threshold; 0 where D = 0, null beyond the
            kept values.
        energy_error: Bound on the error of every energy fraction of D.
        method: Method of the singular values of D.
        written: Source of the layer's output: ``posterior``, from the estimate E[X | cells];
            ``file``, from D; ``nothing``.
        rank: Rank of the factors in the adapter; 0 without factors.
        params: rank·(out + in).
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        Shown(
            "status_words",
            "verdict",
            "Whether rounding hides an update, and whether it could be estimated",
            main=True,
            pool=_describe_verdicts,
        ),
        Shown(
            "unchanged",
            "unchanged",
            "Fraction of unchanged entries",
            share=True,
            main=True,
            form="percent",
        ),
        Shown(
            "relative",
            "‖D‖/‖W‖",
            "Norm of the difference of the files over that of the base",
            main=True,
            pool=_make_ratio("fro"),
            drop=1,
        ),
        Shown(
            "relative_estimate",
            "‖X‖/‖W‖",
            "Norm of the update before rounding, estimated, over that of the base",
            main=True,
            pool=_make_ratio("fro_estimate"),
        ),
        Shown(
            "kept", "‖D‖/‖X‖", "Norm of the files' difference over the estimated norm of the update"
        ),
        Shown(
            "rank_at.0.9",
            "r@90% file",
            "Smallest rank that keeps 90% of the energy of the files' difference",
            main=True,
            pool=_pool_file_ranks,
            drop=3,
        ),
        Shown(
            "rank_at_estimate.0.9",
            "r@90%",
            "Smallest rank whose estimated directions carry 90% of the update's energy; empty if "
            "they do not",
            axis="estimated rank at 90% of the energy",
            main=True,
            pool=_pool_estimated_ranks,
        ),
        Shown(
            "directions",
            "directions",
            "Directions of the update above the noise of the rounding",
            main=True,
            pool=_pool_directions,
            drop=5,
        ),
        Shown(
            "gain_z", "z", "Gain of hidden cells in standard errors", main=True, form=".1f", drop=2
        ),
        Shown(
            "fit_chi",
            "χ²/df",
            "Misfit of the changed entries by binade of |W|",
            drop=6,
            terminal=True,
        ),
        Shown("fit_misplaced", "misplaced", "Fraction of changed entries in the wrong binade"),
        Shown(
            "information",
            "information",
            "Fraction of an entry's variance that its cell removes",
            share=True,
        ),
        "rank",
        COSINE_TO_BASE,
    )
    record: Literal["recovery"] = "recovery"
    layer: str
    shape: tuple[int, int]
    dtypes: tuple[str, str]
    fro: Norm
    base_fro: Norm
    energy: dict[str, Share | None]
    rank_at: dict[str, int | None]
    energy_error: float
    method: str
    written: Literal["posterior", "file", "nothing"] = "nothing"
    rank: Annotated[int, Shown()] = 0
    params: Count = 0

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> str | None:
        """Return the problem with the settings of a run of ``recover``; None if they are valid."""
        ranks = settings.get("curve")
        if (
            not isinstance(ranks, list)
            or not ranks
            or not all(type(r) is int and r > 0 for r in ranks)
        ):
            return "settings.curve must be a list of ranks"
        return None

    @classmethod
    def shown_of(cls, settings: Mapping[str, Any], records: Sequence[Any]) -> tuple[Shown, ...]:
        """Return the columns in which some record, or all of them pooled, have a value."""
        return tuple(
            field
            for field in cls.shown
            if any(field.value(record) is not None for record in records)
            or pooled_value(field, records) is not None
        )

    @property
    def status_words(self) -> str:
        """``status`` as text."""
        return STATUS[self.status]

    @property
    def relative(self) -> float | None:
        """‖D‖ / ‖W_base‖; None where the base is zero."""
        return self.fro / self.base_fro if self.base_fro else None

    @property
    def relative_estimate(self) -> float | None:
        """‖X‖ / ‖W_base‖; None without an estimate, or where the base is zero."""
        return (
            self.fro_estimate / self.base_fro
            if self.base_fro and self.fro_estimate is not None
            else None
        )

    @property
    def kept(self) -> float | None:
        """‖D‖ / ‖X‖; None without an estimate, or where it is zero."""
        return self.fro / self.fro_estimate if self.fro_estimate else None
