"""``spectrum``: singular values of ΔW, energy curves, and the rounding noise of the files."""

from lora_diag.feature import Feature, Figure

FEATURE = Feature(
    __name__,
    "spectrum",
    command=".command:spectrum",
    subcommands=(("gradient-spectrum", ".command:gradient_spectrum"),),
    records=(".record:Spectrum",),
    functions=(".run:spectrum",),
    table=".table:spectrum_table",
    statements=".summary:summary_lines",
    questions=(
        ("low_rank", "Is the update low-rank?"),
        ("rank_used", "Is the update low-rank?"),
        ("rank_at_90", "Is the update low-rank?"),
        ("resolved", "Do the files resolve the update?"),
        ("moved", "How far did the weights move?"),
    ),
    figures=(
        Figure(
            "energy",
            "C(r): energy kept by the best adapter of each rank",
            "spectrum",
            ".figure_energy:figure",
            panels=(".figure_energy:energy",),
            made_by="loradiag spectrum BASE TUNED -o spectrum.jsonl",
            obstacle=".figures:no_update_reason",
        ),
        Figure(
            "spectrum",
            "singular values and the noise edge of the files",
            "spectrum",
            ".figures:figure",
            panels=(".figures:spectrum",),
            made_by="loradiag spectrum BASE TUNED -o spectrum.jsonl",
            obstacle=".figures:mixed_units_reason",
        ),
    ),
)
