"""Options of ``plan``."""

from collections.abc import Sequence
from typing import Annotated, TypedDict

from lora_diag.running.options import (
    ADAPTER_DTYPE,
    EXCLUDE,
    MEMORY_BUDGET,
    OPTIMIZER,
    PARAMS,
    RANKS,
    TARGETS,
    TOP,
    Option,
)


class PlanOptions(TypedDict, total=False):
    """Options of ``plan``."""

    ranks: Annotated[Sequence[int], RANKS.by((4, 8, 16, 64))]
    layers: Annotated[str | None, TARGETS]
    exclude: Annotated[str | None, EXCLUDE]
    params: Annotated[str | int | None, PARAMS]
    memory_budget: Annotated[str | int | None, MEMORY_BUDGET]
    optimizer: Annotated[str, OPTIMIZER]
    adapter_dtype: Annotated[str, ADAPTER_DTYPE]
    cost: Annotated[bool, Option(False, "Also estimate the run time of spectrum; times this machine.")]
    top: Annotated[int, TOP.by(64)]
