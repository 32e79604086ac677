"""Declaration and options of ``fleet``, the comparison of many adapters."""

from pathlib import Path
from typing import Annotated

from lora_diag.feature import Argument, Command, Feature, Figure, Hint, Section
from lora_diag.running.options import (
    BASE,
    Callbacks,
    Device,
    Machines,
    MissingAlpha,
    Output,
    Resuming,
    Selection,
)


class FleetOptions(
    Selection, MissingAlpha, Device, Machines, Output, Resuming, Callbacks, total=False
):
    """Options of ``fleet``."""

    base: Annotated[str | Path | None, BASE]


FEATURE = Feature(
    __name__,
    "spectrum --adapters",
    "Understand",
    commands=(
        Command(
            help="Ranks, outliers and near-duplicates of many adapters.",
            notes="Rows: adapters with a remark; with --by layer, all adapters. DoRA, PiSSA and "
            "IA³ need --base.",
            examples=("fleet 'adapters/**' -o fleet.jsonl",),
            name="fleet",
            arguments=(
                Argument(
                    "adapters",
                    "Adapters or patterns such as 'runs/**'; - reads a list from stdin.",
                    "ADAPTER",
                    many=True,
                    stdin=True,
                ),
            ),
            options=(FleetOptions,),
            suggest=".show:suggest_next",
            hints=(Hint("gate init {output} -o policy.toml", "limits for the next adapters"),),
        ),
    ),
    records=(".record:Fleet",),
    functions=(".measure:fleet",),
    statements=".show:fleet_lines",
    grids=".show:fleet_grids",
    section=Section("A fleet"),
    figures=(
        Figure(
            "fleet",
            "many adapters: norm, used fraction of the rank, outliers",
            made_by="loradiag fleet 'adapters/**' -o fleet.jsonl",
        ),
    ),
    questions=(
        ("stand_out", "Which adapters are outliers?"),
        ("alike", "Which adapters are near-duplicates?"),
    ),
)
