"""Declaration and options of ``intruders``: singular vectors of W_tuned without a counterpart in W_base."""

from typing import Annotated

from lora_diag.feature import Feature, Section
from lora_diag.running.options import LayerOptions, Option

FEATURE = Feature(
    __name__,
    "intruders",
    command=".command:intruders",
    records=(".record:Intruders",),
    functions=(".measure:intruders",),
    statements=".show:intruders_lines",
    grids=".show:intruders_grids",
    section=Section("Intruder dimensions", figures=("intruders",)),
    questions=(("intruders", "Are there intruder dimensions?"),),
)


class IntruderOptions(LayerOptions, total=False):
    """Options of ``intruders``."""

    directions: Annotated[int, Option(10, "Largest singular directions of each weight to test.", "K", setting="top")]
    epsilon: Annotated[float, Option(0.5, "Cosine similarity to BASE below which a direction is new.", "E")]
    window: Annotated[float, Option(0.1, "Relative gap below which singular values count as equal.", "W")]
