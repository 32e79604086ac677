"""`gain`: energy, attributed gain and measured gain by number of directions; gain against energy by
layer; and the gain by module type and depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import NullFormatter

from lora_diag.metrics.statistics import paired_half
from lora_diag.probes.gain.choice import directions_of, order_directions
from lora_diag.probes.gain.record import Gain, GainLoss, LayerGain
from lora_diag.probes.gain.show import is_significant
from lora_diag.records.names import depth_of, module_type_of, type_order
from lora_diag.rendering.figures.pages import Page, Panel
from lora_diag.rendering.figures.panels import set_rank_axis
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
    SHARES,
    PageStyle,
    category,
    log_label,
    name_of,
)

# Colours of the curves.
ENERGY, GAIN, MEASURED = CATEGORIES[1], CATEGORIES[0], INK
# Markers of module types; each marks as many as there are colours.
MARKS = ("o", "s", "D", "v", "^")


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the panels of each run, on the text that is attributed.

    Raises:
        UndrawableError: A run has no significant gain.
    """
    panels: list[Panel] = []
    norm = Normalize(0, 0)
    for item in series:
        split = [record for record in item.records if record.sigma and not record.shifted]
        gain = next((r for r in item.whole if isinstance(r, Gain) and not r.shifted), None)
        if gain is None or not split or not is_significant(gain):
            raise UndrawableError("a gain that is significant, of layers in directions, is missing")
        measured = [r for r in item.whole if isinstance(r, GainLoss) and not r.shifted]
        types = sorted({module_type_of(record.layer) for record in split}, key=type_order)
        curves = partial(_draw_curves, records=split, gain=gain, measured=measured)
        layers = partial(_draw_layers, records=split, gain=gain, types=types)
        cells = _map_gain(split, gain, types)
        norm.vmin = min(norm.vmin or 0.0, np.nanmin(cells, initial=0.0))
        norm.vmax = max(norm.vmax or 0.0, np.nanmax(cells, initial=0.0))
        names = [name_of(kind.rpartition(".")[2]) for kind in types]
        cell_map = partial(_draw_map, cells=cells, norm=norm, names=names)
        owner = owner_of(item, series)
        panels += [
            Panel(f"{owner}directions", curves, "number of directions", "fraction of the whole"),
            Panel(f"{owner}layers", layers, "part of ‖ΔW‖² (%)", "part of the gain (%)"),
            Panel(f"{owner}modules", cell_map, "depth (block)"),
        ]
    return Page(
        "Gain in loss of layers and directions",
        panels,
        f"{subject_of(series)}L(W_0) − L(W_0 + ΔW), attributed along the straight path",
        [
            "Directions in the order of gain per parameter, energy in that of σ²; all else is as "
            "in TUNED. Measured: on text that did not choose. Dashed: gain as energy."
        ],
        columns=3 if style.columns >= 3 else 1,
        scale=ScalarMappable(norm, SHARES),
        scale_label="part of the gain (%)",
    )


def _draw_curves(
    ax: Axes,
    style: PageStyle,
    records: Sequence[LayerGain],
    gain: Gain,
    measured: Sequence[GainLoss],
) -> None:
    """Draw the fractions of gain and of energy over the number of directions."""
    energies = np.sort([direction.sigma**2 for direction in directions_of(records)])[::-1]
    ordered = np.array([direction.gain for direction in order_directions(records)])
    split = sum(record.gain for record in records if record.sigma)
    line: dict[str, Any] = {"lw": 1.5 * style.line}
    for values, color, label, start in (
        (energies / energies.sum(), ENERGY, "energy", 0.0),
        (ordered / gain.gain, GAIN, "attributed gain", 1 - split / gain.gain),
    ):
        counts = np.arange(1, len(values) + 1)
        ax.plot(counts, start + np.cumsum(values), color=color, label=label, **line)
    points = [r for r in measured if r.subject == "directions" and r.kept is not None]
    if points:
        halves = [paired_half(r.kept_error, r.sequences) or 0.0 for r in points]
        x, y = [r.amount for r in points], [r.kept or 0.0 for r in points]
        marks: dict[str, Any] = {"marker": "o", "ms": 3 * style.line, "ls": ""}
        ax.errorbar(x, y, yerr=halves, color=MEASURED, label="measured gain", **marks)
    ax.axhline(1, color=INK, lw=0.8 * style.line, ls=DASHED, zorder=1)
    set_rank_axis(ax, len(energies), style)


def _draw_layers(
    ax: Axes, style: PageStyle, records: Sequence[LayerGain], gain: Gain, types: Sequence[str]
) -> None:
    """Draw the part of the gain of each layer over that of the energy, by module type."""
    whole = sum(record.energy for record in records)
    drawn: list[tuple[float, float]] = []
    for number, kind in enumerate(types):
        of_type = [record for record in records if module_type_of(record.layer) == kind]
        points = [(100 * r.energy / whole, 100 * r.gain / gain.gain) for r in of_type]
        mark: dict[str, Any] = {"color": category(number), "ls": "", "ms": 3.4 * style.line}
        mark["marker"] = MARKS[number // len(CATEGORIES) % len(MARKS)]
        ax.plot(*zip(*points, strict=True), label=name_of(kind), **mark)
        drawn += points
    energies = np.geomspace(min(x for x, _ in drawn), max(max(point) for point in drawn))
    ax.plot(energies, energies, color=INK, lw=0.8 * style.line, ls=DASHED, zorder=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(log_label)
    ax.xaxis.set_minor_formatter(NullFormatter())


def _map_gain(
    records: Sequence[LayerGain], gain: Gain, types: Sequence[str]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the percentage of the gain, ``(types, depths)``; NaN where there is no layer, as
    for types outside of the blocks.
    """
    blocks = [(depth, r) for r in records if (depth := depth_of(r.layer)) is not None]
    cells = np.full((len(types), max((depth for depth, _ in blocks), default=0) + 1), np.nan)
    for depth, record in blocks:
        cell = types.index(module_type_of(record.layer)), depth
        cells[cell] = np.nansum([cells[cell], 100 * record.gain / gain.gain])
    return cells


def _draw_map(
    ax: Axes,
    style: PageStyle,
    cells: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    norm: Normalize,
    names: Sequence[str],
) -> None:
    ax.imshow(cells, cmap=SHARES, norm=norm, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(names)), names, parse_math=False, size=style.ticks)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
