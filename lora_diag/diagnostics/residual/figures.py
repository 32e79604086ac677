"""Figure of ``residual``: distance of adapters from a full fine-tune by layer, and its parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lora_diag.diagnostics.residual.record import Residual, describe_parts, sum_parts
from lora_diag.metrics.subspaces import pool_distances
from lora_diag.rendering.figures.pages import Page, Panel
from lora_diag.rendering.figures.panels import Slot, make_slots, stack_panels
from lora_diag.rendering.figures.series import Options, Series, UndrawableError, split_series
from lora_diag.rendering.figures.style import CATEGORIES, DASHED, FLOOR, INK, PageStyle
from lora_diag.rendering.text import number, span

# Colors of the parts of ε², from the bottom of a bar.
COLORS = {
    "rank": CATEGORIES[0],
    "direction": CATEGORIES[5],
    "scale": CATEGORIES[1],
    "not adapted": FLOOR,
}


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the page with one panel per adapter or reference, each with its own scale of ε².

    With a common scale, a distant adapter would flatten the others.

    Raises:
        UndrawableError: There are no records of matrices.
    """
    adapters = split_series(series, options)
    matrices = [_select_matrices(item.records) for item in adapters]
    records = [record for item in adapters for record in item.records]
    if not any(matrices):
        raise UndrawableError("no records of matrices")
    runs = make_slots(matrices, options.per)
    panels = []
    for item, slots in zip(adapters, runs, strict=True):
        draw = partial(_draw, slots=slots)
        height = 1.25 * style.panel
        panels.append(Panel(_describe_run(item), draw, "", "ε²", height, name=item.label))
    notes = [
        "ε² = rank + direction + scale. rank: ε_min². scale: what another α would gain over the "
        "better of the adapter and BASE. direction: the remainder. ε is the distance to this "
        "fine-tune, not a measure of quality."
    ]
    joined = max((slot.joined for slots in runs for slot in slots), default=1)
    if joined > 1:
        notes.append(f"A bar pools up to {joined} layers by Σ‖ΔW − X‖² / Σ‖ΔW‖².")
    if vectors := {record.layer for record in records if len(record.shape) == 1}:
        notes.append(f"Not drawn: {len(vectors)} one-dimensional tensors.")
    return Page(
        "Residual ε² of the adapter by layer, and its parts",
        stack_panels(panels, runs, style),
        "ε\xa0=\xa0‖ΔW\xa0−\xa0X‖_F\xa0/\xa0‖ΔW‖_F, X the adapter's update; "
        "ε_min\xa0=\xa0√(1\xa0−\xa0C(r)); blocks run from left to right in each module type",
        notes,
        columns=1,
        low=True,
    )


def _select_matrices(records: Iterable[Residual]) -> tuple[Residual, ...]:
    """Return the records of matrices, without those of 1-D tensors."""
    return tuple(record for record in records if len(record.shape) > 1)


def _draw(ax: Axes, style: PageStyle, slots: Sequence[Slot[Residual]]) -> None:
    """Draw the parts of ε² of one adapter as stacked bars, and the level of no adapter."""
    for slot in slots:
        sums = [sum_parts(bar) for bar in slot.bars]
        base = np.zeros(len(sums))
        for name, color in COLORS.items():
            part = np.array([bar.get(name, np.nan) for bar in sums])
            if (part > 0).any():
                ax.stairs(
                    base + part, slot.edges, baseline=base, fill=True, color=color, lw=0, label=name
                )
            base = base + part
    ax.axhline(1, color=INK, lw=0.7 * style.line, ls=DASHED, zorder=3, label="ε² = 1: no adapter")
    ax.set_ylim(0, 1.06 * max(1.0, ax.get_ylim()[1] / 1.05))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))


def _describe_run(item: Series[Any]) -> str:
    """Return the label of an adapter with its rank, the parts of ε², the cosine and the norm ratio,
    where defined.
    """
    records = _select_matrices(item.records)
    ranks = [record.rank for record in records if record.rank]
    label = f"{item.label} (r={span(ranks, ' to ')})" if ranks else item.label
    total = pool_distances(item.records)
    if total.epsilon is None:
        return f"{label}: ΔW = 0"
    description = f"{label}: {describe_parts(item.records)}"
    if total.cosine is None:
        return description
    return f"{description}; cosine {total.cosine:.2f}, norm ratio {number(total.norm_ratio or 0.0)}"
