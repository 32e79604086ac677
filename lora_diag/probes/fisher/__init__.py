"""``probe fisher``: Fisher information of the part that a truncation discards."""

from lora_diag.feature import Feature, Figure, Section

FEATURE = Feature(
    __name__,
    "probe fisher",
    command=".command:fisher",
    records=(".record:Fisher",),
    functions=(".run:probe_fisher",),
    statements=".summary:fisher_lines",
    grids=".summary:fisher_grids",
    section=Section(
        "Expected cost of truncation (Fisher)",
        per="layer",
        order=16,
        losses=True,
    ),
    questions=(("at_rank", "In which layers does truncation cost most?"),),
    figures=(
        Figure(
            "fisher",
            "how well predictors rank layers by the cost of truncation",
            "fisher",
            ".figures:figure",
            panels=(".figures:fisher",),
            made_by="loradiag probe fisher BASE TUNED --data FILE --measure -o fisher.jsonl",
            by_color=False,
            obstacle=".figures:find_obstacle",
        ),
    ),
)
