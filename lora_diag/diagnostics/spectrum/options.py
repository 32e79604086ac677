"""Options of ``spectrum`` and ``gradient-spectrum``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from lora_diag.running.options import (
    ACTIVATIONS,
    KFAC,
    RANKS,
    RECOVER,
    TOP,
    Accuracy,
    Callbacks,
    LayerOptions,
    Option,
    Output,
    Resources,
    Resuming,
    Selection,
)


class GradientSpectrumOptions(Selection, Accuracy, Resources, Output, Resuming, Callbacks, total=False):
    """Options of ``gradient-spectrum``: no adapter takes part."""

    ranks: Annotated[Sequence[int], RANKS]
    top: Annotated[int | None, TOP]


class SpectrumOptions(LayerOptions, total=False):
    """Options of ``spectrum``."""

    ranks: Annotated[Sequence[int], RANKS]
    top: Annotated[int | None, TOP]
    gradients: Annotated[Sequence[Path | str], Option((), "Use gradient-spectrum.", "GRADIENTS...", hidden=True)]
    activations: Annotated[Path | str | None, ACTIVATIONS]
    kfac: Annotated[bool, KFAC]
    recover: Annotated[bool, RECOVER]
