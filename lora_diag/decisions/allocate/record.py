"""Records of ``allocate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from lora_diag.records.base import LayerRecord, Record, Share, WholeRecord
from lora_diag.records.shown import SHAPE, Shown

CappedBy = Literal["max_rank", "break_even", "shape", "signal_rank", "values_kept", "ranks_from", "update_rank"]
Method = Literal["optimal", "heuristic"]
Unit = Literal["params", "total_rank", "bytes", "energy"]


def _kept(field: str) -> Callable[[Sequence[Allocation]], float | None]:
    """Return the pool of an energy share: of the energy of several layers together."""

    def pool(records: Sequence[Allocation]) -> float | None:
        total = math.fsum(record.fro**2 for record in records)
        kept = math.fsum(record.fro**2 * (getattr(record, field) or 0.0) for record in records)
        return min(1.0, kept / total) if total else None

    return pool


class Allocation(LayerRecord):
    """The rank that one layer gets.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``.
        rank: r; 0 for a layer that gets no adapter.
        params: r·(out + in).
        kept: Energy share C(r) kept in this layer; null for a zero update. Where r exceeds the values that were
            measured (``capped_by`` is ``ranks_from``), the share of those: a lower bound.
        fro: ‖ΔW‖_F of the layer.
        base_fro: ‖W_base‖_F, null if unknown.
        weight: Factor of the layer's energy in the objective; 1 unless weights were given.
        cap: Largest rank this layer could get, by ``--max-rank``, by break-even out·in/(out + in), beyond which factors
            have more parameters than the matrix, by its signal rank, its non-zero singular values and the values kept.
        capped_by: What set the cap; ``shape``, min(out, in), in results of older versions.
        verdict: Whether the files can show this update, as ``spectrum`` judged it.
        uniform_rank: What the uniform rule gives this layer out of the same budget.
        uniform_kept: C(uniform_rank); null for a zero update.
        group: Layers that share one rank, because an adapter has one factor pair for all of them (a stack of
            experts); the layer's own name without its index, null for a layer on its own.
        source: ``gradients`` where the spectra are those of gradients and not of an update.
        fisher: F(rank) where ranks were chosen by ``probe fisher``: half of it estimates the KL a prediction by which
            truncating this layer alone to its rank changes the predictions.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        replace(SHAPE, wide=False),
        Shown("rank", "rank given", "by the allocation", axis="rank r", main=True, pool="range", head="rank"),
        Shown(
            "uniform_rank",
            "uniform rank",
            "what one rank for all layers gives this one out of the same budget",
            pool="range",
            head="uniform",
            terminal=True,
        ),
        Shown("cap", "cap", "largest rank that this layer could get", pool="range", drop=5, terminal=True),
        Shown(
            "params",
            "parameters",
            "r·(out + in)",
            axis="adapter parameters r (out + in)",
            pool="sum",
            drop=1,
            head="params",
            form="count",
            terminal=True,
        ),
        Shown(
            "kept",
            "kept",
            "share of the layer's energy that this rank can carry",
            axis="energy share C(r) kept",
            share=True,
            pool=_kept("kept"),
            form="percent",
            terminal=True,
        ),
        Shown(
            "uniform_kept",
            "kept by uniform",
            "share of the layer's energy that one rank for all layers can carry",
            share=True,
            pool=_kept("uniform_kept"),
            head="by uniform",
            form="percent",
            terminal=True,
        ),
    )
    record: Literal["allocation"] = "allocation"
    layer: str
    shape: tuple[int, int]
    rank: int
    params: int
    kept: Share | None
    fro: float
    base_fro: float | None = None
    weight: float = 1.0
    cap: int
    capped_by: CappedBy
    verdict: Literal["resolved", "floor-limited", "unresolved"] = "resolved"
    uniform_rank: int = 0
    uniform_kept: Share | None = None
    group: str | None = None
    source: Literal["update", "gradients"] = "update"
    fisher: float | None = None


class Baseline(Record):
    """What another rule makes of the same budget, under the same constraints.

    Args:
        name: Such as ``uniform r=8``.
        spent: What it spends, in the unit of the budget.
        kept: Share of the (weighted) energy that it keeps.
        equal: What ranks chosen for the most energy keep when they may spend only that much: the fair comparison.
        epsilon_min: √(1 − unweighted share kept), less the error of the spectra: no adapter of these ranks has a
            smaller ε.
        lead: The layer (or stack) that alone makes more than half of ``equal`` − ``kept``; null where none does.
        lead_gain: What it makes of it.
    """

    name: str
    spent: float
    kept: Share
    equal: Share
    epsilon_min: float
    lead: str | None = None
    lead_gain: float | None = None


class Certificate(WholeRecord):
    """How far an allocation can be from the best one.

    Every share is one of the (weighted) energy of the layers that were candidates, as their spectra were measured.

    Args:
        unit: What the budget counts.
        budget: As asked for; null where ranks follow from an energy share.
        spent: What the allocation uses; never more than the budget.
        params: Parameters of the allocation, whatever the unit, those of the heads included.
        saved: Parameters of the heads that are trained in full beside the adapter. A budget of parameters or bytes pays
            for them first; one of ranks does not.
        kept: Share of all (weighted) energy that it keeps.
        bound: Share that no allocation within the budget and the constraints can exceed.
        gap: (bound − kept) / bound.
        optimal: True if the exact method ran: nothing within budget and constraints keeps more.
        energy_error: Bound on the error of ``kept`` and ``bound`` that the measurement of the spectra brings.
        epsilon_min: √(1 − unweighted share kept), less the error of the spectra: no adapter of these ranks has a
            smaller ε.
        price: Marginal value λ: energy share by which the bound rises per further unit of the budget.
        slack: n further units of the budget keep at most price·n + slack more than ``kept``, for every n: bound − kept,
            and for a budget of bytes what the part of it that pays for no whole parameter is worth; null in results
            of older versions.
        baselines: Other rules at the same budget: one rank for all layers, the prior, one energy share for all layers.
    """

    shown: ClassVar[tuple[Shown, ...]] = (
        Shown("kept", "kept", "share of the energy that the allocation keeps", share=True, main=True),
        Shown("bound", "bound", "share that no allocation can exceed", share=True, main=True),
        Shown("params", "parameters", "of the allocation", main=True),
    )
    record: Literal["certificate"] = "certificate"
    unit: Unit
    budget: float | None
    spent: float
    params: int
    saved: int = 0
    kept: Share
    bound: Share
    gap: Share
    optimal: bool = False
    energy_error: Share = 0.0
    epsilon_min: float = 1.0
    price: float | None = None
    slack: float | None = None
    baselines: tuple[Baseline, ...] = ()

    def more_at_most(self, amount: float) -> float:
        """Return a bound on the energy share that ``amount`` more units of the budget add to ``kept``.

        Weak duality: within a budget B + n no allocation keeps more than the bound at B plus λn
        (``decisions/allocate/spending.py``). The share that is missing to 1 is a bound, too.
        """
        slack = self.bound - self.kept if self.slack is None else self.slack
        return min(1.0 - self.kept, (self.price or 0.0) * amount + slack)

    @property
    def uniform(self) -> Baseline | None:
        """The rule of one rank for all layers; None without baselines."""
        return self.baselines[0] if self.baselines else None


class Policies(Record):
    """The ranks that different rules would give one layer; printed, not kept in a file.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``.
        ranks: Rank by rule; null where the rule cannot be applied to what was measured.
        complete: Whether all singular values were kept.
        verdict: Whether the files can show this update.
    """

    record: Literal["policies"] = "policies"
    layer: str
    shape: tuple[int, int]
    ranks: dict[str, int | None]
    complete: bool
    verdict: Literal["resolved", "floor-limited", "unresolved"]

    @property
    def full_rank(self) -> int:
        """min(out, in)."""
        return min(self.shape)
