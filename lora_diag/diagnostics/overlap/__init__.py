"""``overlap``: whether gradients stay in the subspaces of an update."""

from lora_diag.feature import Feature, Figure

FEATURE = Feature(
    __name__,
    "overlap",
    command=".command:overlap",
    records=(".record:Overlap",),
    functions=(
        ".run:overlap",
        ".run:subspaces",
        ".recorder:GradientRecorder",
    ),
    table=".table:overlap_table",
    statements=".summary:lines",
    questions=(
        ("inside", "Do the gradients stay in the subspaces?"),
        ("reach", "Do the gradients stay in the subspaces?"),
    ),
    figures=(
        Figure(
            "overlap",
            "κ and tangent overlap over the steps, with baselines",
            "overlap",
            ".figures:figure",
            panels=(".figures:overlap",),
            made_by="loradiag overlap BASE TUNED GRADIENTS -o overlap.jsonl",
            obstacle=".figures:find_obstacle",
        ),
    ),
)
