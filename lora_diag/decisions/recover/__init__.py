"""``recover``: the update that 16-bit storage rounded away, from the rounding cells of the files."""

from lora_diag.feature import Feature, Figure, Section

FEATURE = Feature(
    __name__,
    "recover",
    command=".command:recover",
    records=(".record:Recovery",),
    functions=(".run:recover",),
    table=".summary:recovery_table",
    statements=".summary:recovery_lines",
    section=Section(
        "Update below the rounding of the files",
    ),
    questions=(("hidden", "What does the rounding of the files hide?"),),
    figures=(
        Figure(
            "recovery",
            "C(r) of the files and of the update before rounding, with intervals",
            "recovery",
            ".figures:figure",
            panels=(".figures:recovery",),
            made_by="loradiag recover BASE TUNED -o recovery.jsonl",
            obstacle=".figures:find_obstacle",
        ),
    ),
)
