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
    questions=(("on", "In how few directions does training get as far?"),),
    figures=(
        Figure(
            "intrinsic",
            "share of full fine-tuning's gain by trained parameters",
            "intrinsic",
            ".figures:figure",
            panels=(".figures:intrinsic",),
            made_by="loradiag probe intrinsic BASE --data FILE --eval FILE -o intrinsic.jsonl",
            lacks=".figures:lacks",
        ),
    ),
)
