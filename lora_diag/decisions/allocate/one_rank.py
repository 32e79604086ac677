"""One rank for all layers with a rank, which every serving program scales alike.

Programs that read one r and one lora_alpha refuse, or scale wrongly, an adapter whose layers differ in rank. With one
rank r the choice is which layers get it; every r of a grid is tried, and the allocation that keeps most is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lora_diag.decisions.allocate.allocation import Allocated
from lora_diag.decisions.allocate.candidates import Constraints
from lora_diag.errors import UsageError

# Powers of two and the ranks half-way between them.
GRID = tuple(sorted({rank * 2**power for power in range(9) for rank in (2, 3)} | {1}))


def one_rank(plan: Callable[[Constraints], Allocated], constraints: Constraints) -> Allocated:
    """Return the best allocation in which every layer has rank 0 or one common rank.

    Args:
        plan: Chooses ranks under constraints.
        constraints: What every rank has to keep; ``ranks_from`` takes the place of the grid.

    Returns:
        The allocation; its bound is that of all ranks tried.

    Raises:
        UsageError: The budget is too small for every rank.
    """
    allocated: list[Allocated] = []
    refused: UsageError | None = None
    for rank in constraints.ranks_from or GRID:
        if not constraints.min_rank <= rank <= (constraints.max_rank or rank):
            continue
        try:
            allocated.append(plan(replace(constraints, ranks_from=(rank,))))
        except UsageError as error:
            refused = refused or error
    if not allocated:
        raise refused or UsageError("--portable: no rank lies between --min-rank and --max-rank")
    best = max(allocated, key=lambda plan_at_rank: (plan_at_rank.certificate.kept, -plan_at_rank.certificate.spent))
    kept, bound = best.certificate.kept, max(plan_at_rank.certificate.bound for plan_at_rank in allocated)
    update = {
        "bound": bound,
        "gap": max(0.0, (bound - kept) / bound) if bound > 0 else 0.0,
        "optimal": best.certificate.optimal and bound <= kept,
        "baselines": tuple(rule for rule in best.certificate.baselines if rule.spent),  # others have no such rank
    }
    return replace(best, certificate=best.certificate.model_copy(update=update))
