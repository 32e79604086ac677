"""``probe intrinsic``: number of trained parameters that reach a fraction of the full gain."""

from lora_diag.feature import Feature, Figure, Section

FEATURE = Feature(
    __name__,
    "probe intrinsic",
    command=".command:intrinsic",
    records=(".record:Intrinsic",),
    functions=(".run:probe_intrinsic",),
    statements=".summary:intrinsic_lines",
    grids=".summary:intrinsic_grids",
    section=Section("Intrinsic dimension", order=15, losses=True),
    questions=(("on", "How many directions does training need?"),),
    figures=(
        Figure(
            "intrinsic",
            "fraction of full fine-tuning's gain by trained parameters",
            "intrinsic",
            ".figures:figure",
            panels=(".figures:intrinsic",),
            made_by="loradiag probe intrinsic BASE --data FILE --eval FILE -o intrinsic.jsonl",
            obstacle=".figures:find_obstacle",
        ),
    ),
)
