"""Options of ``spectrum`` and ``gradient-spectrum``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from lora_diag.running.options import ACTIVATIONS, KFAC, RANKS, RECOVER, TOP, LayerOptions, Option


class GradientSpectrumOptions(LayerOptions, total=False):
    """Options of ``gradient-spectrum``."""

    ranks: Annotated[Sequence[int], RANKS]
    top: Annotated[int | None, TOP]


class SpectrumOptions(GradientSpectrumOptions, total=False):
    """Options of ``spectrum``."""

    gradients: Annotated[Sequence[Path | str], Option((), "Use gradient-spectrum.", "GRADIENTS...", hidden=True)]
    activations: Annotated[Path | str | None, ACTIVATIONS]
    kfac: Annotated[bool, KFAC]
    recover: Annotated[bool, RECOVER]
