"""The figure: the share of the nuclear norm that each block has."""

from collections import Counter

from lora_diag.records.names import depth_of
from lora_diag.rendering.figures.pages import Page, Row, make_rows_panel
from lora_diag.rendering.figures.style import category


def make_page(series, style, options):
    """Return one panel a run, one row a block."""
    panels = []
    for number, one in enumerate(series):
        blocks = Counter()
        for record in one.records:
            blocks[depth_of(record.layer)] += record.nuclear
        total = sum(blocks.values()) or 1.0
        rows = [
            Row(f"block {block}", part / total, None, category(number))
            for block, part in blocks.items()
        ]
        panels.append(make_rows_panel(one.label, rows, style, xlabel="share of the nuclear norm"))
    return Page(
        "Where the nuclear norm of the update is",
        panels,
        "share of Σσ over all layers",
        columns=1,
        low=True,
    )
