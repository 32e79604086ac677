"""Declaration and options of ``fleet``, the comparison of many adapters."""

from pathlib import Path
from typing import Annotated

from lora_diag.feature import Feature, Figure, Section
from lora_diag.running.options import BASE, Callbacks, Device, Machines, MissingAlpha, Output, Resuming, Selection

FEATURE = Feature(
    __name__,
    "spectrum --adapters",
    records=(".record:Fleet",),
    functions=(".measure:fleet",),
    subcommands=(("fleet", ".command:fleet"),),
    table=".show:fleet_table",
    statements=".show:fleet_lines",
    grids=".show:fleet_grids",
    section=Section(
        "A fleet",
    ),
    figures=(
        Figure(
            "fleet",
            "many adapters: norm, used fraction of the rank, outliers",
            panels=(".figures:fleet",),
            made_by="loradiag fleet 'adapters/**' -o fleet.jsonl",
        ),
    ),
    questions=(
        ("stand_out", "Which adapters are outliers?"),
        ("alike", "Which adapters are near-duplicates?"),
    ),
)


class FleetOptions(Selection, MissingAlpha, Device, Machines, Output, Resuming, Callbacks, total=False):
    """Options of ``fleet``."""

    base: Annotated[str | Path | None, BASE]
