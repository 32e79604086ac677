"""Allocation of a budget to layers, with a certificate of its distance from the optimum.

Combines candidates, steps and baselines into records; opens and measures nothing.

Reference: The article, "Multi-Layer Allocation": min Σ_ℓ Σ_{i>r_ℓ} σ_{ℓ,i}²; its rule, the next rank unit to the layer
with the largest σ²_{ℓ,r+1}, is the greedy order for a budget of ranks. For a budget of parameters the order is that of
σ²/(d_in + d_out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_diag.decisions.allocate.baselines import PRIOR, Rule, energy_ranks, rules
from lora_diag.decisions.allocate.candidates import Constraints, Unit, split, units
from lora_diag.decisions.allocate.heads import head_of, heads_to_save, size_of
from lora_diag.decisions.allocate.record import Allocation, Baseline, Certificate, Method
from lora_diag.decisions.allocate.record import Unit as BudgetUnit
from lora_diag.decisions.allocate.spending import BudgetedRanks, Floats, Ints, Steps, make_steps, spend
from lora_diag.decisions.targets import compiled
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.errors import UsageError
from lora_diag.records import LeftOut


@dataclass(frozen=True)
class Budget:
    """A budget.

    Args:
        unit: Unit of the budget; ``energy`` is not a budget but a fraction that every layer has to keep.
        amount: Amount in this unit.
        option: The option as given, for messages.
        bytes_per_param: Memory of one trainable parameter, for a budget in bytes.
    """

    unit: BudgetUnit
    amount: float
    option: str
    bytes_per_param: float = 1.0

    def cost_of(self, unit: Unit) -> int:
        """Return the cost of one rank of a unit as a whole number of ranks or parameters."""
        return len(unit.members) if self.unit == "total_rank" else unit.cost

    @property
    def whole(self) -> int:
        """The budget in the unit of ``cost_of``."""
        return math.floor(self.amount / self.bytes_per_param) if self.unit == "bytes" else int(self.amount)

    def in_unit(self, cost: int) -> float:
        """Return a cost in the unit of the budget."""
        return cost * self.bytes_per_param if self.unit == "bytes" else float(cost)


def budget_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the option of a run's budget by its name, such as ``{"params": "40k"}``.

    Args:
        settings: Settings of the run record, in which ``budget`` is ``Budget.option``.
    """
    option, _, amount = str(settings["budget"]).partition(" ")
    return {option.removeprefix("--").replace("-", "_"): amount}


@dataclass(frozen=True)
class Allocated:
    """The result of an allocation for the layers of a spectrum run.

    Args:
        layers: Candidates with their ranks.
        certificate: Distance of the ranks from the optimum.
        left_out: Layers that are not candidates.
    """

    layers: tuple[Allocation, ...]
    certificate: Certificate
    left_out: tuple[LeftOut, ...]


def allocate(
    records: Sequence[Spectrum],
    budget: Budget,
    constraints: Constraints = Constraints(),  # noqa: B008  (frozen)
    weights: Mapping[str, float] | None = None,
    relative: bool = False,
    target: str | None = None,
    exclude: str | None = None,
    losses: Mapping[str, Sequence[float]] | None = None,
    left_out: Sequence[LeftOut] = (),
    save_heads: bool = True,
    method: Method = "optimal",
    scores: Mapping[str, float] | None = None,
) -> Allocated:
    """Choose the ranks that keep the most energy within a budget, or the ranks of the heuristic prior.

    Args:
        records: Spectra, one per layer.
        budget: The budget.
        constraints: Constraints on the ranks.
        weights: Factor of each layer's energy, by name; None for 1.
        relative: Whether every layer's energy counts as 1, so that Σ C_ℓ(r_ℓ) is maximized instead of Σ‖ΔW‖²C_ℓ.
        target: Only layers whose name contains a match; None for the matrices that adapters usually target.
        exclude: No layers whose name contains a match.
        losses: F(0), F(1), … by layer, from ``probe fisher``; ranks then minimize ΣF_ℓ(r_ℓ). F need not be convex, so
            ranks are chosen from the corners of its convex envelope, and the bound holds for all ranks.
        left_out: Tensors without a spectrum, including heads that only TUNED has.
        save_heads: Whether heads are trained in full and paid for first; else they are layers.
        method: ``optimal``, or ``heuristic`` for r ∝ s·√(d_in + d_out).
        scores: s by layer for the heuristic; None for the weights, or ‖ΔW‖/‖W‖ without weights.

    Raises:
        UsageError: The budget is too small for the constraints or for any rank; a pattern is not a valid regular
            expression.
    """
    included, excluded = compiled(target, "--layers"), compiled(exclude, "--exclude")
    saved = heads_to_save(records, left_out, included, excluded) if save_heads else []
    names = {item.layer for item in saved}
    candidates, not_chosen = split([record for record in records if record.layer not in names], included, excluded)
    factors = {record.layer: _compute_factor(record, weights, relative) for record in candidates}
    parts = units(candidates, factors, constraints, losses)
    _refuse_nothing(parts)
    all_steps = _make_steps(parts, budget, [part.allowed for part in parts])
    steps = all_steps if losses is None else _make_steps(parts, budget, [part.corners for part in parts])
    fixed = sum(budget.cost_of(part) * part.start for part in parts)
    reserved = _compute_cost_of_heads(saved, budget)
    chosen, left = _choose(parts, steps, all_steps, budget, fixed, reserved)
    if losses is not None:  # the exact method considered the corners only
        chosen = replace(chosen, optimal=chosen.gain >= chosen.bound)
    rule_results = rules(parts, all_steps, left, np.array([_score(part, scores or weights) for part in parts]))
    if budget.unit == "energy":
        rule_results.pop()  # the allocation itself
    if method == "heuristic":
        chosen = _allocate_by(rule_results[PRIOR], parts, steps, budget, chosen)
    layers = _make_records(parts, chosen.ranks, rule_results[0].ranks)
    order = {record.layer: i for i, record in enumerate(records)}
    return Allocated(
        layers=tuple(sorted(layers, key=lambda record: order[record.layer])),
        certificate=_make_certificate(parts, steps, budget, (fixed + reserved, size_of(saved)), chosen, rule_results),
        left_out=(*saved, *not_chosen, *(item for item in left_out if item.layer not in names)),
    )


def _compute_cost_of_heads(saved: Sequence[LeftOut], budget: Budget) -> int:
    """Return the cost of the heads in the unit of ``Budget.cost_of``.

    Raises:
        UsageError: The heads exceed the budget.
    """
    if budget.unit in {"total_rank", "energy"}:
        return 0
    size = size_of(saved)
    if size > budget.whole:
        heads = sorted({head_of(item.layer) or "" for item in saved})
        raise UsageError(
            f"{budget.option}: the heads {', '.join(heads)}, which are trained in full, take "
            f"{_format_amount(budget, size)}, {_format_amount(budget, size - budget.whole)} more than the budget; "
            f"raise it, or exclude a head with --exclude {heads[0]}"
        )
    return size


def _allocate_by(rule: Rule, parts: Sequence[Unit], steps: Steps, budget: Budget, best: BudgetedRanks) -> BudgetedRanks:
    """Return the ranks of another rule, with the bound for all ranks.

    Raises:
        UsageError: The rule gives no rank.
    """
    if not rule.ranks.any():
        raise UsageError(f"{budget.option}: too small for the first rank of the {rule.name}; raise it")
    gain = _kept_energy(parts, rule.ranks) - _kept_energy(parts, steps.start)
    return BudgetedRanks(rule.ranks, gain, rule.cost, max(best.bound, gain), best.price, optimal=False)


def _make_steps(parts: Sequence[Unit], budget: Budget, allowed: Sequence[Ints]) -> Steps:
    curves, starts = [part.curve for part in parts], [part.start for part in parts]
    return make_steps(curves, [budget.cost_of(part) for part in parts], starts, allowed)


def _refuse_nothing(parts: Sequence[Unit]) -> None:
    """Refuse layers of which none can get a rank.

    Raises:
        UsageError: No layer can get a rank.
    """
    if any(part.cap and part.energy for part in parts):
        return
    changed = [member for part in parts for member in part.members if member.fro > 0]
    if not changed:
        raise UsageError("ΔW is zero in every candidate layer, so there is no energy to keep")
    if not any(part.energy for part in parts):
        raise UsageError("every changed layer has weight 0, so there is no energy to keep")
    if all(member.resolution.signal_rank == 0 for member in changed):
        raise UsageError("every update is below the rounding noise of the files, so there is only noise to keep")
    raise UsageError("every layer is smaller than the smallest allowed rank")


def _compute_factor(record: Spectrum, weights: Mapping[str, float] | None, relative: bool) -> float:
    weight = 1.0 if weights is None else weights[record.layer]
    return weight / record.fro**2 if relative and record.fro > 0 else weight


def _score(part: Unit, weights: Mapping[str, float] | None) -> float:
    """Return s for the prior: the given scores, else the relative change ‖ΔW‖/‖W‖ (or ‖ΔW‖)."""
    if weights is not None:
        return math.fsum(weights[member.layer] for member in part.members) / len(part.members)
    norms = [member.fro if member.relative is None else member.relative for member in part.members]
    return math.fsum(norms) / len(norms)


def _choose(
    parts: Sequence[Unit], steps: Steps, all_steps: Steps, budget: Budget, fixed: int, reserved: int
) -> tuple[BudgetedRanks, int]:
    """Return the ranks, and the budget for steps above the starting ranks."""
    if budget.unit == "energy":
        ranks = energy_ranks(parts, all_steps, budget.amount)
        left = sum(int(rank - part.start) * part.cost for rank, part in zip(ranks, parts, strict=True))
        best = spend(steps, left)
        gain = _kept_energy(parts, ranks) - _kept_energy(parts, steps.start)
        return BudgetedRanks(ranks, gain, left, max(best.bound, gain), best.price, optimal=False), left
    left = budget.whole - reserved - fixed
    budget_text = (
        f"the {_format_amount(budget, budget.whole - reserved)} that remain after the heads"
        if reserved
        else "the budget"
    )
    if left < 0:
        raise UsageError(
            f"{budget.option}: the smallest ranks allowed by --min-rank take {_format_amount(budget, fixed)}, "
            f"{_format_amount(budget, -left)} more than {budget_text}; raise it, lower --min-rank "
            "or select fewer layers with --layers"
        )
    if not fixed and not len(steps.gain):
        raise UsageError(f"{budget.option}: no allowed rank lowers the expected loss; raise --max-rank")
    if not fixed and left < (minimum := int(steps.cost.min())):
        part = parts[int(steps.unit[np.argmin(steps.cost)])]
        raise UsageError(
            f"{budget.option}: even the cheapest rank, one of {part.group or part.members[0].layer}, takes "
            f"{_format_amount(budget, minimum)}; "
            f"give a budget of at least {_format_amount(budget, budget.whole - left + minimum)}"
        )
    return spend(steps, left), left


def _format_amount(budget: Budget, cost: int) -> str:
    words = {"params": "parameters", "total_rank": "ranks", "bytes": "bytes"}
    return f"{budget.in_unit(cost):,.0f} {words[budget.unit]}"


def _make_records(parts: Sequence[Unit], ranks: Ints, uniform: Ints) -> list[Allocation]:
    return [
        Allocation(
            layer=member.layer,
            shape=member.shape,
            rank=rank,
            params=rank * sum(member.shape),
            kept=_kept_at(curve, rank) if member.fro > 0 else None,
            fro=member.fro,
            base_fro=member.base_fro,
            weight=weight,
            cap=part.cap,
            capped_by=part.capped_by,
            verdict=member.resolution.verdict,
            uniform_rank=uniform_rank,
            uniform_kept=_kept_at(curve, uniform_rank) if member.fro > 0 else None,
            group=part.group,
            source=member.source,
            fisher=None if part.losses is None else _loss_at(part.losses[position], rank),
        )
        for part, rank, uniform_rank in zip(parts, ranks.tolist(), uniform.tolist(), strict=True)
        for position, (weight, member, curve) in enumerate(zip(part.weights, part.members, part.curves, strict=True))
    ]


def _loss_at(loss: Floats, rank: int) -> float:
    """Return F(r), 0 beyond its last value."""
    return float(loss[rank]) if rank < len(loss) else 0.0


def _kept_at(curve: Floats, rank: int) -> float:
    """Return C(rank) of a layer from its measured values."""
    return float(curve[min(rank, len(curve) - 1)])


def _make_certificate(
    parts: Sequence[Unit],
    steps: Steps,
    budget: Budget,
    fixed_and_saved: tuple[int, int],
    chosen: BudgetedRanks,
    rule_results: Sequence[Rule],
) -> Certificate:
    """Return the certificate; ``fixed_and_saved``: cost of starting ranks and heads, parameters of the heads."""
    fixed, saved = fixed_and_saved
    total = math.fsum(part.energy for part in parts)
    at_start = _kept_energy(parts, steps.start)
    # Losses may be larger at the smallest ranks than without an adapter.
    kept, bound = (min(1.0, max(0.0, at_start + gain) / total) for gain in (chosen.gain, chosen.bound))
    error = math.fsum(
        weight * member.fro**2 * member.energy_error
        for part in parts
        if part.losses is None
        for weight, member in zip(part.weights, part.members, strict=True)
    )
    price = chosen.price / total / budget.bytes_per_param
    unused_budget = 0.0 if budget.unit == "energy" else budget.amount - budget.in_unit(budget.whole)
    return Certificate(
        unit=budget.unit,
        budget=None if budget.unit == "energy" else budget.amount,
        spent=budget.in_unit(fixed + chosen.cost),
        params=saved + sum(rank * part.cost for part, rank in zip(parts, chosen.ranks.tolist(), strict=True)),
        saved=saved,
        kept=kept,
        bound=bound,
        gap=max(0.0, (bound - kept) / bound) if bound > 0 else 0.0,
        optimal=chosen.optimal,
        energy_error=min(1.0, error / total),
        epsilon_min=_epsilon_min(parts, chosen.ranks),
        price=price,
        slack=bound - kept + price * unused_budget,
        baselines=tuple(_compare_baseline(rule, parts, steps, budget, fixed, total) for rule in rule_results),
    )


def _compare_baseline(
    rule: Rule, parts: Sequence[Unit], steps: Steps, budget: Budget, fixed: int, total: float
) -> Baseline:
    """Compare another rule with the ranks that keep the most at the same cost."""
    equal = spend(steps, rule.cost)
    gains = [
        float(part.curve[rank] - part.curve[rule_rank])
        for part, rank, rule_rank in zip(parts, equal.ranks.tolist(), rule.ranks.tolist(), strict=True)
    ]
    lead = int(np.argmax(gains))
    has_lead = len(parts) > 1 and 2 * gains[lead] > math.fsum(gains) > 0
    return Baseline(
        name=rule.name,
        spent=budget.in_unit(fixed + rule.cost),
        kept=min(1.0, max(0.0, _kept_energy(parts, rule.ranks)) / total),
        equal=min(1.0, max(0.0, _kept_energy(parts, equal.ranks)) / total),
        epsilon_min=_epsilon_min(parts, rule.ranks),
        lead=(parts[lead].group or parts[lead].members[0].layer) if has_lead else None,
        lead_gain=gains[lead] / total if has_lead else None,
    )


def _kept_energy(parts: Sequence[Unit], ranks: Ints) -> float:
    """Return the weighted energy that ranks keep."""
    return math.fsum(float(part.curve[rank]) for part, rank in zip(parts, ranks.tolist(), strict=True))


def _epsilon_min(parts: Sequence[Unit], ranks: Ints) -> float:
    """Return a lower bound on √(Σ tail energy / Σ energy) over the candidates, unweighted."""
    total = math.fsum(member.fro**2 for part in parts for member in part.members)
    energy = math.fsum(
        _bound_lost_energy(member, curve, rank)
        for part, rank in zip(parts, ranks.tolist(), strict=True)
        for member, curve in zip(part.members, part.curves, strict=True)
    )
    return math.sqrt(energy / total)


def _bound_lost_energy(member: Spectrum, curve: Floats, rank: int) -> float:
    """Return a lower bound on Σ_{i>rank}σ_i²; missing values are at most the last kept value."""
    error = member.fro**2 * member.energy_error
    energy = member.fro**2 * (1.0 - _kept_at(curve, rank)) - error
    if rank > len(member.s) and not member.complete:
        energy -= (rank - len(member.s)) * (member.s[-1] ** 2 + 2 * error)
    return max(0.0, energy)
