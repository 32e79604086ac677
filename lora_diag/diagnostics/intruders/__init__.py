"""``intruders``: singular vectors of the tuned weights that the base does not have."""

from lora_diag.feature import Feature, Section

FEATURE = Feature(
    __name__,
    "intruders",
    command=".command:intruders",
    records=(".record:Intruders",),
    functions=(".run:intruders",),
    table=".summary:intruders_table",
    section=Section(
        "Intruder dimensions", ".summary:intruders_lines", ".summary:intruders_grids", figures=("intruders",)
    ),
    questions=(("intruders", "Are there intruder dimensions?"),),
)
