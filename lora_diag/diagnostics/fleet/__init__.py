"""``fleet``: comparison of many adapters."""

from lora_diag.feature import Feature, Figure, Section

FEATURE = Feature(
    __name__,
    "spectrum --adapters",
    records=(".record:Fleet",),
    functions=(".run:fleet",),
    subcommands=(("fleet", ".command:fleet"),),
    table=".summary:fleet_table",
    statements=".summary:fleet_section_lines",
    grids=".summary:fleet_section_grids",
    section=Section(
        "A fleet",
    ),
    figures=(
        Figure(
            "fleet",
            "many adapters: norm, used fraction of the rank, outliers",
            "fleet",
            ".figures:figure",
            panels=(".figures:fleet",),
            made_by="loradiag fleet 'adapters/**' -o fleet.jsonl",
            obstacle=".figures:find_obstacle",
        ),
    ),
    questions=(
        ("stand_out", "Which adapters are outliers?"),
        ("alike", "Which adapters are near-duplicates?"),
    ),
)
