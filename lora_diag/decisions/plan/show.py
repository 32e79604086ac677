"""Terminal output of ``plan``: parameters, memory and compute of LoRA by rank, with full
fine-tuning.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from lora_diag.decisions.plan.measure import LORA_RATE, RATE_SOURCE
from lora_diag.decisions.plan.record import (
    Plan,
    PlanCapacity,
    PlanCost,
    PlanFit,
    PlanRank,
    PlanType,
)
from lora_diag.feature import Hint
from lora_diag.records.base import Shown
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Grid, grid_of, grids_table
from lora_diag.rendering.text import byte_count, quantity, safe, short


def suggest_next(plan: Plan, values: Mapping[str, Any]) -> Hint:
    """Return the next command: ``tune``, which trains within the budget and needs no fine-tune.

    The budget is that of the plan, rank 16 in every layer without one, or rank 1 if the plan's
    allows no rank.
    """
    params = values["params"] or 16 * plan.per_rank
    memory = values["memory_budget"] if not values["params"] else None
    if plan.fit is not None and not plan.fit.rank:
        # The budget allows no rank: name the smallest that does.
        params, memory = plan.per_rank, None
    budget = ["--memory-budget", str(memory)] if memory else ["--params", str(params)]
    data = shlex.quote(str(values["data"] or "train.jsonl"))
    command = f"tune {{base}} --data {data} --eval held_out.jsonl {shlex.join(budget)} -o run"
    purpose = "chooses by training; for a fine-tune that exists: spectrum, then allocate"
    return Hint(command, purpose)


def plan_table(
    plan: Plan, width: int = 80, color: bool = False, next_command: str | None = None
) -> str:
    """Return the tables and the summary of a plan.

    Args:
        plan: The plan.
        width: Columns of the terminal; 80 are enough.
        color: Whether to use ANSI colours.
        next_command: The suggested next command, printed last; None without one.

    Returns:
        Lines of text, without a trailing newline.
    """
    grids = [_make_types_grid(plan), _make_ranks_grid(plan)]
    if plan.costs:
        grids.append(_make_costs_grid(plan))
    statements = [statement for statement in _make_statements(plan) if statement.lead]
    return grids_table(grids, statements, width, color, next_command)


def _make_types_grid(plan: Plan) -> Grid:
    """Return the table of module types: parameters of full fine-tuning and of LoRA by rank, and ρ
    at the first.
    """
    ranks = [row.rank for row in plan.ranks[:6]]
    rank_columns = []
    for i, rank in enumerate(ranks):
        drop = 6 - i if i else 0
        about = "What LoRA trains"
        column = Shown(f"r{rank}", f"r={rank}", about, main=True, form="count", drop=drop)
        rank_columns.append(column)
    rho = Shown(
        "rho", f"ρ at r={ranks[0]}", "R(d_in + d_out)/(d_in·d_out)", main=True, form="small_percent"
    )
    rows: list[tuple[str, list[dict[str, Any]]]] = []
    for row in sorted(plan.types, key=lambda row: not row.targeted):
        values = row.model_dump()
        if row.targeted:
            values |= {f"r{rank}": rank * row.per_rank for rank in ranks}
            values["rho"] = ranks[0] * row.per_rank / row.params
        rows.append((short(row.name), [values]))
    return grid_of([*PlanType.shown, *rank_columns, rho], rows, "module type")


def _make_ranks_grid(plan: Plan) -> Grid:
    full = {"params": plan.params, "of_model": 1.0, "bytes": plan.full_bytes}
    rows: list[tuple[str, list[Any]]] = [("full fine-tune", [full])]
    rows += [(f"LoRA r={row.rank}", [row]) for row in plan.ranks]
    return grid_of(PlanRank.shown, rows, "")


def _make_costs_grid(plan: Plan) -> Grid:
    machine_columns = []
    for n in plan.costs[0].seconds:
        title = "this machine" if n == 1 else f"{n} such"
        machine_columns.append(Shown(f"on{n}", title, "Time", main=True, form="time"))
    rows = []
    for cost in plan.costs:
        name = "all values" if cost.top is None else f"--top {cost.top}"
        values = cost.model_dump() | {"speed": cost.speed}
        values |= {f"on{n}": seconds for n, seconds in cost.seconds.items()}
        rows.append((name, [values]))
    core, speed = PlanCost.shown
    return grid_of([core, *machine_columns, speed], rows, "loradiag spectrum")


def _make_statements(plan: Plan) -> Iterator[Statement]:
    if plan.fit is not None:
        yield make_statement("budget", "Budget", *_describe_fit(plan, plan.fit), priority=0)
    too_large = [row.rank for row in plan.ranks if row.rho >= 1]
    if too_large:
        text = (
            f"r={too_large[0]} has more parameters than the matrices themselves: LoRA saves nothing"
        )
        yield make_statement("note", "Note", text)
    if plan.capacity is not None:
        yield from _describe_capacity(plan.capacity)
    matrices = quantity(sum(row.matrices for row in plan.types if row.targeted))
    text = f"{matrices} with {plan.targeted:,} entries"
    trained = f"each unit of r trains {plan.per_rank:,} parameters"
    yield make_statement("targets", "LoRA on", f"{text}; {trained}")
    yield make_statement("model", "Model", *map(safe, plan.notes))
    frozen = "" if plan.base_bytes is None else f", {byte_count(plan.base_bytes)} as it is stored"
    memory = (
        f"of what is trained, in {plan.dtype}; LoRA also needs the frozen model{frozen}, and "
        "both need activations"
    )
    yield make_statement("memory", "Memory", memory, priority=2)
    if plan.rates is not None:
        times = [
            f"an estimate for {quantity(plan.rates.cores, 'core')} at the current speed and load "
            "of this machine; n machines read n times the rate in the last column"
        ]
        if len(plan.costs) > 1:
            times.append(
                "--top assumes decaying spectra; a flat spectrum costs as much as all values"
            )
        yield make_statement("time", "Time", *times)


def _describe_capacity(capacity: PlanCapacity) -> Iterator[Statement]:
    """State the size of the data, and rules of thumb for rank and learning rate."""
    required = []
    for rule in capacity.rules:
        rank = "more than full rank" if rule.rank is None else f"r ≥ {rule.rank}"
        required.append(f"{rank} ({rule.name}: {rule.source})")
    rules = ", ".join(required)
    lead = f"{capacity.tokens:,} predicted tokens; rules of thumb, to be tested: {rules}"
    data = f"in {safe(capacity.data)} ({capacity.about})" if capacity.data else ""
    yield make_statement("capacity", "Capacity", lead, data, *map(safe, capacity.notes))
    rate = (
        f"rule of thumb: about {LORA_RATE} times full fine-tuning's, nearly the same at every "
        f"rank ({RATE_SOURCE})"
    )
    yield make_statement("rate", "Learning rate", rate)


def _describe_fit(plan: Plan, fit: PlanFit) -> list[str]:
    """State the largest rank within the budget, and when full fine-tuning of the matrices costs no
    more.
    """
    asked = safe(fit.asked)
    if fit.rank == 0:
        return [f"{asked}: too small for r=1, which takes {plan.per_rank:,} parameters"]
    lines = [
        f"{asked}: {fit.budget:,} parameters allow r ≤ {fit.rank} everywhere: {fit.spent:,} used, "
        f"{fit.left:,} left"
    ]
    if fit.rank == fit.full_rank:
        lines.append("that is full rank: a larger budget has no effect")
    if fit.spent >= plan.targeted:
        lines.append(
            f"that saves nothing: full fine-tuning of these matrices trains {plan.targeted:,}"
        )
    return lines
