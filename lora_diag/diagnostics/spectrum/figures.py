"""Figures of ``spectrum``: energy fractions C(r) and singular values over the rank.

Records become curves, of one layer or the median of a block's layers of one type, or bands over
layers. A page has one panel per module type, with a common depth scale and one legend.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Patch
from numpy.typing import NDArray

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.metrics.energy import energy_curve
from lora_diag.records.vocabulary import METRIC_NAMES
from lora_diag.rendering.figures.fields import (
    Types,
    by_depth,
    changes_of,
    count_matrices,
    deepest,
    metric_suffix,
)
from lora_diag.rendering.figures.pages import MAX_PANELS, Key, Page, Panel, key
from lora_diag.rendering.figures.panels import MARKED, set_fraction_ticks, set_rank_axis
from lora_diag.rendering.figures.series import (
    Options,
    Series,
    UndrawableError,
    owner_of,
    subject_of,
)
from lora_diag.rendering.figures.style import DEPTH, FLOOR, INK, PageStyle, category, log_label

# Points per curve: more are not visible on a log axis, and keep an SVG of a large model small.
POINTS = 56


@dataclass(frozen=True, slots=True)
class Quantity:
    """A quantity over the rank.

    Args:
        values: Returns a layer's values at ranks 1, 2, …, ``(K,)``.
        beyond: Value beyond the last rank of a complete spectrum.
        finish: Sets up the y axis: ``finish(ax, style,
            records of the panel, records of the page)``.
    """

    values: Callable[[Spectrum], NDArray[np.float64]]
    beyond: float
    finish: Callable[[Axes, PageStyle, Sequence[Spectrum], Sequence[Spectrum]], None]

    def at(
        self, records: Sequence[Spectrum], grid: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the ranks of a grid up to the largest of a layer, and each layer's values there,
        ``(layers, ranks)``.

        A layer has ``beyond`` past its last value, or NaN if its spectrum is incomplete.
        """
        last = max(len(record.s) for record in records)
        ranks = np.union1d(grid[grid < last], [last]).astype(np.int64)
        rows = []
        for record in records:
            inside = self.values(record)[np.minimum(ranks, len(record.s)) - 1]
            beyond = self.beyond if record.complete else np.nan
            rows.append(np.where(ranks <= len(record.s), inside, beyond))
        return ranks, np.array(rows)


def ranks_drawn(largest: int) -> NDArray[np.int64]:
    """Return log-spaced ranks from 1 to ``largest``, including the marked ones.

    >>> ranks_drawn(6).tolist(), len(ranks_drawn(4096)) < 64
    ([1, 2, 3, 4, 5, 6], True)
    """
    spaced = np.geomspace(1, largest, POINTS).round().astype(np.int64)
    return np.union1d(spaced, [rank for rank in MARKED if rank <= largest]).astype(np.int64)


def resolved_rank(record: Spectrum) -> int:
    """Return the largest r that the files resolve: 0 if they do not resolve the update, all if no
    rank is known.
    """
    signal = record.resolution.signal_rank
    if record.resolution.verdict == "unresolved":
        return 0
    return len(record.s) if signal is None else signal


def largest_rank(records: Iterable[Spectrum]) -> int:
    """Return the largest number of kept singular values of the nonzero updates; 1 without any."""
    return max((len(record.s) for record in records if record.fro > 0), default=1)


def draw_series(
    ax: Axes,
    style: PageStyle,
    series: Sequence[Series[Spectrum]],
    quantity: Quantity,
    per: str,
    page_records: Sequence[Spectrum],
) -> None:
    """Draw one panel: a line per block, coloured by depth; with several series or ``per="type"``, a
    band per series.

    Args:
        ax: Axes to draw on.
        style: The page.
        series: The records of each run.
        quantity: What to draw over the rank.
        per: ``layer`` or ``type``.
        page_records: Records of all panels, which share axes and colours.
    """
    records = [record for item in series for record in item.records]
    largest = largest_rank(page_records)
    last_depth = deepest(record.layer for record in page_records)
    grid = ranks_drawn(largest)
    if per == "type" or len(series) > 1:
        for number, item in enumerate(series):
            _draw_band(ax, style, item, quantity, grid, category(number))
    else:
        changed = [record for record in records if record.fro > 0]
        for depth, group in by_depth(changed).items():
            # Outside the blocks, the text colour.
            color = INK if depth is None else DEPTH(depth / last_depth if last_depth else 0.0)
            _draw_curve(ax, style, group, quantity, grid, color)
    set_rank_axis(ax, largest, style)
    quantity.finish(ax, style, records, page_records)


def _draw_curve(
    ax: Axes,
    style: PageStyle,
    group: Sequence[Spectrum],
    quantity: Quantity,
    grid: NDArray[np.int64],
    color: Any,
) -> None:
    """Draw the pointwise median of the given layers of a block: the resolved part in colour, the
    rest in grey.
    """
    ranks, stacked = quantity.at(group, grid)
    values = np.median(stacked, axis=0)
    finite = np.isfinite(values)
    ranks, values = ranks[finite], values[finite]
    marker: dict[str, Any] = {}
    if len(ranks) == 1:
        marker = {"marker": "o", "markersize": 2 * style.line}
    signal = sorted(resolved_rank(record) for record in group)[len(group) // 2]
    resolved = int(np.searchsorted(ranks, signal, side="right"))
    if resolved < len(ranks):
        # The grey part starts where the coloured one ends; otherwise there would be a gap.
        beyond = slice(max(resolved - 1, 0), None)
        grey: dict[str, Any] = {"color": FLOOR, "lw": 0.8 * style.line, "zorder": 1.5, **marker}
        ax.plot(ranks[beyond], values[beyond], label=f"_floor of {group[0].layer}", **grey)
    if resolved:
        line: dict[str, Any] = {"color": color, "lw": style.line, "zorder": 2, **marker}
        ax.plot(ranks[:resolved], values[:resolved], label=group[0].layer, **line)


def _draw_band(
    ax: Axes,
    style: PageStyle,
    item: Series[Spectrum],
    quantity: Quantity,
    grid: NDArray[np.int64],
    color: str,
) -> None:
    """Draw the pointwise median and range of the changed layers, at ranks that all of them have."""
    changed = [record for record in item.records if record.fro > 0]
    if not changed:
        return
    ranks, stacked = quantity.at(changed, grid)
    finite = np.isfinite(stacked).all(axis=0)
    ranks, stacked = ranks[finite], stacked[:, finite]
    ax.fill_between(
        ranks, stacked.min(axis=0), stacked.max(axis=0), color=color, alpha=0.22, lw=0, zorder=1.5
    )
    line: dict[str, Any] = {"color": color, "lw": 1.4 * style.line, "zorder": 2}
    ax.plot(ranks, np.median(stacked, axis=0), label=item.label or "median layer", **line)


def make_energy_page(
    series: Sequence[Series[Spectrum]], style: PageStyle, options: Options
) -> Page:
    """Return the page of C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖_F², one panel per module type."""
    change = changes_of(record for item in series for record in item.records)
    total = "Σσ²" if " and " in change else f"‖{change}‖_F²"
    title = f"Energy fraction C(r) of {change} that the best adapter of rank r keeps"
    formula = f"; C(r)\xa0=\xa0(σ₁²\xa0+\xa0…\xa0+\xa0σᵣ²)\xa0/\xa0{total}"
    return _make_multiples(series, ENERGY, style, options.per, title, ("rank r", "C(r)"), formula)


def _make_multiples(
    series: Sequence[Series[Spectrum]],
    quantity: Quantity,
    style: PageStyle,
    per: str,
    title: str,
    labels: tuple[str, str],
    formula: str = "",
    keys: Sequence[Key] = (),
) -> Page:
    """Return a page with one panel per module type: lines by depth of one series, or bands of
    several.

    Raises:
        UndrawableError: Every update is zero.
    """
    records = [record for item in series for record in item.records]
    groups = _group_by_type(series)
    if not groups:
        raise UndrawableError("ΔW = 0 in every matrix")
    draw = partial(draw_series, quantity=quantity, per=per, page_records=records)
    change = f"updates {changes_of(records)}"
    if any(record.source == "gradients" for record in records):
        change = "gradients"
    bands = per == "type" or len(series) > 1
    notes, scale = [], None
    if not bands:
        blocks = [by_depth(part[0].records).values() for part in groups.values()]
        joined = max(len(group) for of_type in blocks for group in of_type)
        if joined > 1:
            notes = [f"A line is the median of a block's matrices of its type (up to {joined})."]
        if last_depth := deepest(record.layer for record in records):
            scale = ScalarMappable(Normalize(0, last_depth), DEPTH)
    xlabel, ylabel = labels
    whole = partial(draw, series=series)
    return Page(
        title,
        [Panel(name, partial(draw, series=part), *labels) for name, part in groups.items()],
        f"{subject_of(series)}{change} of "
        f"{count_matrices(records)}{metric_suffix(records)}{formula}",
        notes,
        [*_make_keys(series, records, bands, style), *keys],
        share=True,
        scale=scale,
        scale_label="depth (block)",
        whole=Panel("", whole, xlabel, f"{ylabel} of {changes_of(records)}"),
    )


def _group_by_type(series: Sequence[Series[Spectrum]]) -> dict[str, tuple[Series[Spectrum], ...]]:
    """Return the series of each module type with an update; of too many, the types of least ‖ΔW‖
    share the last.
    """
    changed = [[record for record in item.records if record.fro > 0] for item in series]
    records = [record for of_run in changed for record in of_run]
    types = Types(record.layer for record in records)
    energies: dict[str, float] = defaultdict(float)
    for record in records:
        energies[types.of(record.layer)] += record.fro**2
    titles = types.pool(sorted(energies, key=lambda name: -energies[name])[: MAX_PANELS - 1])
    groups = {}
    for title in dict.fromkeys(titles.values()):
        parts = []
        for item, of_run in zip(series, changed, strict=True):
            part = tuple(record for record in of_run if titles[types.of(record.layer)] == title)
            parts.append(replace(item, records=part))
        groups[title] = tuple(parts)
    return groups


def _make_keys(
    series: Sequence[Series[Spectrum]], records: Sequence[Spectrum], bands: bool, style: PageStyle
) -> list[Key]:
    """Return the legend entries: lines without depth, or bands; LoRA ranks; and values beyond the
    signal rank.
    """
    keys = []
    if bands:
        for number, item in enumerate(series):
            patch = Patch(facecolor=category(number), alpha=0.7)
            keys.append(Key(patch, f"{owner_of(item, series)}median layer, range"))
    elif deepest(record.layer for record in records) == 0:
        keys.append(key("one line per layer", color=INK, lw=style.line))
    if inside := [str(rank) for rank in MARKED if rank <= largest_rank(records)]:
        dotted: dict[str, Any] = {"color": INK, "alpha": 0.6, "ls": (0, (1, 1.6))}
        keys.append(key(f"LoRA ranks {', '.join(inside)}", lw=0.8 * style.line, **dotted))
    has_noise = any(record.fro > 0 and resolved_rank(record) < len(record.s) for record in records)
    if has_noise and not bands:
        keys.append(key("beyond the signal rank: rounding", color=FLOOR, lw=1.5 * style.line))
    return keys


def make_page(series: Sequence[Series[Spectrum]], style: PageStyle, options: Options) -> Page:
    """Return the page of σ_i, one panel per module type, with common axes.

    Raises:
        UndrawableError: The records are in several metrics, or every update is zero.
    """
    records = tuple(record for item in series for record in item.records)
    metrics = dict.fromkeys(record.metric for record in records)
    if len(metrics) > 1:
        names = " and ".join(METRIC_NAMES[metric] for metric in metrics)
        raise UndrawableError(
            f"singular values in {names} have no common axis; draw them separately"
        )
    title = f"Singular values σᵢ of {changes_of(records)}, in descending order"
    keys = []
    if _list_edges(records):
        keys.append(key("noise edge of the files' rounding", **_make_edge_style(style)))
    return _make_multiples(series, SIGMA, style, options.per, title, ("index i", "σᵢ"), keys=keys)


def _finish_energy(
    ax: Axes, style: PageStyle, records: Sequence[Spectrum], all_records: Sequence[Spectrum]
) -> None:
    """Set the y axis of energy fractions."""
    ax.set_ylim(0, 1.03)
    set_fraction_ticks(ax.yaxis)
    ax.set_yticks([0.25, 0.75], minor=True)


def _finish_sigma(
    ax: Axes, style: PageStyle, records: Sequence[Spectrum], all_records: Sequence[Spectrum]
) -> None:
    """Set the y axis of singular values, and mark the median edge of the files' rounding noise."""
    ax.set_yscale("log", nonpositive="mask")
    ax.yaxis.set_major_formatter(log_label)
    ax.yaxis.set_minor_formatter("")
    ax.set_ylim(_compute_limits(all_records))
    if edges := _list_edges(records):
        ax.axhline(float(np.median(edges)), zorder=1.8, label="_edge", **_make_edge_style(style))


# Decades below the largest value that are shown: float32 has no more than seven.
DECADES = 7


def _compute_limits(records: Sequence[Spectrum]) -> tuple[float, float]:
    """Return the limits of the y axis: around all resolved values and near noise edges, ``DECADES``
    at most.
    """
    resolved = [value for record in records for value in record.s[: resolved_rank(record)]]
    every = [value for record in records for value in record.s]
    values = [value for value in resolved if value > 0] or [value for value in every if value > 0]
    low, high = min(values, default=1.0), max(values, default=1.0)
    near = [edge for edge in _list_edges(records) if edge > low / 3]
    if near:
        low = min(low, float(np.median(near)) / 2)
    return max(low / 2, high * 10.0**-DECADES), high * 1.6


def _list_edges(records: Sequence[Spectrum]) -> list[float]:
    """Return the noise edges of the nonzero updates that have one."""
    return [
        record.resolution.edge
        for record in records
        if record.fro > 0 and record.resolution.edge > 0
    ]


def _make_edge_style(style: PageStyle) -> dict[str, Any]:
    """Return the properties of the line that marks the noise edge."""
    return {"color": INK, "lw": 0.8 * style.line, "ls": (0, (5, 2))}


ENERGY = Quantity(
    lambda record: energy_curve(np.array(record.s), record.fro, record.complete),
    1.0,
    _finish_energy,
)
SIGMA = Quantity(lambda record: np.array(record.s), 0.0, _finish_sigma)
