"""Records of ``extract``."""

from __future__ import annotations

from typing import Literal

from lora_diag.records.base import LayerRecord, Record, least_epsilon
from lora_diag.records.vocabulary import Resolution


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
        data: The same in the metric of the data, for which the factors were chosen to be best; ``epsilon`` is then
            above ``epsilon_min``. Null where they are best in the Frobenius norm.
    """

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
    blocks: int | None = None

    @property
    def least_epsilon(self) -> float:
        """√(max(0, ε_min² − energy_error)): a lower bound on the ε of every update of this rank."""
        return least_epsilon(self.epsilon_min, self.energy_error)
