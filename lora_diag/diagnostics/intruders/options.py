"""Options of ``intruders``."""

from typing import Annotated

from lora_diag.running.options import LayerOptions, Option


class IntruderOptions(LayerOptions, total=False):
    """Options of ``intruders``."""

    directions: Annotated[int, Option(10, "Largest singular directions of each weight to test.", "K", setting="top")]
    epsilon: Annotated[float, Option(0.5, "Cosine similarity to BASE below which a direction is new.", "E")]
    window: Annotated[float, Option(0.1, "Relative gap below which singular values count as equal.", "W")]
