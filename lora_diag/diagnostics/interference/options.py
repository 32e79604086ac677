"""Options of ``interference``."""

from collections.abc import Sequence
from typing import Annotated

from lora_diag.running.options import INPUTS, RANKS, LayerOptions, Option


class InterferenceOptions(LayerOptions, total=False):
    """Options of ``interference``."""

    weights: Annotated[
        Sequence[float] | None,
        Option(None, "Weight of each update in the sum; default: all 1.", "W,W,...", panel=INPUTS),
    ]
    ranks: Annotated[Sequence[int], RANKS]
    density: Annotated[float, Option(0.2, "Fraction of entries that TIES keeps; 0: no TIES or sign conflicts.", "D")]
