"""``loradiag plan``."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import line, result, terminal
from lora_diag.decisions.plan import PlanOptions


@options.spread
def plan(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Checkpoint (only headers are read), or a model's config.json.")
    ],
    *,
    arguments: PlanOptions,
    shown: options.Shown,
) -> None:
    """Parameters, memory and FLOPs of LoRA at each rank.

    Example: loradiag plan base/ --layers 'q_proj|v_proj' --params 10M
    """
    from lora_diag.decisions.plan.measure import plan as compute_costs
    from lora_diag.decisions.plan.show import plan_table

    costs = compute_costs(base, **arguments)
    if shown.json:
        line(costs.model_dump_json())
        return
    params, memory = arguments["params"], arguments["memory_budget"]
    budget = (
        ["--params", str(params)] if params else ["--memory-budget", str(memory)] if memory else ["--params", "10M"]
    )
    if costs.fit is not None and not costs.fit.rank:  # the budget allows no rank: name the smallest that does
        budget = ["--params", str(sum(row.per_rank for row in costs.types if row.targeted))]
    pilot = shlex.join(["loradiag", "spectrum", str(base), "TUNED", "-o", "results.jsonl"])
    selection = [
        word
        for option in (("--layers", arguments["layers"]), ("--exclude", arguments["exclude"]))
        if option[1]
        for word in option
    ]
    hint = f"{pilot}, then {shlex.join(['loradiag', 'allocate', 'results.jsonl', *budget, *map(str, selection)])}"
    if not shown.quiet:
        result(plan_table(costs, *terminal(), next_command=hint))
