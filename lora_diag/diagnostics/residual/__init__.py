"""``residual``: distance of an adapter from a full fine-tune."""

from lora_diag.feature import Feature, Figure

FEATURE = Feature(
    __name__,
    "residual",
    command=".command:residual",
    records=(".record:Residual",),
    functions=(".run:residual",),
    statements=".summary:residual_lines",
    grids=".summary:residual_grids",
    questions=(
        ("low_rank", "Is the update low-rank?"),
        ("resolved", "Do the files resolve the update?"),
        ("limited_by", "What limits the adapter?"),
        ("distance", "What limits the adapter?"),
        ("interpretation", "What limits the adapter?"),
    ),
    figures=(
        Figure(
            "residual",
            "ε and its floor, layer by layer, by cause",
            "residual",
            ".figures:figure",
            panels=(".figures:residual",),
            made_by="loradiag residual BASE TUNED ADAPTER -o residual.jsonl",
            by_color=False,
            obstacle=".figures:find_obstacle",
        ),
    ),
)
