"""``probe truncation``: held-out loss of the update truncated to each rank."""

from lora_diag.feature import Feature, Figure, Section

FEATURE = Feature(
    __name__,
    "probe truncation",
    command=".command:truncation",
    records=("lora_diag.records.probe:Probe",),
    functions=(".run:probe_truncation",),
    statements=".summary:truncation_lines",
    grids=".summary:truncation_grids",
    section=Section("Truncated update", order=12, losses=True),
    questions=(("on", "How much of its gain does the truncated update keep?"),),
    figures=(
        Figure(
            "truncation",
            "held-out loss of the update truncated to each rank",
            "truncation",
            ".figures:figure",
            panels=(".figures:truncation",),
            made_by="loradiag probe truncation BASE TUNED --eval FILE -o truncation.jsonl",
            obstacle=".figures:find_obstacle",
        ),
        Figure(
            "alone",
            "cost of truncating one layer or module type alone",
            "truncation",
            ".figure_alone:figure",
            panels=(".figure_alone:alone",),
            made_by="loradiag probe truncation BASE TUNED --eval FILE --granularity type -o truncation.jsonl",
            obstacle=".figure_alone:find_obstacle",
        ),
    ),
)
