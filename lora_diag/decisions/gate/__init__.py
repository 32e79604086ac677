"""``gate``: a policy and records → verdicts. A rule without the records it needs is inconclusive."""

from lora_diag.feature import Feature

FEATURE = Feature(
    __name__,
    "gate",
    command=".command:gate",
    subcommands=(("gate init", ".command:init"),),
    records=(".record:Verdict",),
    functions=(".run:gate",),
    table=".summary:verdict_table",
)
