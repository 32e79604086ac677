"""``portability``: treatment of each weight by each program, by module type (rows) and block
(columns).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize, to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from lora_diag.diagnostics.portability.record import AS_INTENDED, ORDER, Portability
from lora_diag.diagnostics.portability.show import group_by_consumer, title_of
from lora_diag.records.names import depth_of
from lora_diag.rendering.figures.fields import Types
from lora_diag.rendering.figures.pages import Key, Page, Panel
from lora_diag.rendering.figures.series import Options, Series, owner_of, subject_of
from lora_diag.rendering.figures.style import CATEGORIES, QUIET, UNKNOWN, PageStyle, crop_names

# Colours by status; a wrong weight has the colour of its ε, or this one if its ε is not known.
COLORS = {
    "exact": UNKNOWN,
    "full": UNKNOWN,
    "dropped": CATEGORIES[0],
    "refused": QUIET,
    "wrong": "#F4D9C6",
    "unknown": "#D9E2EC",
}
EPSILON: Colormap = ListedColormap(
    mpl.colormaps["Oranges"].resampled(256)(range(80, 256)), "epsilon"
)

# Maximum number of characters of a row's name.
_NAME = 24

# The worst record by module type and block: of several matrices of a type in a block (experts), the
# worst is drawn.
Cells = Mapping[tuple[str, int | None], Portability]


def _get_severity(record: Portability) -> tuple[int, float]:
    """Return a key by which a worse record is larger."""
    return -ORDER.index(record.status), record.epsilon or 0.0


def _make_norm(records: Sequence[Portability]) -> Normalize | None:
    """Return the colour scale of ε; None if no wrong weight has a known ε."""
    wrong = [r.epsilon for r in records if r.status == "wrong" and r.epsilon]
    if not wrong:
        return None
    low, high = min(wrong), max(wrong)
    return LogNorm(low, high) if high / low > 10 else Normalize(0.0, high)


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the page of one panel for each program of each run."""
    records: list[Portability] = [record for item in series for record in item.records]
    types = Types(record.layer for record in records)
    norm = _make_norm(records)
    depths = sorted(
        {depth_of(record.layer) for record in records},
        key=lambda depth: -1 if depth is None else depth,
    )
    names = [*crop_names(types.names, _NAME).values()]
    height = (1.75 * max(len(names), 2) + 2.4) * style.text / 72
    cells = partial(_draw_cells, norm=norm, types=types.names, names=names, depths=depths)
    panels = []
    pooled = False
    for item in series:
        programs = group_by_consumer(item.records)
        for consumer, of_program in programs.items():
            grid: dict[tuple[str, int | None], Portability] = {}
            for record in of_program:
                cell = types.of(record.layer), depth_of(record.layer)
                grid[cell] = max(grid.get(cell, record), record, key=_get_severity)
            pooled = pooled or len(grid) < len(of_program)
            draw = partial(cells, grid=grid)
            title = f"{owner_of(item, series)}{title_of(consumer, [*programs])}"
            panels.append(Panel(title, draw, "block", height=height, indent=max(map(len, names))))
    layers = len({record.layer for record in records})
    outside = ", after the layers outside them" if None in depths else ""
    notes = [f"Blocks run from left to right{outside}."]
    if pooled:
        notes.append("A cell shows the worst of a block's matrices of its type.")
    return Page(
        "Weights of the adapter as each program applies them",
        panels,
        f"{subject_of(series)}{layers} weights; ε = ‖ΔW' − ΔW‖_F / ‖ΔW‖_F of the applied ΔW'",
        notes,
        _make_keys(records),
        share=True,
        low=True,
        scale=None if norm is None else ScalarMappable(norm, EPSILON),
        scale_label="ε of a wrong weight",
    )


def _make_keys(records: Sequence[Portability]) -> list[Key]:
    """Return the legend entries of the statuses that occur."""
    statuses = {record.status for record in records}
    unknown = any(record.status == "wrong" and not record.epsilon for record in records)
    colors = (
        (bool(statuses & set(AS_INTENDED)), COLORS["exact"], "as intended"),
        ("wrong" in statuses, EPSILON(0.5), "different ΔW"),
        (unknown, COLORS["wrong"], "different ΔW, ε not known without BASE"),
        ("dropped" in statuses, COLORS["dropped"], "dropped (ε = 1)"),
        ("refused" in statuses, COLORS["refused"], "refused: no ΔW at all"),
        ("unknown" in statuses, COLORS["unknown"], "not known"),
    )
    return [Key(Patch(color=color), label) for present, color, label in colors if present]


def _draw_cells(
    ax: Axes,
    style: PageStyle,
    grid: Cells,
    norm: Normalize | None,
    types: Sequence[str],
    names: Sequence[str],
    depths: Sequence[int | None],
) -> None:
    """Draw the cells of a program, with module types as rows and blocks as columns; white where
    there is no layer.
    """
    image = np.ones((len(types), len(depths), 3))
    for row, name in enumerate(types):
        for column, depth in enumerate(depths):
            if (record := grid.get((name, depth))) is not None:
                color: Any = COLORS[record.status]
                if record.status == "wrong" and record.epsilon and norm is not None:
                    color = EPSILON(float(norm(record.epsilon)))[:3]
                image[row, column] = to_rgb(color)
    ax.imshow(image, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(types)), names, parse_math=False, size=style.ticks)
    ax.xaxis.set_major_locator(NullLocator())
    ax.tick_params(length=0)
    ax.grid(False)
    for row in range(1, len(types)):
        ax.axhline(row - 0.5, color="white", lw=0.8)
    for spine in ax.spines.values():
        spine.set_visible(False)
