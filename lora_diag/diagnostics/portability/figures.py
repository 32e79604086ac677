"""``portability``: treatment of each weight by each program, by module type (rows) and block (columns)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize, to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from lora_diag.diagnostics.portability.record import AS_INTENDED, ORDER, Portability
from lora_diag.diagnostics.portability.show import group_by_consumer, title_of
from lora_diag.records.names import depth_of
from lora_diag.rendering.figures.fields import Types
from lora_diag.rendering.figures.pages import Key, Page, Panel, draw_panel
from lora_diag.rendering.figures.series import Options, Series, owner_of, subject_of
from lora_diag.rendering.figures.style import CATEGORIES, QUIET, UNKNOWN, PageStyle, crop_names, width_of, wrap_text

# Colours by status; a wrong weight has the colour of its ε, or this one if its ε is not known.
COLORS = {
    "exact": UNKNOWN,
    "full": UNKNOWN,
    "dropped": CATEGORIES[0],
    "refused": QUIET,
    "wrong": "#F4D9C6",
    "unknown": "#D9E2EC",
}
EPSILON: Colormap = ListedColormap(mpl.colormaps["Oranges"].resampled(256)(range(80, 256)), "epsilon")

# Maximum fraction of the page's width for row names; gap between two programs as a fraction of a program's columns.
_NAMES, _GAP = 0.3, 0.06


@dataclass(frozen=True, slots=True)
class Cells:
    """The worst record of each module type and block, for each program.

    Args:
        types: Module types of the rows, from the top.
        depths: Block indices of a program's columns; None for layers outside the blocks.
        programs: Names of the programs, in the order of the records.
        records: Records by type, program and depth.
    """

    types: tuple[str, ...]
    depths: tuple[int | None, ...]
    programs: tuple[str, ...]
    records: Mapping[tuple[str, str, int | None], Portability]


def _make_cells(series: Sequence[Series[Any]]) -> Cells:
    """Return the cells of some runs; of several matrices of a type in a block (experts), the worst is kept."""
    types = Types(record.layer for item in series for record in item.records)
    by_cell: dict[tuple[str, str, int | None], Portability] = {}
    programs: list[str] = []
    for item in series:
        groups = group_by_consumer(item.records)
        for name, records in groups.items():
            program = f"{owner_of(item, series)}{title_of(name, [*groups])}"
            programs.append(program)
            for record in records:
                cell = types.of(record.layer), program, depth_of(record.layer)
                by_cell[cell] = max(by_cell.get(cell, record), record, key=_get_severity)
    depths = sorted({depth for _, _, depth in by_cell}, key=lambda depth: -1 if depth is None else depth)
    return Cells(types.names, tuple(depths), tuple(programs), by_cell)


def _get_severity(record: Portability) -> tuple[int, float]:
    """Return a key by which a worse record is larger."""
    return -ORDER.index(record.status), record.epsilon or 0.0


def _make_norm(grid: Cells) -> Normalize | None:
    """Return the colour scale of ε; None if no wrong weight has a known ε."""
    wrong = [r.epsilon for r in grid.records.values() if r.status == "wrong" and r.epsilon]
    if not wrong:
        return None
    low, high = min(wrong), max(wrong)
    return LogNorm(low, high) if high / low > 10 else Normalize(0.0, high)


def _color_cells(grid: Cells, program: str, norm: Normalize | None) -> NDArray[np.float64]:
    """Return the colour of each cell of a program, ``(types, depths, 3)``; white if the layer does not exist."""
    image = np.ones((len(grid.types), len(grid.depths), 3))
    for row, name in enumerate(grid.types):
        for column, depth in enumerate(grid.depths):
            record = grid.records.get((name, program, depth))
            if record is None:
                continue
            color: Any = COLORS[record.status]
            if record.status == "wrong" and record.epsilon and norm is not None:
                color = EPSILON(float(norm(record.epsilon)))[:3]
            image[row, column] = to_rgb(color)
    return image


def portability(records: Iterable[Portability], ax: Axes | None = None) -> Axes:
    """Draw the treatment of each weight by each program.

    Args:
        records: Records of ``portability``.
        ax: Axes to draw on; default those of a new figure.

    Returns:
        The Axes drawn on; ``ax.images`` are the programs.
    """
    return draw_panel(make_page, records, "portability", ax)


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return one block of columns for each program, of one or several runs."""
    grid = _make_cells(series)
    norm = _make_norm(grid)
    line = style.text / 72
    names = crop_names(grid.types, _NAMES * style.width, style.ticks)
    width = style.width * 0.86 - max(width_of(name, style.ticks) for name in names.values()) - 2 * line
    label_height = 1.2 * line
    if not _names_fit(grid, width, style.ticks):
        label_height = max(width_of(name, style.ticks) for name in grid.programs) + 0.4 * line
    height = (1.75 * max(len(grid.types), 2) + 2.4) * line + label_height
    statuses = {record.status for record in grid.records.values()}
    unknown = any(r.status == "wrong" and not r.epsilon for r in grid.records.values())
    colors = (
        (bool(statuses & set(AS_INTENDED)), COLORS["exact"], "as intended"),
        ("wrong" in statuses, EPSILON(0.5), "different ΔW"),
        (unknown, COLORS["wrong"], "different ΔW, ε not known without BASE"),
        ("dropped" in statuses, COLORS["dropped"], "dropped (ε = 1)"),
        ("refused" in statuses, COLORS["refused"], "refused: no ΔW at all"),
        ("unknown" in statuses, COLORS["unknown"], "not known without BASE"),
    )
    layers = len({record.layer for item in series for record in item.records})
    pooled = len({(name, depth) for name, _, depth in grid.records}) < layers
    return Page(
        "Weights of the adapter as each program applies them",
        [Panel("", partial(_draw_cells, grid=grid, norm=norm, names=[*names.values()]), height=height, width=width)],
        f"{subject_of(series)}{layers} weights; ε = ‖ΔW' − ΔW‖_F / ‖ΔW‖_F of the applied ΔW'",
        ["A cell shows the worst of a block's matrices of its type."] if pooled else (),
        [Key(Patch(color=color), label) for present, color, label in colors if present],
        low=True,
        scale=None if norm is None else ScalarMappable(norm, EPSILON),
        scale_label="ε of a wrong weight",
    )


def _names_fit(grid: Cells, inches: float, size: float) -> bool:
    """Return whether the programs' names fit side by side in a width in inches, at a size in points."""
    return max(width_of(name, size) for name in grid.programs) < 0.92 * inches / len(grid.programs)


def _draw_cells(ax: Axes, style: PageStyle, grid: Cells, norm: Normalize | None, names: Sequence[str]) -> None:
    """Draw an image for each program, with module types as rows and blocks as columns."""
    size = style.ticks
    step = len(grid.depths) * (1 + _GAP)
    for number, program in enumerate(grid.programs):
        left = number * step - 0.5
        extent = (left, left + len(grid.depths), len(grid.types) - 0.5, -0.5)
        ax.imshow(_color_cells(grid, program, norm), extent=extent, aspect="auto", interpolation="nearest")
    ax.set_xlim(-0.5, len(grid.programs) * step - 0.5 - len(grid.depths) * _GAP)
    ax.set_ylim(len(grid.types) - 0.5, -0.5)
    ax.set_yticks(range(len(grid.types)), names, parse_math=False, size=size)
    middles = [number * step - 0.5 + len(grid.depths) / 2 for number in range(len(grid.programs))]
    ax.set_xticks(middles, list(grid.programs), parse_math=False, size=size)
    ax.tick_params(axis="x", rotation=0 if _names_fit(grid, style.width, size) else 90)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.tick_params(length=0)
    ax.grid(False)
    for row in range(1, len(grid.types)):
        ax.axhline(row - 0.5, color="white", lw=0.8)
    for spine in ax.spines.values():
        spine.set_visible(False)
    depths = [depth for depth in grid.depths if depth is not None]
    if len(depths) > 1:
        outside = ", outside the blocks first" if None in grid.depths else ""
        text = f"program; in each, blocks {depths[0]} to {depths[-1]} from left to right{outside}"
        ax.set_xlabel(wrap_text(text, style.width, style.text))
