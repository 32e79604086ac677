"""Terminal table of the treatment of each feature by each consumer."""

from __future__ import annotations

from rich.console import Group

from lora_diag.diagnostics.portability.features import rules_grids
from lora_diag.rendering.text import to_text


def rules_table(width: int = 80, color: bool = False) -> str:
    """Return the tables of consumers and features, one for each layout of files."""
    return to_text(Group(*(part for grid in rules_grids() for part in grid.shown(width))), width, color)
