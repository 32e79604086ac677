"""The terminal's answer to ``plan``: what LoRA of each rank trains, takes and adds, beside full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Group
from rich.table import Table

from lora_diag.decisions.plan.capacity import LORA_RATE, RATE_SOURCE
from lora_diag.decisions.plan.record import Plan, PlanCapacity, PlanFit, PlanRank, PlanRates, PlanRule, PlanType
from lora_diag.rendering.columns import Column, table_of
from lora_diag.rendering.statements import Statement, say, summary_of
from lora_diag.rendering.text import byte_count, count, duration, percent, safe, short, to_text

# Optimizers by their column.
_OPTIMIZERS = {"AdamW": "adamw", "8-bit Adam": "adamw8bit", "SGD": "sgd", "SGD+momentum": "sgd_momentum"}


def plan_table(plan: Plan, width: int = 80, color: bool = False, then: str | None = None) -> str:
    """Return the tables and the summary of a plan.

    Args:
        plan: What was counted.
        width: Columns of the terminal; 80 are enough.
        color: Whether to use ANSI colours.
        then: The command that a user would run next.

    Returns:
        Lines of text, without a newline at the end.
    """
    told = summary_of(_lines(plan), then)
    tables = [_types(plan, width), _ranks(plan, width), *([_costs(plan, width)] if plan.costs else [])]
    return to_text(Group(*tables, told), width, color)


def _types(plan: Plan, width: int) -> Table:
    rows = sorted(plan.types, key=lambda row: not row.targeted)

    def column(title: str, cell: Callable[[PlanType], str], drop: int = 0) -> Column:
        return Column(title, tuple(map(cell, rows)), drop=drop)

    def lora(place: int, rank: int) -> Column:
        drop = 6 - place if place else 0
        return column(f"r={rank}", lambda row: count(rank * row.per_rank) if row.targeted else "-", drop)

    # ρ = r(d_in + d_out)/(d_in·d_out) is r times this.
    columns = [
        column("n", lambda row: str(row.matrices)),
        column("shape", lambda row: "×".join(map(str, row.shape))),
        column("full", lambda row: count(row.params)),
        *(lora(place, each.rank) for place, each in enumerate(plan.ranks[:6])),
        column(f"ρ at r={plan.ranks[0].rank}", lambda row: _rho(row, plan.ranks[0].rank)),
    ]
    return table_of("module type", [short(row.name) for row in rows], columns, width)


def _rho(row: PlanType, rank: int) -> str:
    return _percent(rank * row.per_rank / row.params) if row.targeted else "-"


def _memory_column(plan: Plan, title: str, key: str) -> Column:
    return _column(title, byte_count(plan.full_bytes[key]), plan.ranks, lambda row: byte_count(row.bytes[key]))


def _ranks(plan: Plan, width: int) -> Table:
    columns = [
        _column("trains", count(plan.params), plan.ranks, lambda row: count(row.params)),
        _column("of model", "100%", plan.ranks, lambda row: _percent(row.of_model)),
        _column("ρ", "-", plan.ranks, lambda row: _percent(row.rho)),
        _column("+ FLOPs", "-", plan.ranks, lambda row: _percent(row.flops)),
        *(_memory_column(plan, title, key) for title, key in _OPTIMIZERS.items()),
    ]
    names = ["full fine-tune", *(f"LoRA r={row.rank}" for row in plan.ranks)]
    columns[-1] = replace(columns[-1], drop=1)
    return table_of("", names, columns, width)


def _costs(plan: Plan, width: int) -> Table:
    columns = [Column("core time", tuple(_time_of(each.core_seconds) for each in plan.costs))]
    for machines in plan.costs[0].seconds:
        title = "this machine" if machines == 1 else f"{machines} such"
        columns.append(Column(title, tuple(_time_of(each.seconds[machines]) for each in plan.costs)))
    if plan.costs[0].bytes is not None:
        speeds = (f"{byte_count(round((each.bytes or 0) / each.seconds[1]))}/s" for each in plan.costs)
        columns.append(Column("one reads", tuple(speeds)))
    names = ["all values" if each.top is None else f"--top {each.top}" for each in plan.costs]
    return table_of("loradiag spectrum", names, columns, width)


def _time_of(seconds: float) -> str:
    return "<1 s" if seconds < 1 else duration(seconds)


def _column(title: str, full: str, ranks: Sequence[PlanRank], cell: Callable[[PlanRank], str]) -> Column:
    return Column(title, (full, *map(cell, ranks)))


def _lines(plan: Plan) -> list[Statement]:
    targeted = [row for row in plan.types if row.targeted]
    matrices = sum(row.matrices for row in targeted)
    lines = [
        say("model", "Model", f"{safe(plan.path)} ({plan.kind}), {plan.params:,} parameters", *map(safe, plan.notes)),
        say(
            "targets",
            "LoRA on",
            f"{matrices} matrices with {plan.targeted:,} entries; each rank trains "
            f"{sum(row.per_rank for row in targeted):,} parameters",
        ),
        *_capacity(plan.capacity),
        say(
            "memory",
            "Memory",
            f"at the right, of what is trained: weights and gradients in {plan.dtype}, and the optimizer's state; "
            f"LoRA needs the frozen model, too{_frozen(plan)}; activations come on top of both",
        ),
        say(
            "flops",
            "FLOPs",
            "what an unmerged adapter adds to the multiply-adds of the model's matrices; merged, it adds none",
        ),
    ]
    if plan.rates is not None:
        lines.append(say("time", "Time", *_time(plan, plan.rates)))
    if plan.fit is not None:
        lines.append(say("budget", "Budget", *_fit(plan, plan.fit)))
    too_large = [row for row in plan.ranks if row.rho >= 1]
    if too_large:
        nothing = f"r={too_large[0].rank} trains more than the matrices themselves hold: LoRA saves nothing"
        lines.append(say("note", "Note", nothing))
    return lines


def _time(plan: Plan, rates: PlanRates) -> list[str]:
    """Say what the estimate stands on."""
    cores = "1 core" if rates.cores == 1 else f"{rates.cores} cores"
    lines = [
        f"an estimate for {cores}, from the speed of this machine measured just now: what else it was busy "
        "with counts; start-up is not in it",
        "storage is taken to keep up: one machine reads as fast as the last column says, many that many times as fast",
    ]
    if len(plan.costs) > 1:
        lines.append(f"--top {plan.costs[1].top} is for spectra that decay; a flat one costs as much as all values")
    if any(seconds <= cost.longest for cost in plan.costs for seconds in cost.seconds.values()):
        lines.append("no number of machines is faster than one is on the largest matrix")
    return lines


def _capacity(capacity: PlanCapacity | None) -> list[Statement]:
    """Return how much there is to learn, and the rules of thumb, each with its source; nothing where none was asked."""
    if capacity is None:
        return []
    asked = [f"{_wanted(rule)} ({rule.name}: {rule.source})" for rule in capacity.rules]
    lead = f"{capacity.tokens:,} predicted tokens; rules of thumb, to be tested: {', '.join(asked)}"
    lines = [lead, f"in {safe(capacity.data)} ({capacity.about})"] if capacity.data else [lead]
    rate = f"rule of thumb: about {LORA_RATE} times full fine-tuning's, nearly the same at every rank ({RATE_SOURCE})"
    return [say("capacity", "Capacity", *lines, *map(safe, capacity.notes)), say("rate", "Learning rate", rate)]


def _wanted(rule: PlanRule) -> str:
    return "more than full rank" if rule.rank is None else f"r ≥ {rule.rank}"


def _frozen(plan: Plan) -> str:
    return "" if plan.base_bytes is None else f", {byte_count(plan.base_bytes)} as it is stored"


def _fit(plan: Plan, fit: PlanFit) -> list[str]:
    if fit.rank == 0:
        least = sum(row.per_rank for row in plan.types if row.targeted)
        return [f"{safe(fit.asked)}: not even r=1 fits, it takes {least:,} parameters"]
    if fit.rank == fit.full_rank:
        used = f"{fit.spent:,} of {fit.budget:,} parameters, {percent(fit.spent / fit.budget)},"
        return [
            f"{safe(fit.asked)}: {used} give every matrix full rank, r={fit.rank}: more buys nothing, and full "
            f"fine-tuning of these matrices trains {plan.targeted:,}"
        ]
    allowed = f"{fit.budget:,} parameters allow r ≤ {fit.rank} everywhere, {fit.spent:,}; {fit.left:,} are left"
    lines = [f"{safe(fit.asked)}: {allowed}"]
    if fit.spent >= plan.targeted:
        lines.append(f"that saves nothing: full fine-tuning of these matrices trains {plan.targeted:,}")
    if fit.listed is not None and fit.listed_left is not None and fit.listed != fit.rank:
        lines.append(f"of the ranks asked about, r={fit.listed} fits and leaves {fit.listed_left:,}")
    if fit.listed is not None and fit.doubled:
        lines.append(f"the rest doubles it to r={2 * fit.listed} in {fit.doubled} of {fit.blocks} blocks")
    return [*lines, "where the rest keeps most is what loradiag allocate computes from a pilot's spectrum"]


def _percent(share: float) -> str:
    """Return a share with the digits that tell small ranks apart.

    >>> _percent(0.00390625), _percent(0.25)
    ('0.391%', '25.0%')
    """
    return percent(share) if share < 1e-4 else f"{share * 100:.3f}%" if share < 0.1 else f"{share:.1%}"
