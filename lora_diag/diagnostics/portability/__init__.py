"""``portability``: the ΔW that each program which serves an adapter applies, against the one that is intended."""

from lora_diag.feature import Feature, Figure, Section

FEATURE = Feature(
    __name__,
    "portability",
    command=".command:portability",
    records=(".record:Portability",),
    functions=(".run:portability", ".fix:make_portable"),
    statements=".summary:portability_lines",
    grids=".summary:portability_grids",
    section=Section("Portability", order=45),
    figures=(
        Figure(
            "portability",
            "adapters where they are served: what each program makes of each weight, and its ε",
            "portability",
            ".figures:figure",
            panels=(".figures:portability",),
            made_by="loradiag portability ADAPTER -o portability.jsonl",
            by_color=False,
        ),
    ),
    questions=(("portable", "Will the adapter mean the same where it is served?"),),
)
