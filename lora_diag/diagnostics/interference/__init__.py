"""``interference``: angles, sums and merges of several updates of one base."""

from lora_diag.feature import Feature, Figure, Section

FEATURE = Feature(
    __name__,
    "interference",
    command=".command:interference",
    records=(
        ".record:Interference",
        ".record:Union",
    ),
    functions=(".run:interference",),
    statements=".summary:interference_lines",
    grids=".summary:interference_grids",
    section=Section(
        "Several updates",
    ),
    figures=(
        Figure(
            "angles",
            "principal angles between updates, compared with chance",
            "interference",
            ".figures:figure",
            panels=(".figures:angles",),
            made_by="loradiag interference BASE TUNED TUNED -o interference.jsonl",
            by_color=False,
            obstacle=".figures:find_obstacle",
        ),
        Figure(
            "union",
            "rank of the sum of updates, compared with the sum of ranks",
            "union",
            ".figure_union:figure",
            panels=(".figure_union:union",),
            made_by="loradiag interference BASE TUNED TUNED -o interference.jsonl",
            by_color=False,
            obstacle=".figure_union:find_obstacle",
        ),
    ),
    questions=(
        ("interfere", "Do the updates interfere?"),
        ("rank_needed", "Which rank do all updates together need?"),
    ),
)
