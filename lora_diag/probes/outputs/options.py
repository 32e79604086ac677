"""Options of ``probe outputs``."""

from pathlib import Path
from typing import Annotated

from lora_diag.running.options import REFERENCE, MissingAlpha, ProbeOptions, Shifted


class OutputsOptions(Shifted, ProbeOptions, MissingAlpha, total=False):
    """Options of ``probe outputs``."""

    reference: Annotated[str | Path | None, REFERENCE]
