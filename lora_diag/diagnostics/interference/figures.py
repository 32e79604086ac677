"""`union`: rank of the sum of several updates against the sum of their ranks, layer by layer.

`angles`: principal angles between the spaces of two updates, with the distribution of random
spaces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lora_diag.diagnostics.interference.record import Interference, Union
from lora_diag.metrics.subspaces import random_angles
from lora_diag.records import Agreement
from lora_diag.rendering.figures.fields import count_matrices
from lora_diag.rendering.figures.pages import Page, Panel, key
from lora_diag.rendering.figures.panels import (
    Slot,
    draw_bars,
    make_slots,
    median_of,
    set_fraction_ticks,
    stack_panels,
)
from lora_diag.rendering.figures.series import (
    Options,
    Series,
    UndrawableError,
    choose_rank,
    split_series,
)
from lora_diag.rendering.figures.style import CATEGORIES, DOTTED, INK, PageStyle, category
from lora_diag.rendering.text import quantity

SUM, SEPARATE, EVERY = CATEGORIES[:3]

# Fraction of the energy at which ranks are shown.
ENERGY = "0.9"


def make_union_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the page of the rank of the sum and the sum of the ranks by layer, one panel per run.

    Raises:
        UndrawableError: No layer is changed by two updates.
    """
    labels, shared = [], []
    for item in series:
        if records := [record for record in item.records if len(record.updates) > 1]:
            labels.append(item.label)
            shared.append(records)
    if not shared:
        raise UndrawableError("no layer is changed by two updates")
    runs = make_slots(shared, options.per)
    panels = [
        Panel(label, partial(_draw_ranks, slots=slots), "", "rank at 90%", 1.25 * style.panel)
        for label, slots in zip(labels, runs, strict=True)
    ]
    drawn = [record for records in shared for record in records]
    notes = [
        "Blocks run from left to right in each module type. Weights alone do not show interference "
        "between tasks."
    ]
    joined = max(slot.joined for slots in runs for slot in slots)
    if joined > 1:
        notes.append(f"A bar is the median of up to {joined} layers.")
    if omitted := sum(len(item.records) for item in series) - len(drawn):
        layers = quantity(omitted, "layer")
        notes.append(f"Not drawn: {layers} changed by fewer than two updates.")
    if any(record.rank_for_all.get(ENERGY) is None for record in drawn):
        notes.append("No green line: no rank of the sum keeps 90% of every update.")
    return Page(
        "Rank of the sum of updates, compared with the sum of their ranks",
        stack_panels(panels, runs, style),
        f"{count_matrices(drawn)}; ranks at 90% of the energy Σσ²",
        notes,
        columns=1,
        low=True,
    )


def _draw_ranks(ax: Axes, style: PageStyle, slots: Sequence[Slot[Union]]) -> None:
    """Draw the rank of the sum, the rank that keeps every update, and the sum of the ranks: the
    median of each bar.
    """
    look: dict[str, Any] = {
        "label": "rank of the sum",
        "color": SUM,
        "fill": True,
        "baseline": 0,
        "lw": 0,
    }
    draw_bars(ax, slots, median_of(lambda record: record.spectrum.rank_at[ENERGY]), **look)
    look = {"label": "rank that keeps 90% of every update", "color": EVERY, "lw": 1.3 * style.line}
    draw_bars(ax, slots, median_of(lambda record: record.rank_for_all.get(ENERGY)), **look)
    look = {"label": "sum of the updates' ranks", "color": SEPARATE, "lw": 1.3 * style.line}
    draw_bars(ax, slots, median_of(lambda record: record.parts_rank_at[ENERGY]), **look)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


Side = Literal["columns", "rows"]
SIDES: tuple[tuple[Side, str], ...] = (("columns", "column spaces"), ("rows", "row spaces"))


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the page of the angles of column and of row spaces, one panel each, of the pairs that
    overlap most.
    """
    pairs = split_series(series, options)
    ranks = {int(rank) for item in pairs for record in item.records for rank in record.columns}
    rank = choose_rank(ranks, options)
    measured = [item for item in pairs if _select_compared(item.records, rank)]
    measured.sort(key=lambda item: -_compute_mean_overlap(item.records, rank))
    shown = measured[: len(CATEGORIES)]
    height = 1.4 * style.panel
    panels = []
    for side, title in SIDES:
        draw = partial(_draw_angles, series=shown, side=side, rank=rank)
        panels.append(Panel(title, draw, "cosine", "fraction", height, name=side))
    records = [record for item in shown for record in item.records]
    compared = _select_compared(records, rank)
    notes = [
        "The further a curve is to the right of its dotted line, the more two updates have in "
        "common."
    ]
    if len(shown) < len(pairs):
        notes.append(f"Not drawn: {len(pairs) - len(shown)} pairs with less in common.")
    without = {record.layer for record in records} - {record.layer for record in compared}
    if without:
        notes.append(f"Not drawn: {quantity(len(without), 'layer')} without {rank} directions.")
    if others := ", ".join(map(str, sorted(ranks - {rank}))):
        notes.append(f"Also measured: r = {others} (--show-rank).")
    keys = [
        key(item.label, color=category(number), lw=2 * style.line)
        for number, item in enumerate(shown)
    ]
    keys.append(key("random subspaces", color=INK, lw=style.line, ls=DOTTED))
    return Page(
        f"Principal angles between the {rank} largest directions of two updates",
        panels,
        f"{count_matrices(compared)}; fraction of the principal angles with at most this cosine "
        "(1: common direction, 0: orthogonal)",
        notes,
        keys,
        columns=2,
        share=True,
    )


def _select_compared(records: Sequence[Interference], rank: int) -> list[Interference]:
    """Return the records in which spaces of a rank were compared."""
    return [record for record in records if str(rank) in record.columns]


def _compute_mean_overlap(records: Sequence[Interference], rank: int) -> float:
    """Return the mean overlap of the column spaces at a rank, over the layers where it was
    measured.
    """
    overlaps = [record.columns[str(rank)].overlap for record in _select_compared(records, rank)]
    return float(np.mean(overlaps))


def _draw_angles(
    ax: Axes, style: PageStyle, series: Sequence[Series[Interference]], side: Side, rank: int
) -> None:
    """Draw the distribution of the cosines of each pair, and that of random spaces."""
    grid = np.linspace(0.0, 1.0, 201)
    for number, item in enumerate(series):
        spaces = [
            (getattr(record, side)[str(rank)], record.shape[side == "rows"])
            for record in _select_compared(item.records, rank)
        ]
        cosines = [cosine for space, _ in spaces for cosine in space.cosines]
        color = category(number)
        ax.ecdf(cosines, label=f"_{item.label}", color=color, lw=1.5 * style.line)
        random = compute_random_distribution(grid, spaces)
        label = f"_random {item.label}"
        ax.plot(grid, random, label=label, color=color, lw=style.line, ls=DOTTED)
    ax.set(xlim=(0, 1.02), ylim=(0, 1.03))
    set_fraction_ticks(ax.xaxis, ax.yaxis)


def compute_random_distribution(
    grid: NDArray[np.float64], spaces: Sequence[tuple[Agreement, int]]
) -> NDArray[np.float64]:
    """Return the cumulative distribution of the cosines of random spaces of the measured
    dimensions.

    Args:
        grid: Cosines in [0, 1] at which it is returned.
        spaces: The measured agreements, each with the dimension of the whole space.
    """
    counts = Counter(
        (len(space.cosines), round(space.random * dimension), dimension)
        for space, dimension in spaces
        if space.cosines
    )
    total = sum(count * first for (first, _, _), count in counts.items())
    distribution = np.zeros_like(grid)
    for (first, second, dimension), count in counts.items():
        distribution += count * first / total * random_angles(grid, first, second, dimension)
    return distribution
