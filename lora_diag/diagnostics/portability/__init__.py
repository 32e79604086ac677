"""``portability``: the ΔW that each serving program applies, compared with the intended one."""

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
            "error ε of each weight of an adapter in each serving program",
            "portability",
            ".figures:figure",
            panels=(".figures:portability",),
            made_by="loradiag portability ADAPTER -o portability.jsonl",
            by_color=False,
        ),
    ),
    questions=(("portable", "Do serving programs apply the intended update?"),),
)
