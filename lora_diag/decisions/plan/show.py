"""Terminal output of ``plan``: parameters, memory and compute of LoRA by rank, with full fine-tuning."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lora_diag.decisions.plan.measure import LORA_RATE, RATE_SOURCE
from lora_diag.decisions.plan.record import (
    Plan,
    PlanCapacity,
    PlanCost,
    PlanFit,
    PlanRank,
    PlanRates,
    PlanType,
)
from lora_diag.feature import Hint
from lora_diag.records.base import Shown
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Grid, Rows, grid_of, grids_table
from lora_diag.rendering.text import byte_count, percent, quantity, safe, short


def suggest_next(plan: Plan, values: Mapping[str, Any]) -> Hint:
    """Return the next command: ``tune``, which trains within the budget and needs no fine-tune.

    The budget is that of the plan, rank 16 in every layer without one, or rank 1 if the plan's allows no rank.
    """
    params, memory = values["params"], values["memory_budget"]
    budget = ["--params", str(params or 16 * plan.per_rank)]
    if memory and not params:
        budget = ["--memory-budget", str(memory)]
    if plan.fit is not None and not plan.fit.rank:  # the budget allows no rank: name the smallest that does
        budget = ["--params", str(plan.per_rank)]
    data = shlex.quote(str(values["data"] or "train.jsonl"))
    command = f"tune {{base}} --data {data} --eval held_out.jsonl {shlex.join(budget)} -o run"
    return Hint(command, "chooses by training; for a fine-tune that exists: spectrum, then allocate")


def plan_table(plan: Plan, width: int = 80, color: bool = False, next_command: str | None = None) -> str:
    """Return the tables and the summary of a plan.

    Args:
        plan: The plan.
        width: Columns of the terminal; 80 are enough.
        color: Whether to use ANSI colours.
        next_command: The suggested next command, printed last; None without one.

    Returns:
        Lines of text, without a trailing newline.
    """
    grids = [_make_types_grid(plan), _make_ranks_grid(plan), *([_make_costs_grid(plan)] if plan.costs else [])]
    return grids_table(grids, _make_statements(plan), width, color, next_command)


def _make_types_grid(plan: Plan) -> Grid:
    first = plan.ranks[0].rank
    rank_columns = (
        Shown(
            "per_rank",
            f"r={at_rank.rank}",
            "what LoRA trains",
            main=True,
            form="count",
            pool=partial(_count_lora_params, rank=at_rank.rank),
            drop=6 - position if position else 0,
        )
        for position, at_rank in enumerate(plan.ranks[:6])
    )
    pool = partial(_compute_rho, rank=first)
    fraction = Shown("per_rank", f"ρ at r={first}", "share", main=True, form="small_percent", pool=pool)
    rows = [(short(row.name), [row]) for row in sorted(plan.types, key=lambda row: not row.targeted)]
    return grid_of([*PlanType.shown, *rank_columns, fraction], rows, "module type")


def _count_lora_params(rows: Sequence[PlanType], rank: int) -> int | None:
    """Return the parameters of a LoRA of a rank on a type; None if the type has no LoRA."""
    return rank * rows[0].per_rank if rows[0].targeted else None


def _compute_rho(rows: Sequence[PlanType], rank: int) -> float | None:
    """Return ρ = r(d_in + d_out)/(d_in·d_out) of a type; None if the type has no LoRA."""
    return rank * rows[0].per_rank / rows[0].params if rows[0].targeted else None


def _make_ranks_grid(plan: Plan) -> Grid:
    full = {"params": plan.params, "of_model": 1.0, "bytes": plan.full_bytes}
    rows: Rows = [("full fine-tune", [full]), *((f"LoRA r={row.rank}", [row]) for row in plan.ranks)]
    return grid_of(PlanRank.shown, rows, "")


def _make_costs_grid(plan: Plan) -> Grid:
    machine_columns = (
        Shown(
            "core_seconds",
            "this machine" if n == 1 else f"{n} such",
            "time",
            main=True,
            form="time",
            pool=partial(_select_seconds, machines=n),
        )
        for n in plan.costs[0].seconds
    )
    rows = [("all values" if cost.top is None else f"--top {cost.top}", [cost]) for cost in plan.costs]
    core, speed = PlanCost.shown
    return grid_of([core, *machine_columns, speed], rows, "loradiag spectrum")


def _select_seconds(rows: Sequence[PlanCost], machines: int) -> float:
    return rows[0].seconds[machines]


def _make_statements(plan: Plan) -> list[Statement]:
    matrices = sum(row.matrices for row in plan.types if row.targeted)
    too_large = next((row.rank for row in plan.ranks if row.rho >= 1), None)
    frozen = "" if plan.base_bytes is None else f", {byte_count(plan.base_bytes)} as it is stored"
    lines = [
        make_statement(
            "budget", "Budget", *(_describe_fit(plan, plan.fit) if plan.fit is not None else ()), priority=0
        ),
        make_statement(
            "note",
            "Note",
            f"r={too_large} has more parameters than the matrices themselves: LoRA saves nothing" if too_large else "",
        ),
        *_describe_capacity(plan.capacity),
        make_statement(
            "targets",
            "LoRA on",
            f"{quantity(matrices)} with {plan.targeted:,} entries; each unit of r trains {plan.per_rank:,} parameters",
        ),
        make_statement(
            "model", "Model", f"{safe(plan.path)} ({plan.kind}), {plan.params:,} parameters", *map(safe, plan.notes)
        ),
        make_statement(
            "memory",
            "Memory",
            f"right columns: trainable weights and gradients in {plan.dtype}, and the optimizer's state; LoRA also "
            f"needs the frozen model{frozen}; activations are not included",
            priority=2,
        ),
        make_statement(
            "flops",
            "FLOPs",
            "multiply-adds of an unmerged adapter relative to those of the model's matrices; a merged adapter adds "
            "none",
            priority=2,
        ),
        make_statement("time", "Time", *(_describe_time(plan, plan.rates) if plan.rates is not None else ())),
    ]
    return [line for line in lines if line.lead]


def _describe_time(plan: Plan, rates: PlanRates) -> list[str]:
    """State the basis of the estimated run times, and their limits."""
    lines = [
        f"an estimate for {quantity(rates.cores, 'core')}, from the current speed of this machine, including its "
        "current load; start-up is not included",
        "storage is assumed to be fast enough: one machine reads at the rate in the last column, n machines at n "
        "times that",
    ]
    if len(plan.costs) > 1:
        lines.append(f"--top {plan.costs[1].top} assumes decaying spectra; a flat spectrum costs as much as all values")
    if any(seconds <= cost.longest for cost in plan.costs for seconds in cost.seconds.values()):
        lines.append("the largest matrix on one machine is a lower bound for any number of machines")
    return lines


def _describe_capacity(capacity: PlanCapacity | None) -> list[Statement]:
    """State the size of the data, and rules of thumb for rank and learning rate; nothing without a size."""
    if capacity is None:
        return []
    required_ranks = [
        f"{'more than full rank' if rule.rank is None else f'r ≥ {rule.rank}'} ({rule.name}: {rule.source})"
        for rule in capacity.rules
    ]
    lead = f"{capacity.tokens:,} predicted tokens; rules of thumb, to be tested: {', '.join(required_ranks)}"
    data = f"in {safe(capacity.data)} ({capacity.about})" if capacity.data else ""
    rate = f"rule of thumb: about {LORA_RATE} times full fine-tuning's, nearly the same at every rank ({RATE_SOURCE})"
    return [
        make_statement("capacity", "Capacity", lead, data, *map(safe, capacity.notes)),
        make_statement("rate", "Learning rate", rate),
    ]


def _describe_fit(plan: Plan, fit: PlanFit) -> list[str]:
    if fit.rank == 0:
        return [f"{safe(fit.asked)}: too small for r=1, which takes {plan.per_rank:,} parameters"]
    if fit.rank == fit.full_rank:
        used = f"{fit.spent:,} of {fit.budget:,} parameters, {percent(fit.spent / fit.budget)},"
        return [
            f"{safe(fit.asked)}: {used} give every matrix full rank, r={fit.rank}: a larger budget has no effect, "
            f"and full fine-tuning of these matrices trains {plan.targeted:,}"
        ]
    allowed = f"{fit.budget:,} parameters allow r ≤ {fit.rank} everywhere: {fit.spent:,} used, {fit.left:,} left"
    lines = [f"{safe(fit.asked)}: {allowed}"]
    if fit.spent >= plan.targeted:
        lines.append(f"that saves nothing: full fine-tuning of these matrices trains {plan.targeted:,}")
    if fit.listed is not None and fit.listed_left is not None and fit.listed != fit.rank:
        lines.append(f"of the requested ranks, r={fit.listed} fits with {fit.listed_left:,} remaining")
    if fit.listed is not None and fit.doubled:
        lines.append(f"the rest doubles it to r={2 * fit.listed} in {fit.doubled} of {fit.blocks} blocks")
    return lines
