"""Figure of ``checkpoints``: norms by module type over the steps, increments by layer, and overlaps
of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lora_diag.diagnostics.checkpoints.record import CheckpointLayer, group_by
from lora_diag.rendering.figures.fields import Types, count_matrices
from lora_diag.rendering.figures.pages import Page, Panel, key
from lora_diag.rendering.figures.panels import label_ticks
from lora_diag.rendering.figures.series import (
    Options,
    Series,
    UndrawableError,
    owner_of,
    subject_of,
)
from lora_diag.rendering.figures.style import CATEGORIES, SHARES, PageStyle, category
from lora_diag.rendering.text import middle


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the page: of each run, two curves by module type, and two maps over the steps.

    Raises:
        UndrawableError: No run has two checkpoints.
    """
    records = [record for item in series for record in item.records]
    types = Types(record.layer for record in records)
    names = types.pool(types.names[: len(CATEGORIES) - 1])
    panels = []
    for item in series:
        steps = sorted({record.step for record in item.records})
        if len(steps) < 2:
            continue
        groups: dict[str, list[CheckpointLayer]] = {name: [] for name in names.values()}
        for record in item.records:
            groups[names[types.of(record.layer)]].append(record)
        curves = partial(_draw_curves, groups=groups, steps=steps)
        increments = partial(_draw_map, cells=_map_increments(item.records), steps=steps)
        overlaps = partial(_draw_map, cells=_map_overlaps(item.records), steps=steps)
        norm = partial(curves, field="fro")
        share = partial(curves, field="spectral_share")
        of = owner_of(item, series)
        panels += [
            Panel(f"{of}norm of the update", norm, "step", "median ‖ΔW‖_F", name="norm"),
            Panel(f"{of}energy in σ₁", share, "step", "σ₁²/‖ΔW‖_F²", name="share"),
            Panel(f"{of}increment / its largest", increments, "step", "layer", name="increments"),
            Panel(f"{of}overlap of directions", overlaps, "step", "step", name="overlaps"),
        ]
    if not panels:
        raise UndrawableError("fewer than two checkpoints")
    keys = [
        key(name, color=category(i), lw=1.5 * style.line)
        for i, name in enumerate(dict.fromkeys(names.values()))
    ]
    return Page(
        "A training run over its checkpoints: norms, energy in one direction, increments, overlap",
        panels,
        f"{subject_of(series)}{count_matrices(records)}; curves are medians of the layers of a "
        "type",
        [
            "Increment: ‖ΔW_t\xa0−\xa0ΔW_{t−1}‖_F of each layer, from the first at the top, over "
            "its largest. Overlap: "
            "median over the layers of ‖U_sᵀU_t‖_F²/k of the largest left singular vectors."
        ],
        keys,
        columns=2 if style.columns > 2 else 1,
        scale=ScalarMappable(Normalize(0, 1), SHARES),
        scale_label="fraction",
    )


def _draw_curves(
    ax: Axes,
    style: PageStyle,
    groups: Mapping[str, Sequence[CheckpointLayer]],
    field: str,
    steps: Sequence[int],
) -> None:
    """Draw the median of a field over the layers of each module type."""
    for number, (name, group) in enumerate(groups.items()):
        values = [
            middle([getattr(record, field) for record in group if record.step == step])
            for step in steps
        ]
        known = [math.nan if value is None else value for value in values]
        ax.plot(
            steps, known, color=category(number), label=f"_{name}", lw=1.5 * style.line, marker="."
        )
    ax.set_ylim(0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    label_ticks(ax, (steps[0], steps[-1], *steps), style)


def _map_increments(records: Sequence[CheckpointLayer]) -> NDArray[np.float64]:
    """Return each layer's increments over its largest, ``(layers, T)``; NaN where they are not
    known or all zero.
    """
    steps = group_by(records, "step")
    rows = []
    for group in group_by(records, "layer").values():
        # Of a killed run, without some of the last step.
        by_step = {record.step: record.increment for record in group}
        rows.append([by_step.get(step) for step in steps])
    cells = np.array(rows, np.float64)
    largest = np.nan_to_num(cells).max(axis=1, keepdims=True)
    return np.asarray(cells / np.where(largest > 0, largest, np.nan))


def _map_overlaps(records: Sequence[CheckpointLayer]) -> NDArray[np.float64]:
    """Return the median overlaps of all pairs of checkpoints, ``(T, T)``; NaN where they are not
    known.
    """
    groups = group_by(records, "step").values()
    cells = np.full((len(groups), len(groups)), np.nan)
    for t, group in enumerate(groups):
        # Overlaps are empty where the update is not finite.
        known = [record.overlaps for record in group if len(record.overlaps) == t]
        for s, values in enumerate(zip(*known, strict=True)):
            overlap = middle(values)
            cells[s, t] = cells[t, s] = math.nan if overlap is None else overlap
    return cells


def _draw_map(ax: Axes, style: PageStyle, cells: NDArray[np.float64], steps: Sequence[int]) -> None:
    """Draw fractions over the steps; rows, from the top, are layers, or the steps again."""
    rows, columns = cells.shape
    ax.pcolormesh(np.ma.masked_invalid(cells), norm=Normalize(0, 1), cmap=SHARES)
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    every = -(-columns // 8)
    ax.set_xticks(np.arange(0, columns, every) + 0.5, [str(step) for step in steps[::every]])
    if rows == columns:
        ax.set_yticks(np.arange(0, rows, every) + 0.5, [str(step) for step in steps[::every]])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
