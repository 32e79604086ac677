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
