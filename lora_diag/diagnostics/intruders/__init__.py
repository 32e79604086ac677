"""Declaration and options of ``intruders``: singular vectors of W_tuned without a counterpart in
W_base.
"""

from typing import Annotated

from lora_diag.feature import BASE_ARGUMENT, TUNED_ARGUMENT, Command, Feature, Section
from lora_diag.running.options import LayerOptions, Option


class IntruderOptions(LayerOptions, total=False):
    """Options of ``intruders``."""

    directions: Annotated[
        int, Option(10, "Largest singular directions to test.", "K", least=1, former="top")
    ]
    epsilon: Annotated[
        float, Option(0.5, "Cosine similarity to BASE below which a direction is new.", "E")
    ]
    window: Annotated[
        float, Option(0.1, "Relative gap below which singular values count as equal.", "W")
    ]


FEATURE = Feature(
    __name__,
    "intruders",
    "Research",
    commands=(
        Command(
            help="Intruder dimensions: large directions unlike any of BASE.",
            examples=("intruders base/ lora_r8/ -o intruders.jsonl",),
            arguments=(BASE_ARGUMENT, TUNED_ARGUMENT),
            options=(IntruderOptions,),
            suggest=".show:suggest_next",
        ),
    ),
    records=(".record:Intruders",),
    functions=(".measure:intruders",),
    statements=".show:intruders_lines",
    grids=".show:intruders_grids",
    section=Section("Intruder dimensions", figures=("intruders",)),
    questions=(("intruders", "Are there intruder dimensions?"),),
)
