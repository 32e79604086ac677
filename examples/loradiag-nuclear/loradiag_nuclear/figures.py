"""The figure: the share of the nuclear norm that each block has."""

from collections import Counter

from lora_diag.records.names import depth_of
from lora_diag.rendering.figures.pages import Row, figure_of
from lora_diag.rendering.figures.sheet import FigureText
from lora_diag.rendering.figures.style import category


def figure(series, style, options):
    """Return one panel a run, one row a block."""
    panels = []
    for number, one in enumerate(series):
        blocks = Counter()
        for record in one.records:
            blocks[depth_of(record.layer)] += record.nuclear
        total = sum(blocks.values()) or 1.0
        rows = [Row(f"block {block}", part / total, None, category(number)) for block, part in blocks.items()]
        panels.append((one.label, rows))
    words = FigureText("Where the nuclear norm of the update is", "share of Σσ over all layers")
    return figure_of(panels, "share of the nuclear norm", words, style)
