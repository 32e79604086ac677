"""``probe sensitivity``: loss gain of adapting one layer or module type alone."""

from lora_diag.feature import Feature, Figure, Section

FEATURE = Feature(
    __name__,
    "probe sensitivity",
    command=".command:sensitivity",
    records=(
        ".record:Sensitivity",
        ".record:FirstOrder",
    ),
    functions=(".run:probe_sensitivity",),
    statements=".summary:sensitivity_lines",
    grids=".summary:sensitivity_grids",
    section=Section("Layers adapted alone", order=13, losses=True),
    questions=(("on", "Which layers gain most when adapted alone?"),),
    figures=(
        Figure(
            "sensitivity",
            "gain of each layer or module type adapted alone",
            "sensitivity",
            ".figures:figure",
            panels=(".figures:sensitivity",),
            made_by="loradiag probe sensitivity BASE --data FILE --eval FILE -o sensitivity.jsonl",
            obstacle=".figures:find_obstacle",
        ),
    ),
)
