"""`residual`: distance of adapters from a full fine-tune by layer, and its parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lora_diag.diagnostics.residual.record import Residual, describe_parts, sum_parts
from lora_diag.errors import UsageError
from lora_diag.metrics import pooled
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.fields import Types
from lora_diag.rendering.figures.panels import Slot, label_height, make_slots, slot_axis
from lora_diag.rendering.figures.series import Options, Series, by_adapter
from lora_diag.rendering.figures.sheet import FigureText, Key, sheet
from lora_diag.rendering.figures.style import CATEGORIES, FLOOR, INK, PageStyle, wrap_text
from lora_diag.rendering.text import number

# Colors of the parts of ε², from the bottom of a bar.
COLORS = dict(
    zip(
        ("rank", "direction", "scale", "not adapted"),
        (CATEGORIES[0], CATEGORIES[5], CATEGORIES[1], FLOOR),
        strict=True,
    )
)


def residual(records: Iterable[Residual], ax: Axes | None = None, *, per: str = "layer") -> Axes:
    """Draw ε² = ‖ΔW − X‖_F² / ‖ΔW‖_F² of one adapter's update X, layer by layer, as a stack of its parts.

    ε² = rank + direction + scale (``metrics.parts``). Layers of one bar are added up.

    Args:
        records: Records of ``residual``, for one adapter.
        ax: Axes to draw on; default those of a new figure.
        per: ``layer`` for one bar per layer (experts of a block are pooled), ``type`` for one bar per module type.

    Returns:
        The Axes drawn on.

    Raises:
        UsageError: The records are of several adapters.
    """
    records = _select_matrices(records)
    adapters = list(dict.fromkeys(record.adapter for record in records))
    if len(adapters) > 1:
        raise UsageError(
            f"records of {len(adapters)} adapters, but a panel shows one; pass the records of one .adapter"
        )
    with panel_axes(ax) as (axes, style):
        drawn = make_slots(records, per)
        _draw(axes, drawn, style)
        slot_axis(axes, drawn, float(axes.get_window_extent().width) / axes.figure.dpi, style.ticks if style else 9)
        axes.set_ylabel("ε² = ‖ΔW − X‖_F² / ‖ΔW‖_F²")
        axes.legend(
            [key.handle for key in _make_keys(style)], [key.label for key in _make_keys(style)], fontsize="small"
        )
    return axes


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Return the page: one panel per adapter, each with its own scale of ε².

    With a common scale, a distant adapter would flatten the others.
    """
    adapters = by_adapter(series)
    matrices = [_select_matrices(item.records) for item in adapters]
    types = Types(record.layer for records in matrices for record in records)
    drawn = [make_slots(records, options.per, types) for records in matrices]
    inches = style.width - 5 * style.text / 72
    all_slots = list({slot.name: slot for slots in drawn for slot in slots}.values())
    names_height = label_height(all_slots, inches, style.ticks) / len(adapters)
    panel = 1.25 * style.panel + names_height
    page, axes = sheet(style, _make_text(adapters, drawn, style), len(adapters), 1, panel=panel, share=False, low=True)
    for item, slots, ax in zip(adapters, drawn, axes, strict=True):
        _draw(ax, slots, style)
        ax.set_title(wrap_text(_describe_run(item), inches, style.text), parse_math=False)
        ax.set_ylabel("ε²")
        ax.set_ylim(0, 1.06 * max(1.0, ax.get_ylim()[1] / 1.05))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
        slot_axis(ax, all_slots, inches, style.ticks, labels=ax is axes[-1])
    return page


def _select_matrices(records: Iterable[Residual]) -> tuple[Residual, ...]:
    return tuple(record for record in records if len(record.shape) > 1)


def _draw(ax: Axes, drawn: Sequence[Slot[Residual]], style: PageStyle | None) -> None:
    for slot in drawn:
        sums = [sum_parts(bar) for bar in slot.bars]
        base = np.zeros(len(sums))
        for name, color in COLORS.items():
            part = np.array([bar.get(name, np.nan) for bar in sums])
            if (part > 0).any():
                ax.stairs(base + part, slot.edges, baseline=base, fill=True, color=color, lw=0, label=f"_{slot.name}")
            base = base + part
    ax.axhline(1, color=INK, lw=0.7 * (style.line if style else 1), ls=(0, (4, 2)), zorder=3)
    ax.set_ylim(bottom=0)


def _describe_run(item: Series[Any]) -> str:
    """Return the label of an adapter with the parts of its ε², its cosine and its norm ratio."""
    records = _select_matrices(item.records)
    ranks = sorted({record.rank for record in records if record.rank})
    rank = f" (r={ranks[0]})" if len(ranks) == 1 else f" (r={ranks[0]} to {ranks[-1]})" if ranks else ""
    total = pooled(item.records)
    if total.epsilon is None:
        return f"{item.label}{rank}: ΔW = 0"
    similarity = (
        "" if total.cosine is None else f"; cosine {total.cosine:.2f}, norm ratio {number(total.norm_ratio or 0.0)}"
    )
    return f"{item.label}{rank}: {describe_parts(item.records)}{similarity}"


def _make_keys(style: PageStyle | None) -> tuple[Key, ...]:
    line = Line2D([], [], color=INK, lw=0.8 * (style.line if style else 1), ls=(0, (4, 2)))
    return (
        *(Key(Patch(facecolor=color), name) for name, color in COLORS.items()),
        Key(line, "ε² = 1: no adapter"),
    )


def _make_text(
    adapters: Sequence[Series[Any]], drawn: Sequence[Sequence[Slot[Residual]]], style: PageStyle
) -> FigureText:
    joined = max((slot.joined for part in drawn for slot in part), default=1)
    vectors = len({r.layer for item in adapters for r in item.records if len(r.shape) == 1})
    zero = len({r.layer for item in adapters for r in item.records if r.fro == 0})
    notes = [
        "ε² = rank + direction + scale. rank: ε_min². scale: what another α would gain over the better of the adapter "
        "and BASE. direction: the remainder. ε is the distance to this fine-tune, not a measure of quality."
    ]
    if joined > 1:
        notes.append(f"A bar pools up to {joined} layers by Σ‖ΔW − X‖² / Σ‖ΔW‖².")
    if vectors:
        notes.append(f"Not drawn: {vectors} one-dimensional tensors.")
    if zero:
        notes.append(f"Not drawn: {zero} with ΔW = 0.")
    return FigureText(
        "Residual ε² of the adapter by layer, and its parts",
        "ε\xa0=\xa0‖ΔW\xa0−\xa0X‖_F\xa0/\xa0‖ΔW‖_F, X the adapter's update; ε_min\xa0=\xa0√(1\xa0−\xa0C(r)); "
        "blocks run from left to right in each module type",
        (" ".join(notes),),
        _make_keys(style),
    )


def find_obstacle(records: Sequence[Residual], options: Options) -> str | None:
    """Return why records cannot be drawn: none is of a matrix."""
    return None if any(len(record.shape) > 1 for record in records) else "no records of matrices"
