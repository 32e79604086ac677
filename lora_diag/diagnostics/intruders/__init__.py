"""``intruders``: singular vectors of the tuned weights without a counterpart in the base."""

from lora_diag.feature import Feature, Section

FEATURE = Feature(
    __name__,
    "intruders",
    command=".command:intruders",
    records=(".record:Intruders",),
    functions=(".run:intruders",),
    statements=".summary:intruders_lines",
    grids=".summary:intruders_grids",
    section=Section("Intruder dimensions", figures=("intruders",)),
    questions=(("intruders", "Are there intruder dimensions?"),),
)
