"""``probe curvature``: curvature of the loss along the update."""

from lora_diag.feature import Feature, Figure, Section

FEATURE = Feature(
    __name__,
    "probe curvature",
    command=".command:curvature",
    records=(
        ".record:Curvature",
        ".record:LossBound",
    ),
    functions=(".run:probe_curvature",),
    statements=".summary:curvature_lines",
    grids=".summary:curvature_grids",
    section=Section("Curvature of the loss", per="layer", order=14, losses=True),
    questions=(
        ("bound", "How tight is the loss bound of a truncation?"),
        ("curvature", "How large is the curvature of the loss?"),
    ),
    figures=(
        Figure(
            "curvature",
            "curvature of the loss; modelled and measured loss gaps of truncations",
            "curvature",
            ".figures:figure",
            panels=(".figures:curvature",),
            made_by="loradiag probe curvature BASE TUNED --eval FILE -o curvature.jsonl",
        ),
    ),
)
