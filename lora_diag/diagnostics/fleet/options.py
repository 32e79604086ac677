"""Options of ``fleet``."""

from pathlib import Path
from typing import Annotated

from lora_diag.running.options import BASE, Callbacks, Device, Machines, MissingAlpha, Output, Resuming, Selection


class FleetOptions(Selection, MissingAlpha, Device, Machines, Output, Resuming, Callbacks, total=False):
    """Options of ``fleet``."""

    base: Annotated[str | Path | None, BASE]
