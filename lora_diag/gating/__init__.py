"""``gate``: a policy and records → verdicts. A rule without the records it needs is inconclusive."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import Feature
from lora_diag.running.options import INPUTS, OUTPUT, Option

FEATURE = Feature(
    __name__,
    "gate",
    command=".command:gate",
    subcommands=(("gate init", ".command:init"),),
    records=(".record:Verdict",),
    functions=(".run:gate",),
    table=".show:verdict_table",
)


class GateOptions(TypedDict, total=False):
    """Options of ``gate``."""

    baseline: Annotated[
        Sequence[str | Path],
        Option((), "Results to compare with, layer by layer; repeatable.", "FILE", panel=INPUTS),
    ]
    ratchet: Annotated[bool, Option(False, "If passed, write improvements to --baseline.", panel=OUTPUT)]
    shipped: Annotated[
        Sequence[str | Path],
        Option((), "Input that every results file must refer to; repeatable.", "PATH", ("--for",), INPUTS),
    ]
    max_age: Annotated[str | None, Option(None, "Oldest results to accept, e.g. 12h, 7d, 2w; default: any.", "AGE")]
