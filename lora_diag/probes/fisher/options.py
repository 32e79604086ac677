"""Options of ``probe fisher``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Required

from lora_diag.running.options import DATA, LABELS, RANKS, SEED, HeldOut, LayerProbeOptions, MissingAlpha, Option


class FisherOptions(HeldOut, LayerProbeOptions, MissingAlpha, total=False):
    """Options of ``probe fisher``."""

    data: Required[Annotated[Path | str, DATA]]
    measure: Annotated[bool, Option(False, "Truncate each layer alone, to compare F with; implied by --eval.")]
    ranks: Annotated[Sequence[int], RANKS]
    labels: Annotated[str, LABELS]
    seed: Annotated[int, SEED]
