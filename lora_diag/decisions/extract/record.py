"""Records of ``extract``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Annotated, ClassVar, Literal

from lora_diag.layers.lineage import Lineage
from lora_diag.records.base import (
    Count,
    LayerRecord,
    Norm,
    Ratio,
    Record,
    Share,
    Shown,
    least_epsilon,
)
from lora_diag.records.vocabulary import Hidden, Resolution, noise_mark


class OnData(Record):
    """Error of one layer's factors in the data metric, E‖· x‖² = ‖·C^½‖_F², or in the K-FAC metric.

    Args:
        metric: ``data``; or ``kfac`` with ‖G^½·C^½‖ instead of ‖·C^½‖.
        fro: ‖ΔW·C^½‖_F.
        kept: Fraction of ‖ΔW·C^½‖_F² that the best update of this rank keeps.
        energy_error: Bound on the error of ``kept``.
        epsilon: ‖(ΔW − B·A)C^½‖_F / ‖ΔW·C^½‖_F of the stored factors.
        epsilon_min: √(1 − kept), the smallest of any update of this rank up to ``energy_error``;
            these factors attain it up to rounding.
    """

    metric: Literal["data", "kfac"] = "data"
    fro: Norm
    kept: float
    energy_error: float
    epsilon: Ratio
    epsilon_min: Ratio

    @property
    def least_epsilon(self) -> float:
        """√(max(0, ε_min² − energy_error)): a lower bound on the ε of every update of this rank."""
        return least_epsilon(self.epsilon_min, self.energy_error)


def _median_signal_rank(records: Sequence[Extraction]) -> int | str | None:
    """Return the median signal rank of merged updates; None without any.

    If all kept values of one of them are above the noise, return ``≥`` and the range of the stored
    ranks.
    """
    merged = [record for record in records if record.method != "factored"]
    signal_ranks = [
        record.resolution.signal_rank
        for record in merged
        if record.resolution.signal_rank is not None
    ]
    if len(signal_ranks) < len(merged):
        ranks = sorted(
            {min(record.rank for record in records), max(record.rank for record in records)}
        )
        return f"≥ {'-'.join(map(str, ranks))}"
    return int(median(signal_ranks)) if signal_ranks else None


def _mark(records: Sequence[Extraction]) -> str:
    """Return the mark of the worst verdict on the resolution of updates."""
    return noise_mark(record.resolution.verdict for record in records)


class Extraction(Lineage, LayerRecord):
    """The factors written for one layer, and their error.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)`` as stored in BASE.
        module: PEFT's name of the adapted module; for ``parameter``, the parameter's own path.
        kind: Kind of the layer in PEFT. One of ``linear``, ``conv1d`` (transposed, as in GPT-2),
            ``embedding``, ``convolution``, and ``parameter``, a matrix of a stack of experts.
        rank: Rank of the factors, r.
        params: r·(out + in).
        kept: C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖_F², the energy fraction that the best update of this rank
            keeps.
        energy_error: Bound on the error of ``kept``.
        epsilon: ‖ΔW − B·A‖_F / ‖ΔW‖_F of the stored factors in their dtype.
        epsilon_min: √(1 − C(r)), the smallest ε of any update of this rank (Eckart–Young), up to
            ``energy_error``.
        lengthened: ‖ΔW‖_F / ‖ΔW_r‖_F, by which the factors are multiplied (``--match-norm``);
            ``epsilon`` is then above ``epsilon_min``. Null if they are not.
        places: Positions of the singular directions in the factors, 0 for the largest σ; null for
            the leading ones. ``epsilon`` is then above ``epsilon_min``.
        fro: ‖ΔW‖_F.
        base_fro: ‖W_base‖_F; null for an update given by factors, for which W_base is not read.
        dtype: Dtype of the stored factors.
        method: Method of the singular vectors.
        blocks: Number of row blocks in which ΔW was read repeatedly because it exceeded the memory
            limit; null if it fits.
        resolution: Resolution of ΔW under the rounding of the files.
        hidden: The update before rounding, if requested; if its ``status`` is ``recovered``, the
            factors are of its estimate E[X | cells], and ``fro``, ``kept`` and both ε are of that
            in place of ΔW.
        data: The error in the data metric, if the factors are optimal in it; ``epsilon`` is then
            above ``epsilon_min``. Null if they are optimal in the Frobenius norm.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        "rank",
        "params",
        Shown(
            "relative",
            "‖ΔW‖/‖W‖",
            "Frobenius norm of the update over that of the base weight",
            drop=4,
            terminal=True,
        ),
        Shown(
            "retained",
            "kept",
            "Fraction of the energy ‖ΔW‖² that the factors keep",
            axis="energy fraction kept",
            share=True,
            main=True,
            pool=lambda records: pooled_energy(records),
            form="percent",
        ),
        "epsilon",
        Shown(
            "least_epsilon",
            "ε floor",
            "Lower bound on the ε of any update of this rank",
            pool=lambda records: pooled(records, "least_epsilon"),
            head="floor",
            terminal=True,
            detail=True,
        ),
        Shown(
            "data.epsilon",
            "ε data",
            "ε of the layer's output on the text of the activations",
            pool=lambda records: pooled_data(records, "epsilon"),
            terminal=True,
        ),
        Shown(
            "data.least_epsilon",
            "floor data",
            "Lower bound on this ε for an update of this rank",
            pool=lambda records: pooled_data(records, "least_epsilon"),
            drop=2,
            terminal=True,
        ),
        Shown(
            "signal_rank",
            "signal",
            "Singular values above the rounding noise of the files",
            pool=_median_signal_rank,
            drop=6,
            terminal=True,
            mark=_mark,
        ),
        "kind",
        Shown(
            "solver",
            "solver",
            "Method of the singular vectors",
            pool="each",
            drop=7,
            terminal=True,
            detail=True,
        ),
    )
    record: Literal["extraction"] = "extraction"
    layer: str
    shape: tuple[int, int]
    module: str
    kind: Annotated[
        Literal["linear", "conv1d", "embedding", "convolution", "parameter"],
        Shown(pool="each", drop=5, terminal=True, detail=True),
    ]
    rank: Annotated[
        int, Shown(title="rank stored", axis="rank r", main=True, pool="range", head="rank")
    ]
    params: Annotated[
        Count,
        Shown(title="parameters", pool="sum", drop=3, head="params", form="count", terminal=True),
    ]
    kept: float
    energy_error: float
    epsilon: Annotated[
        Ratio,
        Shown(
            title="ε",
            axis="ε = ‖ΔW − B·A‖ / ‖ΔW‖",
            main=True,
            pool=lambda records: pooled(records, "epsilon"),
        ),
    ]
    epsilon_min: Ratio
    fro: Norm
    base_fro: Norm | None
    dtype: str
    method: str
    resolution: Resolution
    data: OnData | None = None
    hidden: Hidden | None = None
    blocks: Count | None = None
    lengthened: Ratio | None = None
    places: tuple[int, ...] | None = None

    @property
    def estimated(self) -> bool:
        """Whether the factors are of the estimated update before rounding."""
        return self.hidden is not None and self.hidden.status == "recovered"

    @property
    def least_epsilon(self) -> float:
        """√(max(0, ε_min² − energy_error)): a lower bound on the ε of every update of this rank."""
        return least_epsilon(self.epsilon_min, self.energy_error)

    @property
    def relative(self) -> float | None:
        """‖ΔW‖ / ‖W_base‖; None without a base, or where it is zero."""
        return self.fro / self.base_fro if self.base_fro else None

    @property
    def retained(self) -> Share:
        """Fraction of ‖ΔW‖_F² that these factors keep: ``kept``, or 1 − ε² if they are optimal in
        another metric, or chosen otherwise.
        """
        is_leading = self.data is None and self.places is None
        return self.kept if is_leading else max(0.0, 1 - self.epsilon**2)

    @property
    def signal_rank(self) -> int | None:
        """``resolution.signal_rank``; None for an update given by factors, without rounding of
        merged weights.
        """
        return None if self.method == "factored" else self.resolution.signal_rank

    @property
    def solver(self) -> str:
        """``method`` without its parameters."""
        return self.method.partition(":")[0]


def pooled(
    records: Sequence[Extraction], field: Literal["epsilon", "epsilon_min", "least_epsilon"]
) -> float:
    """Return a pooled error of several layers, as ε = √(Σ‖ΔW − B·A‖² / Σ‖ΔW‖²)."""
    gaps = (getattr(record, field) * record.fro for record in records)
    return math.hypot(*gaps) / math.hypot(*(record.fro for record in records))


def pooled_data(
    records: Sequence[Extraction], field: Literal["epsilon", "least_epsilon"]
) -> float | None:
    """Return a pooled error of several layers in the data or K-FAC metric; None without one, or
    where ΔW is 0 in it.
    """
    errors = [record.data for record in records if record.data is not None]
    total = math.hypot(*(data.fro for data in errors))
    return (
        math.hypot(*(getattr(data, field) * data.fro for data in errors)) / total if total else None
    )


def pooled_energy(records: Sequence[Extraction]) -> float:
    """Return the pooled energy fraction kept of several layers."""
    total = math.fsum(record.fro**2 for record in records)
    return min(1.0, math.fsum(record.retained * record.fro**2 for record in records) / total)
