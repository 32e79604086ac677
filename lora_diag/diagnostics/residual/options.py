"""Options of ``residual``."""

from pathlib import Path
from typing import Annotated

from lora_diag.running.options import ACTIVATIONS, RECOVER, REFERENCE, LayerOptions


class ResidualOptions(LayerOptions, total=False):
    """Options of ``residual``."""

    reference: Annotated[str | Path | None, REFERENCE]
    activations: Annotated[Path | str | None, ACTIVATIONS]
    recover: Annotated[bool, RECOVER]
