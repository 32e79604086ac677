"""Records of ``recover``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from lora_diag.records.base import LayerRecord, Norm, Share
from lora_diag.records.shown import Shown, Value
from lora_diag.records.vocabulary import Hidden


def _size(records: Sequence[Any]) -> Value:
    """Return ‖X‖/‖W‖ of several layers together, those with an estimate."""
    known = [record for record in records if record.fro_estimate is not None and record.base_fro]
    if not known:
        return None
    return math.hypot(*(r.fro_estimate for r in known)) / math.hypot(*(r.base_fro for r in known))


class Recovery(Hidden, LayerRecord):
    """One layer's update before rounding, X, beside what the files show of it, D; see ``Hidden`` for the other fields.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``.
        dtypes: Stored dtypes of base and tuned.
        fro: ‖D‖_F of the files.
        base_fro: ‖W_base‖_F.
        energy: C(r) of D, by r; null where D = 0.
        rank_at: Smallest r at which C(r) of D reaches the threshold; 0 where D = 0.
        energy_error: Bound on the error of every energy fraction of D.
        method: What computed the singular values of D.
        written: What the output holds of the layer: ``posterior``, made of the estimate E[X | cells]; ``file``, made
            of D; ``nothing``.
        rank: Of its factors in the adapter; 0 without.
        params: rank·(out + in).
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown("status", "verdict", "whether rounding hides an update, and whether it could be estimated", main=True),
        Shown("unchanged", "unchanged", "share of the entries that stayed the same", share=True, main=True),
        Shown("relative", "‖D‖/‖W‖", "norm of the difference of the files over that of the base", main=True),
        Shown(
            "relative_estimate",
            "‖X‖/‖W‖",
            "norm of the update before rounding, estimated, over that of the base",
            main=True,
            pool=_size,
        ),
        Shown("kept", "‖D‖/‖X‖", "norm of what the files show over the estimated norm of the update"),
        Shown("rank_at.0.9", "r@90% file", "smallest rank that keeps 90% of the energy of the files' difference"),
        Shown(
            "rank_at_estimate.0.9",
            "r@90%",
            "smallest rank whose estimated directions carry 90% of the update's energy; empty if they do not",
            axis="estimated rank at 90% of the energy",
            main=True,
        ),
        Shown("directions", "directions", "directions of the update that stand above what rounding hides", main=True),
        Shown("gain_z", "z", "gain of hidden cells in standard errors", main=True),
        Shown("fit_chi", "χ²/df", "misfit of the changed entries by binade of |W|"),
        Shown("fit_misplaced", "misplaced", "share of changed entries in the wrong binade"),
        Shown("information", "information", "share of an entry's variance that its cell removes", share=True),
        Shown("rank", "rank", "rank of the factors in the adapter"),
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
    rank: int = 0
    params: int = 0

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> str | None:
        """Return what is wrong with the settings of a run of ``recover``; None if nothing is."""
        ranks = settings.get("curve")
        if not isinstance(ranks, list) or not ranks or not all(type(r) is int and r > 0 for r in ranks):
            return "settings.curve must be a list of ranks"
        return None

    @property
    def relative(self) -> float | None:
        """‖D‖ / ‖W_base‖; None where the base is zero."""
        return self.fro / self.base_fro if self.base_fro else None

    @property
    def relative_estimate(self) -> float | None:
        """‖X‖ / ‖W_base‖; None without an estimate, or where the base is zero."""
        return self.fro_estimate / self.base_fro if self.base_fro and self.fro_estimate is not None else None

    @property
    def kept(self) -> float | None:
        """‖D‖ / ‖X‖; None without an estimate."""
        return self.fro / self.fro_estimate if self.fro_estimate else None
