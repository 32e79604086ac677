"""Options of ``probe sensitivity``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Required

from lora_diag.running.options import (
    DATA,
    GRANULARITY,
    RANK,
    RATES,
    REPEATS,
    STEPS,
    LayerTrainOptions,
    Option,
    Shifted,
)


class SensitivityOptions(Shifted, LayerTrainOptions, total=False):
    """Options of ``probe sensitivity``."""

    data: Required[Annotated[Path | str, DATA]]
    rank: Annotated[int, RANK.by(8)]
    delta: Annotated[int | None, Option(None, "Also train at rank R + D; default: only at R.", "D")]
    granularity: Annotated[str, GRANULARITY.by("layer", metavar="layer|block|type", help="Unit that is adapted alone.")]
    rates: Annotated[Sequence[float], RATES.by((3e-3, 1e-2))]
    steps: Annotated[int, STEPS.by(50)]
    repeats: Annotated[int, REPEATS.by(1)]
