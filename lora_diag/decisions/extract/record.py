"""Records of ``extract``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import ClassVar, Literal

from lora_diag.records.base import LayerRecord, Record, Share, least_epsilon
from lora_diag.records.shown import Shown
from lora_diag.records.vocabulary import Hidden, Resolution, noise_mark


class OnData(Record):
    """What the factors of one layer cost in the metric of the data, E‖· x‖² = ‖·C^½‖_F², or in that of K-FAC.

    Args:
        metric: ``data``; or ``kfac``, where every ‖·C^½‖ here is ‖G^½·C^½‖.
        fro: ‖ΔW·C^½‖_F.
        kept: Share of ‖ΔW·C^½‖_F² that the best update of this rank keeps.
        energy_error: Bound on the error of ``kept``.
        epsilon: ‖(ΔW − B·A)C^½‖_F / ‖ΔW·C^½‖_F of the factors as they are in the file.
        epsilon_min: √(1 − kept), the smallest of any update of this rank, as far as ``energy_error``; these factors
            reach it but for rounding.
    """

    metric: Literal["data", "kfac"] = "data"
    fro: float
    kept: float
    energy_error: float
    epsilon: float
    epsilon_min: float

    @property
    def least_epsilon(self) -> float:
        """√(max(0, ε_min² − energy_error)): a lower bound on the ε of every update of this rank."""
        return least_epsilon(self.epsilon_min, self.energy_error)


def _signal(records: Sequence[Extraction]) -> int | str | None:
    """Return the median signal rank; ``≥`` the ranks stored where all values that were kept are above the noise."""
    merged = [record for record in records if record.method != "factored"]
    known = [record.resolution.signal_rank for record in merged if record.resolution.signal_rank is not None]
    if len(known) < len(merged):
        ranks = sorted({min(record.rank for record in records), max(record.rank for record in records)})
        return f"≥ {'-'.join(map(str, ranks))}"
    return int(median(known)) if known else None


def _mark(records: Sequence[Extraction]) -> str:
    return noise_mark(record.resolution.verdict for record in records)


class Extraction(LayerRecord):
    """The factors that were written for one layer, and what they cost.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)`` as BASE stores it.
        module: PEFT's name for what the factors sit on; of ``parameter``, the parameter's own path.
        kind: What PEFT takes it for.
        rank: r.
        params: r·(out + in).
        kept: C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖_F², the energy share that the best update of this rank keeps.
        energy_error: Bound on the error of ``kept``.
        epsilon: ‖ΔW − B·A‖_F / ‖ΔW‖_F of the factors as they are in the file, in their dtype.
        epsilon_min: √(1 − C(r)), the smallest ε of any update of this rank (Eckart–Young), as far as ``energy_error``.
        fro: ‖ΔW‖_F.
        base_fro: ‖W_base‖_F; null for an update known by its factors, for which W_base is not read.
        dtype: In which the factors are stored.
        method: What computed the singular vectors.
        blocks: In how many row blocks ΔW was read, again and again, because memory did not hold it; null if it did.
        resolution: What the files' rounding lets one see of ΔW.
        hidden: The update before rounding, where it was asked for; where its ``status`` is ``recovered``, the factors
            are of its estimate E[X | cells], and ``fro``, ``kept`` and both ε are of that in place of ΔW.
        data: The same in the metric of the data, for which the factors were chosen to be best; ``epsilon`` is then
            above ``epsilon_min``. Null where they are best in the Frobenius norm.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown("rank", "rank stored", "rank of the factors", axis="rank r", main=True, pool="range", head="rank"),
        Shown("params", "parameters", "r·(out + in)", pool="sum", drop=3, head="params", form="count", terminal=True),
        Shown(
            "relative", "‖ΔW‖/‖W‖", "Frobenius norm of the update over that of the base weight", drop=4, terminal=True
        ),
        Shown(
            "retained",
            "kept",
            "share of the energy ‖ΔW‖² that the factors keep",
            axis="energy share kept",
            share=True,
            main=True,
            pool=lambda records: pooled_kept(records),
            form="percent",
        ),
        Shown(
            "epsilon",
            "ε",
            "‖ΔW − B·A‖_F / ‖ΔW‖_F of the factors in the file",
            axis="ε = ‖ΔW − B·A‖_F / ‖ΔW‖_F",
            main=True,
            pool=lambda records: pooled(records, "epsilon"),
        ),
        Shown(
            "least_epsilon",
            "ε floor",
            "lower bound on the ε of any update of this rank",
            pool=lambda records: pooled(records, "least_epsilon"),
            head="floor",
            terminal=True,
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
            "lower bound on that ε for an update of this rank",
            pool=lambda records: pooled_data(records, "least_epsilon"),
            drop=2,
            terminal=True,
        ),
        Shown(
            "signal_rank",
            "signal",
            "singular values above the rounding noise of the files",
            pool=_signal,
            drop=6,
            terminal=True,
            mark=_mark,
        ),
        Shown("kind", "kind", "what PEFT takes the layer for", pool="each", drop=5, terminal=True, wide=True),
        Shown("solver", "solver", "what computed the singular vectors", pool="each", drop=7, terminal=True, wide=True),
    )
    record: Literal["extraction"] = "extraction"
    layer: str
    shape: tuple[int, int]
    module: str
    kind: Literal["linear", "conv1d", "embedding", "convolution", "parameter"]
    rank: int
    params: int
    kept: float
    energy_error: float
    epsilon: float
    epsilon_min: float
    fro: float
    base_fro: float | None
    dtype: str
    method: str
    resolution: Resolution
    data: OnData | None = None
    hidden: Hidden | None = None
    blocks: int | None = None

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
        """Share of ‖ΔW‖_F² that these factors keep: ``kept``, or 1 − ε² where they are best in another metric."""
        return self.kept if self.data is None else max(0.0, 1 - self.epsilon**2)

    @property
    def signal_rank(self) -> int | None:
        """``resolution.signal_rank``; None for an update by its factors: no rounding of merged weights in between."""
        return None if self.method == "factored" else self.resolution.signal_rank

    @property
    def solver(self) -> str:
        """``method`` without its parameters."""
        return self.method.partition(":")[0]


def pooled(records: Sequence[Extraction], field: Literal["epsilon", "epsilon_min", "least_epsilon"]) -> float:
    """Return an error of several layers together, as of ε = √(Σ‖ΔW − B·A‖² / Σ‖ΔW‖²)."""
    gaps = (getattr(record, field) * record.fro for record in records)
    return math.hypot(*gaps) / math.hypot(*(record.fro for record in records))


def pooled_data(records: Sequence[Extraction], field: Literal["epsilon", "least_epsilon"]) -> float | None:
    """Return an error in the metric of the data of several layers together; None where none has one."""
    found = [record.data for record in records if record.data is not None]
    total = math.hypot(*(data.fro for data in found))
    return math.hypot(*(getattr(data, field) * data.fro for data in found)) / total if total else None


def pooled_kept(records: Sequence[Extraction]) -> float:
    """Return the energy share that is kept of several layers together."""
    total = math.fsum(record.fro**2 for record in records)
    return min(1.0, math.fsum(record.retained * record.fro**2 for record in records) / total)
