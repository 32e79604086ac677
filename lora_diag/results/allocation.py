"""Records of ``allocate``."""

from __future__ import annotations

from typing import Literal

from lora_diag.results.base import Record


class Allocation(Record):
    """The rank that one layer gets.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``.
        rank: r; 0 for a layer that gets no adapter.
        params: r·(out + in).
        kept: Energy share C(r) kept in this layer; null for a zero update.
        fro: ‖ΔW‖_F of the layer.
        base_fro: ‖W_base‖_F, null if unknown.
        weight: Factor of the layer's energy in the objective; 1 unless weights were given.
        cap: Largest rank this layer could get, by ``--max-rank``, its shape, its signal rank and the values kept.
        capped_by: What set the cap.
    """

    record: Literal["allocation"] = "allocation"
    layer: str
    shape: tuple[int, int]
    rank: int
    params: int
    kept: float | None
    fro: float
    base_fro: float | None = None
    weight: float = 1.0
    cap: int
    capped_by: Literal["max_rank", "shape", "signal_rank", "values_kept", "ranks_from"]


class Baseline(Record):
    """What another rule makes of the same budget.

    Args:
        name: Such as ``uniform``.
        spent: What it spends, in the unit of the budget.
        kept: Share of the energy that it keeps.
    """

    name: str
    spent: float
    kept: float


class Certificate(Record):
    """How far an allocation can be from the best one.

    Args:
        unit: What the budget counts.
        budget: As asked for; null where ranks follow from an energy share.
        spent: What the allocation uses; never more than the budget.
        params: Parameters of the allocation, whatever the unit.
        kept: Share of all (weighted) energy that it keeps.
        bound: Share that no allocation within the budget and the constraints can exceed.
        gap: (bound − kept) / bound.
        price: Marginal value: energy share gained per further unit of the budget, at the bound.
        baselines: Other rules at the same budget.
    """

    record: Literal["certificate"] = "certificate"
    unit: Literal["params", "total_rank", "bytes", "energy"]
    budget: float | None
    spent: float
    params: int
    kept: float
    bound: float
    gap: float
    price: float | None = None
    baselines: tuple[Baseline, ...] = ()
