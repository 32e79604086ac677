"""Figures of ``geometry``: masks with both baselines, angle spectra with theirs, and heads by
depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lora_diag.diagnostics.geometry.record import Geometry
from lora_diag.records.base import value_at
from lora_diag.records.names import depth_of
from lora_diag.rendering.figures.fields import Types, count_matrices
from lora_diag.rendering.figures.pages import MAX_PANELS, Page, Panel, key
from lora_diag.rendering.figures.panels import (
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
    owner_of,
    subject_of,
)
from lora_diag.rendering.figures.style import (
    CATEGORIES,
    DASHED,
    INK,
    QUIET,
    SHARES,
    PageStyle,
    log_label,
)

# The sides of a record, with label and line; the measured one first.
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "moved": ("measured", {"color": CATEGORIES[0]}),
    "rounding": ("rounding null", {"color": INK}),
    "chance": ("chance", {"color": QUIET, "ls": DASHED}),
}
MASKS = (
    ("low_30", "Changed entries among the 30% smallest weights", 0.3),
    ("principal_30", "Changed entries among the 30% largest of the rank-k reconstruction", 0.3),
)
KINDS = ("query", "key", "value", "output")


def _select_moved(series: Sequence[Series[Any]]) -> list[tuple[str, tuple[Geometry, ...]]]:
    """Return the name of each run, as the beginning of a title, and its records of layers that
    changed.

    Raises:
        UndrawableError: No layer changed.
    """
    found = [
        (owner_of(item, series), tuple(record for record in item.records if record.moved))
        for item in series
    ]
    if not any(records for _, records in found):
        raise UndrawableError("no layer changed")
    return [(owner, records) for owner, records in found if records]


def _side_keys(style: PageStyle, records: Sequence[Geometry]) -> list[Any]:
    """Return the legend of the measured values and of the baselines that some record has."""
    shown = [side for side in SIDES if any(getattr(record, side) for record in records)]
    return [key(SIDES[side][0], lw=style.line, **SIDES[side][1]) for side in shown]


def make_masks_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the page of the fractions of changed entries in the masks, a bar per layer, with both
    baselines.
    """
    moved = _select_moved(series)
    records = [record for _, run in moved for record in run]
    runs = make_slots([run for _, run in moved], options.per)
    panels = []
    for (owner, _), slots in zip(moved, runs, strict=True):
        for name, title, alpha in MASKS:
            draw = partial(_draw_mask, slots=slots, name=name, alpha=alpha)
            height = 1.5 * style.panel
            panels.append(
                Panel(f"{owner}{title}", draw, ylabel="fraction", height=height, name=name)
            )
    return Page(
        "Location of changed entries, by layer",
        stack_panels(panels, runs, style),
        f"{subject_of(series)}{count_matrices(records)}; blocks run from left to right in each "
        "module type",
        [
            "Dotted: the fraction of the mask in all entries. chance: Gaussian updates of the same "
            "norm, not rounded. rounding null: the entries of ΔW at random places, stored as "
            "TUNED; the bars show something of the update only where they differ from it."
        ],
        _side_keys(style, records),
        columns=1,
        low=True,
    )


def _draw_mask(ax: Axes, style: PageStyle, slots: Any, name: str, alpha: float) -> None:
    """Draw a bar per layer, and the baselines as lines."""
    for side, (_, line) in SIDES.items():
        value_of: Callable[[Geometry], float | None] = partial(_value_of, path=f"{side}.{name}")
        look = {"fill": True, "baseline": 0.0, "lw": 0} if side == "moved" else {"lw": style.line}
        draw_bars(ax, slots, median_of(value_of), **line, **look)
    ax.axhline(alpha, color=INK, lw=0.7 * style.line, ls=(0, (1, 2)))
    ax.set_ylim(0, 1)
    set_fraction_ticks(ax.yaxis)


def _value_of(record: Geometry, path: str) -> float | None:
    """Return a number of a record, NaN where a side is missing, so that its bar has no line."""
    value = value_at(record, path)
    return float("nan") if value is None else float(value)


def make_angles_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the page of principal angles, a panel per module type: median spectrum over its
    layers, and baselines.
    """
    moved = _select_moved(series)
    records = [record for _, run in moved for record in run]
    types = Types(record.layer for record in records)
    panels = []
    for place, ((owner, run), name) in enumerate(product(moved, types.names)):
        group = [record for record in run if types.of(record.layer) == name]
        if group and place < MAX_PANELS:
            draw = partial(_draw_angles, records=group)
            panels.append(Panel(f"{owner}{name}", draw, "principal angle", "degrees", name=name))
    notes = [
        "A curve is the median over the layers of the type, the smallest angle first. chance: "
        "Gaussian updates of the same norm; rounding null: the entries of ΔW at random places, "
        "stored as TUNED."
    ]
    more = len(moved) * len(types.names) - MAX_PANELS
    if more > 0:
        notes.append(f"Not drawn: {more} more panels (--layers).")
    return Page(
        "Rotation of the leading singular spaces of W",
        panels,
        f"{subject_of(series)}{count_matrices(records)}; left spaces in full colour, right spaces "
        "pale",
        notes,
        _side_keys(style, records),
        share=True,
    )


def _draw_angles(ax: Axes, style: PageStyle, records: Sequence[Geometry]) -> None:
    """Draw the median angle spectra of some layers, left and right, on a logarithmic scale."""
    k = min(record.k for record in records)
    for side, (_, line) in SIDES.items():
        movements = [movement for record in records if (movement := getattr(record, side))]
        for name, alpha in (("left_angles", 1.0), ("right_angles", 0.45)):
            rows = [getattr(movement, name)[-k:] for movement in movements]
            if rows:
                spectrum = np.median(np.array(rows), axis=0)
                marker: dict[str, Any] = {"marker": "o"} if k == 1 else {}
                look = {
                    "lw": style.line,
                    "alpha": alpha,
                    "zorder": 3 if side == "moved" else 2,
                    **line,
                    **marker,
                }
                ax.plot(range(1, k + 1), np.maximum(spectrum, 1e-6), **look)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(log_label)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))


def make_heads_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the page of heat maps of ‖ΔW‖/‖W‖ of every head, one panel per projection, heads by
    depth.

    Raises:
        UndrawableError: No layer changed, or no projection was split into heads.
    """
    cells = [
        (f"{owner}{kind}", kind, grid, depths)
        for owner, run in _select_moved(series)
        for kind, grid, depths in _collect_heads(run)
    ]
    if not cells:
        raise UndrawableError(
            "no projection of attention was split into heads: BASE has no config that fits"
        )
    values = np.concatenate([grid.ravel() for _, _, grid, _ in cells])
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        raise UndrawableError("no head changed")
    norm = LogNorm(positive.min(), max(positive.max(), 1.01 * positive.min()))
    panels = [
        Panel(
            title,
            partial(_draw_heads, grid=grid, depths=depths, norm=norm),
            "depth (block)",
            "head",
            name=kind,
        )
        for title, kind, grid, depths in cells
    ]
    return Page(
        "Relative change of attention heads, ‖ΔW‖ / ‖W‖",
        panels,
        f"{subject_of(series)}rows of queries, keys and values, columns of outputs",
        [
            "Keys and values of grouped queries have one head per group. White: no such head, or "
            "unchanged."
        ],
        [],
        columns=2 if style.columns > 2 and len(panels) > 1 else 1,
        low=True,
        scale=ScalarMappable(norm, SHARES),
        scale_label="‖ΔW‖ / ‖W‖",
    )


def _collect_heads(
    records: Sequence[Geometry],
) -> Iterator[tuple[str, NDArray[np.float64], list[int]]]:
    """Yield each kind of projection with the relative changes of its heads, ``(heads, depths)``,
    and the depths.
    """
    for kind in KINDS:
        heads = [
            (depth_of(r.layer) or 0, head) for r in records for head in r.heads if head.kind == kind
        ]
        if heads:
            depths = sorted({depth for depth, _ in heads})
            grid = np.full((1 + max(head.index for _, head in heads), len(depths)), np.nan)
            for depth, head in heads:
                grid[head.index, depths.index(depth)] = head.relative or np.nan
            yield kind, grid, depths


def _draw_heads(
    ax: Axes, style: PageStyle, grid: NDArray[np.float64], depths: Sequence[int], norm: LogNorm
) -> None:
    """Draw a heat map of heads by depth."""
    ax.imshow(grid, cmap=SHARES, norm=norm, aspect="auto", interpolation="nearest")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(
        lambda x, _: str(depths[int(x)]) if 0 <= x < len(depths) and x == int(x) else ""
    )
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    ax.spines[:].set_visible(False)
