"""Records of ``allocate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from lora_diag.records.base import (
    SHAPE,
    Count,
    Guard,
    LayerRecord,
    Norm,
    Ratio,
    Record,
    Share,
    Shown,
    WholeRecord,
)

CappedBy = Literal[
    "max_rank", "break_even", "shape", "signal_rank", "values_kept", "ranks_from", "update_rank"
]
Unit = Literal["params", "total_rank", "bytes", "energy"]

# Note on spectra of an unfinished run, in the inputs of the run record.
UNFINISHED = "the run did not finish: layers are missing"


def _make_pool(field: str) -> Callable[[Sequence[Allocation]], float | None]:
    """Return the function that pools an energy fraction over layers."""

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
        rank: Rank r that the layer gets; 0 for a layer that gets no adapter.
        params: r·(out + in).
        kept: Energy fraction C(r) kept in this layer; null for a zero update. If r exceeds the
            measured values, their fraction, which is a lower bound.
        fro: ‖ΔW‖_F of the layer.
        base_fro: ‖W_base‖_F, null if unknown.
        weight: Factor of the layer's energy in the objective; 1 unless weights were given.
        cap: Largest possible rank of this layer. It is limited by ``--max-rank``, break-even
            out·in/(out + in), beyond which factors have more parameters than the matrix, its signal
            rank, its nonzero singular values and the kept values; a larger ``--min-rank`` raises
            it, up to the first two. With ``--allowed-ranks`` the first of them that reaches this
            limit, else the largest. In a stack of experts the largest cap of its matrices.
        capped_by: Reason for the cap. ``max_rank``: the option ``--max-rank``. ``break_even``: at a
            larger rank the factors have more parameters than the matrix; train it in full.
            ``signal_rank``: further directions are rounding noise. ``values_kept``: the spectrum
            was measured with ``--top``; measure more values. ``update_rank``: the update has no
            further nonzero singular value. ``ranks_from``: the cap differs from the layer's limit,
            as it is one of ``--allowed-ranks``. ``shape``: min(out, in), in results of older
            versions.
        verdict: Resolution verdict of ``spectrum``.
        uniform_rank: Rank by the uniform rule with the same budget.
        uniform_kept: Energy fraction C(uniform_rank) kept by the uniform rule; null for a zero
            update.
        group: Layers that share one rank, because an adapter has one factor pair for all of them (a
            stack of experts); the layer's own name without its index, null for a layer on its own.
        source: ``gradients`` if the spectra are of gradients instead of an update.
        fisher: F(rank) if ranks were chosen by ``probe fisher``: half of it estimates the mean KL
            per prediction of truncating this layer alone to its rank. If by ``probe gain``, Σa_i of
            the directions beyond its rank that lower the loss. Null otherwise.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        replace(SHAPE, detail=False),
        "rank",
        "uniform_rank",
        "cap",
    )
    record: Literal["allocation"] = "allocation"
    layer: str
    shape: tuple[int, int]
    rank: Annotated[
        int, Shown(title="rank given", axis="rank r", main=True, pool="range", head="rank")
    ]
    params: Annotated[
        Count,
        Shown(
            title="parameters",
            axis="adapter parameters r (out + in)",
            pool="sum",
            drop=1,
            head="params",
            form="count",
            terminal=True,
        ),
    ]
    kept: Annotated[
        Share | None,
        Shown(
            axis="energy fraction C(r) kept", pool=_make_pool("kept"), form="percent", terminal=True
        ),
    ]
    fro: Norm
    base_fro: Norm | None = None
    weight: float = 1.0
    cap: Annotated[int, Shown(pool="range", drop=5, terminal=True)]
    capped_by: CappedBy
    verdict: Literal["resolved", "floor-limited", "unresolved"] = "resolved"
    uniform_rank: Annotated[int, Shown(pool="range", head="uniform", terminal=True)] = 0
    uniform_kept: Annotated[
        Share | None,
        Shown(
            title="kept by uniform",
            pool=_make_pool("uniform_kept"),
            head="by uniform",
            form="percent",
            terminal=True,
        ),
    ] = None
    group: str | None = None
    source: Literal["update", "gradients"] = "update"
    fisher: float | None = None


class AllocationBaseline(Record):
    """The result of another rule for the same budget, under the same constraints.

    Args:
        name: Such as ``uniform r=8``.
        spent: Its cost in the unit of the budget.
        kept: Fraction of the (weighted) energy that it keeps.
        equal: Fraction kept by the energy-optimal ranks at the same cost, for a fair comparison.
        epsilon_min: √(1 − unweighted fraction kept), minus the error of the spectra: a lower bound
            on ε for these ranks.
        lead: The layer (or stack) that accounts for more than half of ``equal`` − ``kept``; null if
            there is none.
        lead_gain: Its part of ``equal`` − ``kept``.
    """

    name: str
    spent: float
    kept: Share
    equal: Share
    epsilon_min: Ratio
    lead: str | None = None
    lead_gain: float | None = None


class Certificate(WholeRecord):
    """Distance of an allocation from the optimum.

    Fractions are of the (weighted) energy of the candidate layers, as measured by their spectra.

    Args:
        unit: Unit of the budget: ``params``, trainable parameters; ``total_rank``, the sum of all
            ranks; ``bytes`` of the adapter, its gradients and its optimizer's state; or ``energy``,
            a fraction to keep in every layer.
        budget: The requested budget; null if ranks follow from an energy fraction.
        spent: Cost of the allocation, at most the budget; for an energy fraction, parameters
            without heads.
        params: Number of parameters of the allocation, including heads. It does not depend on the
            unit of the budget.
        saved: Number of parameters of the heads that are trained in full. A budget of parameters or
            bytes pays for them first; a budget of ranks does not.
        kept: Fraction of the (weighted) energy that the allocation keeps.
        bound: Upper bound on this fraction for the budget and the constraints.
        gap: (bound − kept) / bound.
        optimal: Whether this is known to be the optimum.
        energy_error: Bound on the error of ``kept`` and ``bound`` due to the measured spectra.
        epsilon_min: √(1 − unweighted fraction kept), minus the error of the spectra: a lower bound
            on ε for these ranks.
        price: Marginal value λ: increase of the bound per further unit of the budget.
        slack: n further units of the budget keep at most price·n + slack more than ``kept``, for
            every n: bound − kept, and for a budget of bytes the value of its part below one
            parameter; null in results of older versions.
        baselines: Other rules at the same budget: one rank for all layers, the prior, one energy
            fraction for all layers. Without the last if the budget is an energy fraction; a
            portable allocation omits those that spend nothing.
    """

    table: ClassVar[tuple[Shown | str, ...]] = (
        "kept",
        "bound",
    )
    guards: ClassVar[tuple[Guard, ...]] = (
        Guard("gap", "higher", "the allocation is further from the optimum than before"),
    )
    record: Literal["certificate"] = "certificate"
    unit: Unit
    budget: float | None
    spent: float
    params: Annotated[Count, Shown(title="parameters", main=True)]
    saved: Count = 0
    kept: Annotated[Share, Shown(main=True)]
    bound: Annotated[Share, Shown(main=True)]
    gap: Share
    optimal: bool = False
    energy_error: Share = 0.0
    epsilon_min: Ratio = 1.0
    price: float | None = None
    slack: float | None = None
    baselines: tuple[AllocationBaseline, ...] = ()

    def more_at_most(self, amount: float) -> float:
        """Return a bound on the energy fraction that ``amount`` more units of the budget add to
        ``kept``.

        Weak duality: within a budget B + n no allocation keeps more than the bound at B plus λn
        (``decisions/allocate/measure.py``). The fraction missing to 1 is also a bound.
        """
        slack = self.bound - self.kept if self.slack is None else self.slack
        return min(1.0 - self.kept, (self.price or 0.0) * amount + slack)

    @property
    def uniform(self) -> AllocationBaseline | None:
        """The baseline of one rank for all layers; None if it was omitted."""
        return next((rule for rule in self.baselines if rule.name.startswith("uniform")), None)


class Policies(Record):
    """Ranks of one layer by several rules; printed, not written to a file.

    Args:
        layer: The weight's name in BASE.
        shape: ``(out, in)``.
        ranks: Rank by rule; null if the rule does not apply.
        complete: Whether all singular values were kept.
        verdict: Whether the files resolve this update.
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
