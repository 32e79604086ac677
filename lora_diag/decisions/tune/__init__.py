"""``tune``: from a base model, data and a budget to an adapter configuration, with every decision on record."""

from lora_diag.feature import Feature, Figure, Section

FEATURE = Feature(
    __name__,
    "tune",
    command=".command:tune",
    records=(".record:TunePlan", ".record:TuneTrial", ".record:TuneDecision", ".record:Tune"),
    functions=(".run:tune",),
    table=".summary:tune_table",
    statements=".summary:tune_lines",
    grids=".summary:tune_grids",
    section=Section("Choice of an adapter", order=5, losses=True),
    questions=(("choice", "Which adapter should be trained?"),),
    figures=(
        Figure(
            "tune",
            "held-out loss against trained parameters: all runs, the frontier and the choice",
            "tune",
            ".figures:figure",
            panels=(".figures:tune",),
            made_by="loradiag tune BASE --data FILE --eval FILE --params N -o run/",
            obstacle=".figures:find_obstacle",
        ),
    ),
)
