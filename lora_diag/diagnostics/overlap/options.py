"""Options of ``overlap``."""

from collections.abc import Sequence
from typing import Annotated

from lora_diag.running.options import RANKS, MethodOptions


class OverlapOptions(MethodOptions, total=False):
    """Options of ``overlap``."""

    ranks: Annotated[Sequence[int], RANKS]
