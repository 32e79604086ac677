"""``probe sweep``: held-out loss after training at several ranks."""

from lora_diag.feature import Feature, Figure, Section

FEATURE = Feature(
    __name__,
    "probe sweep",
    command=".command:sweep",
    records=("lora_diag.records.probe:Probe",),
    functions=(".run:probe_sweep",),
    statements=".summary:sweep_lines",
    grids=".summary:sweep_grids",
    section=Section("Rank sweep", order=11, losses=True),
    questions=(
        ("on", "Which rank does training need?"),
        ("shifted", "Do shifted sets need the same rank?"),
    ),
    figures=(
        Figure(
            "sweep",
            "held-out loss of LoRA trained at each rank",
            "sweep",
            ".figures:figure",
            panels=(".figures:sweep",),
            made_by="loradiag probe sweep BASE --data FILE --eval FILE -o sweep.jsonl",
            obstacle=".figures:find_obstacle",
        ),
    ),
)
