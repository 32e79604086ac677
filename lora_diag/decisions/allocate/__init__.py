"""``allocate``: choose ranks under a budget, with a certificate."""

from lora_diag.feature import Feature, Figure

FEATURE = Feature(
    __name__,
    "allocate",
    command=".command:allocate",
    subcommands=(("rank-rules", ".command:rank_rules"),),
    records=(
        ".record:Allocation",
        ".record:Certificate",
    ),
    functions=(".run:allocate",),
    table=".summary:allocation_table",
    figures=(
        Figure(
            "allocation",
            "rank by layer, and energy kept compared with the bound",
            "allocation",
            ".figures:figure",
            panels=(".figures:allocation", ".figures:budget"),
            made_by="loradiag allocate spectrum.jsonl --params 10M -o allocation.jsonl",
        ),
    ),
)
