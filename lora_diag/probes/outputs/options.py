"""Options of ``probe outputs``."""

from pathlib import Path
from typing import Annotated

from lora_diag.running.options import REFERENCE, ProbeOptions, Shifted


class OutputsOptions(Shifted, ProbeOptions, total=False):
    """Options of ``probe outputs``."""

    reference: Annotated[str | Path | None, REFERENCE]
