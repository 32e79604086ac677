"""``portability``: the ΔW that each program which serves an adapter applies, against the one that is intended."""

from lora_diag.feature import Feature, Section

FEATURE = Feature(
    __name__,
    "portability",
    command=".command:portability",
    records=(".record:Portability",),
    functions=(".run:portability", ".fix:make_portable"),
    statements=".summary:portability_lines",
    grids=".summary:portability_grids",
    section=Section("Portability", order=45),
    questions=(("portable", "Will the adapter mean the same where it is served?"),),
)
