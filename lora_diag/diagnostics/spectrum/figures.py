"""Figures of ``spectrum``: energy fractions C(r) and singular values over the rank.

Records become curves, of one layer or the median of a block's experts, or bands over layers. A panel has all layers, a
page has one panel per module type, with a common depth scale and one legend.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.metrics import energy_curve
from lora_diag.records.vocabulary import METRIC_NAMES
from lora_diag.rendering.figures.axes import panel_axes, rank_axis
from lora_diag.rendering.figures.fields import Types, by_depth, changes_of, deepest, metric_suffix
from lora_diag.rendering.figures.pages import multiples_of
from lora_diag.rendering.figures.series import Options, Series, owner_of
from lora_diag.rendering.figures.sheet import MAX_PANELS, FigureText, Key, depth_bar
from lora_diag.rendering.figures.style import DEPTH, FLOOR, INK, PageStyle, category, log_label

# Common ranks of adapters, marked in every panel.
MARKED = (8, 16, 64)

# Points per curve: more are not visible on a log axis, and keep an SVG of a large model small.
POINTS = 56


@dataclass(frozen=True, slots=True)
class Quantity:
    """A quantity over the rank.

    Args:
        values: Returns a layer's values at ranks 1, 2, …, ``(K,)``.
        beyond: Value beyond the last rank of a complete spectrum.
    """

    values: Callable[[Spectrum], NDArray[np.float64]]
    beyond: float

    def at(self, record: Spectrum, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return a layer's values at given ranks; past the last ``beyond``, or NaN for an incomplete spectrum."""
        values = self.values(record)
        inside = values[np.minimum(ranks, len(values)) - 1]
        return np.where(ranks <= len(values), inside, self.beyond if record.complete else np.nan)


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: of one layer, or the pointwise median of a block's layers of one type (experts).

    Args:
        layer: Name of the layer, or of the first of several.
        depth: Index of the block; None outside the blocks.
        ranks: Ranks r.
        values: Values at these ranks.
        signal: Largest r that the files resolve.
        layers: Number of layers it represents.
    """

    layer: str
    depth: int | None
    ranks: NDArray[np.int64]
    values: NDArray[np.float64]
    signal: int
    layers: int


def ranks_drawn(largest: int, marked: Sequence[int] = MARKED) -> NDArray[np.int64]:
    """Return log-spaced ranks from 1 to ``largest``, including the marked ones.

    >>> ranks_drawn(6).tolist(), len(ranks_drawn(4096)) < 64
    ([1, 2, 3, 4, 5, 6], True)
    """
    spaced = np.geomspace(1, largest, POINTS).round().astype(np.int64)
    return np.union1d(spaced, [rank for rank in marked if rank <= largest]).astype(np.int64)


def curves(records: Sequence[Spectrum], quantity: Quantity, grid: NDArray[np.int64]) -> list[Curve]:
    """Return one curve per block: of its one layer, or the median of its layers; zero updates have none."""
    changed = [record for record in records if record.fro > 0]
    return [_make_curve(depth, group, quantity, grid) for depth, group in by_depth(changed).items()]


def _make_curve(depth: int | None, group: Sequence[Spectrum], quantity: Quantity, grid: NDArray[np.int64]) -> Curve:
    last = max(len(record.s) for record in group)
    ranks = np.union1d(grid[grid < last], [last]).astype(np.int64)
    stacked = np.array([quantity.at(record, ranks) for record in group])
    middle = np.median(stacked, axis=0)
    finite = np.isfinite(middle)
    signal = sorted(resolved_rank(record) for record in group)[len(group) // 2]
    return Curve(group[0].layer, depth, ranks[finite], middle[finite], signal, len(group))


def resolved_rank(record: Spectrum) -> int:
    """Return the largest r that the files resolve; 0 if the update as a whole is not resolved."""
    signal = record.resolution.signal_rank
    if record.resolution.verdict == "unresolved":
        return 0
    return len(record.s) if signal is None else signal


@dataclass(frozen=True, slots=True)
class Band:
    """Median and range over the layers of a type."""

    ranks: NDArray[np.int64]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def band(records: Sequence[Spectrum], quantity: Quantity, grid: NDArray[np.int64]) -> Band | None:
    """Return pointwise median, minimum and maximum at ranks that all changed layers have; None if none changed."""
    changed = [record for record in records if record.fro > 0]
    if not changed:
        return None
    last = max(len(record.s) for record in changed)
    ranks = np.union1d(grid[grid < last], [last]).astype(np.int64)
    stacked = np.array([quantity.at(record, ranks) for record in changed])
    finite = np.isfinite(stacked).all(axis=0)
    stacked = stacked[:, finite]
    return Band(ranks[finite], np.median(stacked, axis=0), stacked.min(axis=0), stacked.max(axis=0))


def largest_rank(records: Iterable[Spectrum]) -> int:
    """Return the largest number of kept singular values of a nonzero update; 1 without any."""
    return max((len(record.s) for record in records if record.fro > 0), default=1)


def has_floor(records: Iterable[Spectrum]) -> bool:
    """Return whether any layer has values that the files do not resolve."""
    return any(record.fro > 0 and resolved_rank(record) < len(record.s) for record in records)


def draw_series(
    ax: Axes,
    series: Sequence[Series[Spectrum]],
    quantity: Quantity,
    marked: Sequence[int],
    per: str,
    style: PageStyle | None,
    *,
    last_depth: int | None = None,
    largest: int | None = None,
    inches: float | None = None,
) -> int:
    """Draw one panel: lines by depth; or bands, of each of several series or with ``per="type"``.

    Returns:
        The largest number of layers that one line represents.
    """
    all_records = [record for item in series for record in item.records]
    largest = largest or largest_rank(all_records)
    grid = ranks_drawn(largest, marked)
    joined = 1
    if per == "type" or len(series) > 1:
        for number, item in enumerate(series):
            if drawn := band(item.records, quantity, grid):
                draw_band(ax, drawn, category(number), item.label or "median layer", style)
    else:
        last_depth = deepest(record.layer for record in all_records) if last_depth is None else last_depth
        for curve in curves(series[0].records, quantity, grid):
            draw_curve(ax, curve, depth_color(curve.depth, last_depth), style)
            joined = max(joined, curve.layers)
    rank_axis(ax, largest, marked, style, inches or float(ax.get_window_extent().width) / ax.figure.dpi)
    return joined


def draw_curve(ax: Axes, curve: Curve, color: object, style: PageStyle | None) -> None:
    """Draw a curve: the resolved part in colour, the unresolved part in grey."""
    width = None if style is None else style.line
    line_style: dict[str, Any] = {"marker": "o", "markersize": 2 * (width or 1)} if len(curve.ranks) == 1 else {}
    resolved = int(np.searchsorted(curve.ranks, curve.signal, side="right"))
    # The grey part starts where the coloured one ends; otherwise there would be a gap.
    beyond = slice(max(resolved - 1, 0), None)
    if resolved < len(curve.ranks):
        ax.plot(
            curve.ranks[beyond],
            curve.values[beyond],
            color=FLOOR,
            lw=0.8 * width if width else None,
            zorder=1.5,
            label=f"_floor of {curve.layer}",
            **line_style,
        )
    if resolved:
        ax.plot(
            curve.ranks[:resolved],
            curve.values[:resolved],
            color=color,
            lw=width,
            zorder=2,
            label=curve.layer,
            **line_style,
        )


def depth_color(depth: int | None, deepest: int) -> object:
    """Return the colour of a block; outside the blocks, the text colour."""
    return INK if depth is None else DEPTH(depth / deepest if deepest else 0.0)


def draw_band(ax: Axes, drawn: Band, color: object, label: str, style: PageStyle | None) -> None:
    """Draw a median and the range around it."""
    ax.fill_between(drawn.ranks, drawn.low, drawn.high, color=color, alpha=0.22, lw=0, zorder=1.5)
    ax.plot(drawn.ranks, drawn.middle, color=color, lw=1.4 * style.line if style else None, zorder=2, label=label)


def _energy_shares(record: Spectrum) -> NDArray[np.float64]:
    return energy_curve(np.array(record.s), record.fro, record.complete)


SHARE = Quantity(_energy_shares, beyond=1.0)


def energy(
    records: Iterable[Spectrum], ax: Axes | None = None, *, ranks: Sequence[int] = MARKED, per: str = "layer"
) -> Axes:
    """Draw C(r) = Σ_{i≤r}σ_i² / ‖ΔW‖_F² over r, one line per layer, all in one panel.

    Curves are coloured by depth, and grey beyond the signal rank, where they include rounding noise of the files. A
    zero update has no curve. Blocks with several such matrices (experts) have one curve, their pointwise median: pass
    the records of one module type (``results.filter("q_proj")``) for one curve per layer.

    Args:
        records: Records of ``spectrum``.
        ax: Axes to draw on; default those of a new figure (``ax.figure`` is then the figure).
        ranks: Ranks to mark.
        per: ``layer``; or ``type`` for the median and the range of all records.

    Returns:
        The Axes drawn on.

    Example:
        >>> import lora_diag
        >>> results = lora_diag.spectrum("sample_checkpoints/base", "sample_checkpoints/full_ft", layers="q_proj")
        >>> ax = energy(results)
        >>> [float(line.get_ydata()[-1]) for line in ax.lines if "q_proj" in line.get_label()]
        [1.0, 1.0, 1.0, 1.0]
    """
    records = tuple(records)
    with panel_axes(ax) as (axes, style):
        draw_series(axes, (Series("", records),), SHARE, ranks, per, style)
        _scale_energy(axes)
        change = changes_of(records)
        axes.set(xlabel="rank r", ylabel=f"energy fraction C(r){'' if change == 'ΔW' else f' of {change}'}")
    return axes


def energy_figure(series: Sequence[Series[Spectrum]], style: PageStyle, options: Options) -> Figure:
    """Return the page of C(r), one panel per module type."""
    change = changes_of(record for item in series for record in item.records)
    total = "Σσ²" if " and " in change else f"‖{change}‖_F²"
    return small_multiples(
        series,
        SHARE,
        style,
        options.per,
        title=f"Energy fraction C(r) of {change} that the best adapter of rank r keeps",
        xlabel="rank r",
        ylabel="C(r)",
        formula=f"C(r)\xa0=\xa0(σ₁²\xa0+\xa0…\xa0+\xa0σᵣ²)\xa0/\xa0{total}",
        scale=_scale_energy,
    )


def _scale_energy(ax: Axes) -> None:
    ax.set_ylim(0, 1.03)
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_yticks([0.25, 0.75], minor=True)


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: a module type, and its records of every series."""

    name: str
    series: tuple[Series[Spectrum], ...]


def small_multiples(
    series: Sequence[Series[Spectrum]],
    quantity: Quantity,
    style: PageStyle,
    per: str,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    scale: Callable[[Axes], None],
    also: Callable[[Axes, Sequence[Spectrum]], None] | None = None,
    keys: Sequence[Key] = (),
    formula: str = "",
) -> Figure:
    """Return a figure with one panel per module type.

    Args:
        series: Series to compare; one for lines by depth, several for bands.
        quantity: Quantity over the rank.
        style: The page.
        per: ``layer`` or ``type``.
        title: Title of the figure.
        xlabel: Label of the panels at the bottom.
        ylabel: Label of the panels at the left.
        scale: Sets the y axis of a panel.
        also: Adds further elements to a panel.
        keys: Legend entries of these elements.
        formula: Formula of the quantity.
    """
    records = [record for item in series for record in item.records]
    type_panels = _make_panels(series)
    bands = per == "type" or len(series) > 1
    last_depth, largest = deepest(record.layer for record in records), largest_rank(records)
    by_color = not bands and last_depth > 0
    text = FigureText(
        title,
        f"{_make_subtitle(series, records)}{f'; {formula}' if formula else ''}",
        _make_notes(type_panels, records, bands),
        (*_make_keys(series, records, largest, bands, style), *keys),
    )

    def draw(ax: Axes, inches: float, panel_series: Sequence[Series[Spectrum]]) -> None:
        draw_series(
            ax, panel_series, quantity, MARKED, per, style, last_depth=last_depth, largest=largest, inches=inches
        )
        scale(ax)
        if also:
            also(ax, [record for item in panel_series for record in item.records])

    panels = {panel.name: partial(draw, panel_series=panel.series) for panel in type_panels}
    figure = multiples_of(panels, text, style, xlabel, ylabel, 0.88 if by_color else 0.97)
    if by_color:
        depth_bar(figure, figure.axes, last_depth, style)
    return figure


def _make_panels(series: Sequence[Series[Spectrum]]) -> tuple[Panel, ...]:
    """Return one panel per module type with an update; of too many, the types of least ‖ΔW‖ share the last."""
    types = Types(record.layer for item in series for record in item.records)
    energy: dict[str, float] = defaultdict(float)
    for item in series:
        for record in item.records:
            energy[types.of(record.layer)] += record.fro**2
    changed = [name for name in types.names if energy[name] > 0]
    own_panel = set(changed)
    if len(changed) > MAX_PANELS:
        own_panel = set(sorted(changed, key=lambda name: -energy[name])[: MAX_PANELS - 1])
    others = f"{len(changed) - len(own_panel)} other types"
    panel_names = {name: name if name in own_panel else others for name in changed}
    order = [name for name in changed if name in own_panel] + ([others] if len(own_panel) < len(changed) else [])
    groups: dict[str, tuple[list[Spectrum], ...]] = {name: tuple([] for _ in series) for name in order}
    for number, item in enumerate(series):
        for record in item.records:
            if (name := types.of(record.layer)) in panel_names:
                groups[panel_names[name]][number].append(record)
    return tuple(
        Panel(name, tuple(Series(item.label, tuple(part)) for item, part in zip(series, groups[name], strict=True)))
        for name in order
    )


def _make_subtitle(series: Sequence[Series[Spectrum]], records: Sequence[Spectrum]) -> str:
    """Return the subtitle: description of the figure."""
    layers = len({record.layer for record in records})
    subject = (
        "gradients" if any(record.source == "gradients" for record in records) else f"updates {changes_of(records)}"
    )
    prefix = series[0].label if len(series) == 1 else ""
    count = f"{layers} {'matrix' if layers == 1 else 'matrices'}{metric_suffix(records)}"
    return f"{f'{prefix}: ' if prefix else ''}{subject} of {count}"


def _make_keys(
    series: Sequence[Series[Spectrum]], records: Sequence[Spectrum], largest: int, bands: bool, style: PageStyle
) -> tuple[Key, ...]:
    """Return the legend entries."""
    keys = []
    if bands:
        for number, item in enumerate(series):
            owner = owner_of(item, series)
            keys.append(Key(Patch(facecolor=category(number), alpha=0.7), f"{owner}median layer, range"))
    elif deepest(record.layer for record in records) == 0:
        keys.append(Key(Line2D([], [], color=INK, lw=style.line), "one line per layer"))
    inside = [str(rank) for rank in MARKED if rank <= largest]
    if inside:
        line = Line2D([], [], color=INK, alpha=0.6, lw=0.8 * style.line, ls=(0, (1, 1.6)))
        keys.append(Key(line, f"LoRA ranks {', '.join(inside)}"))
    if not bands and has_floor(records):
        keys.append(Key(Line2D([], [], color=FLOOR, lw=1.5 * style.line), "beyond the signal rank: rounding"))
    return tuple(keys)


def _make_notes(panels: Sequence[Panel], records: Sequence[Spectrum], bands: bool) -> tuple[str, ...]:
    """Return notes on joined layers and on layers without a curve."""
    notes = []
    joined = max((len(g) for panel in panels for g in by_depth(panel.series[0].records).values()), default=1)
    if joined > 1 and not bands:
        notes.append(f"A line is the median of a block's matrices of its type (up to {joined}).")
    if any(record.fro > 0 and not record.complete for record in records):
        notes.append("Curves end where the values kept (--top) do.")
    if zero := sum(record.fro == 0 for record in records):
        notes.append(f"Δ = 0 in {zero} {'matrix, which has' if zero == 1 else 'matrices, which have'} no curve.")
    return (" ".join(notes),) if notes else ()


# Decades below the largest value that are shown: float32 has no more than seven.
DECADES = 7


def _singular_values(record: Spectrum) -> NDArray[np.float64]:
    return np.array(record.s)


SIGMA = Quantity(_singular_values, beyond=0.0)


def spectrum(
    records: Iterable[Spectrum], ax: Axes | None = None, *, ranks: Sequence[int] = MARKED, per: str = "layer"
) -> Axes:
    """Draw the singular values σ_i of ΔW over i, log–log, one line per layer, all in one panel.

    Values above the layer's noise edge are coloured by depth; values below it, which rounding of the files can explain,
    are grey. The dashed line is the median edge. Zeros are not drawn. Experts are joined as in ``energy``.

    Args:
        records: Records of ``spectrum``.
        ax: Axes to draw on; default those of a new figure.
        ranks: Ranks to mark.
        per: ``layer``; or ``type`` for the median and the range of all records.

    Returns:
        The Axes drawn on.
    """
    records = tuple(records)
    with panel_axes(ax) as (axes, style):
        draw_series(axes, (Series("", records),), SIGMA, ranks, per, style)
        _scale(axes, records)
        _draw_edge(axes, records, style)
        axes.set(xlabel="index i", ylabel=f"singular value σᵢ of {changes_of(records)}")
    return axes


def figure(series: Sequence[Series[Spectrum]], style: PageStyle, options: Options) -> Figure:
    """Return the page of σ_i, one panel per module type, with common axes."""
    all_records = tuple(record for item in series for record in item.records)
    return small_multiples(
        series,
        SIGMA,
        style,
        options.per,
        title=f"Singular values σᵢ of {changes_of(all_records)}, in descending order",
        xlabel="index i",
        ylabel="σᵢ",
        scale=lambda ax: _scale(ax, all_records),
        also=lambda ax, records: _draw_edge(ax, records, style),
        keys=_make_edge_key(all_records, style),
    )


def _scale(ax: Axes, records: Sequence[Spectrum]) -> None:
    ax.set_yscale("log", nonpositive="mask")
    ax.yaxis.set_major_formatter(log_label)
    ax.yaxis.set_minor_formatter("")
    low, high = _compute_limits(records)
    ax.set_ylim(low, high)


def _compute_limits(records: Sequence[Spectrum]) -> tuple[float, float]:
    """Return the range of the y axis: all resolved values, and the noise edge if it is near."""
    resolved = [value for record in records for value in record.s[: resolved_rank(record)] if value > 0]
    values = resolved or [value for record in records for value in record.s if value > 0] or [1.0]
    low, high = min(values), max(values)
    near = [edge for edge in _list_edges(records) if edge > low / 3]
    low = min(low, float(np.median(near)) / 2 if near else low)
    return max(low / 2, high * 10.0**-DECADES), high * 1.6


def _list_edges(records: Sequence[Spectrum]) -> list[float]:
    return [record.resolution.edge for record in records if record.fro > 0 and record.resolution.edge > 0]


def _draw_edge(ax: Axes, records: Sequence[Spectrum], style: PageStyle | None) -> None:
    """Mark the edge of the files' rounding noise for the median layer."""
    if edges := _list_edges(records):
        ax.axhline(float(np.median(edges)), zorder=1.8, label="_edge", **_make_edge_line(style))


def _make_edge_key(records: Sequence[Spectrum], style: PageStyle) -> tuple[Key, ...]:
    edges = _list_edges(records)
    if not edges:
        return ()
    below = " (all below the axis)" if max(edges) < _compute_limits(records)[0] else ""
    return (Key(Line2D([], [], **_make_edge_line(style)), f"noise edge of the files' rounding{below}"),)


def _make_edge_line(style: PageStyle | None) -> dict[str, Any]:
    return {"color": INK, "lw": 0.8 * (style.line if style else 1.2), "ls": (0, (5, 2))}


def no_update_reason(records: Sequence[Spectrum], options: Options) -> str | None:
    """Return why energy cannot be drawn: every update is zero; None if it can."""
    return None if any(record.fro for record in records) else "ΔW = 0 in every matrix"


def mixed_units_reason(records: Sequence[Spectrum], options: Options) -> str | None:
    """Return why σ cannot be drawn on one axis: different metrics, or only zero updates; None if it can."""
    metrics = dict.fromkeys(record.metric for record in records)
    if len(metrics) > 1:
        metric_names = " and ".join(METRIC_NAMES[metric] for metric in metrics)
        return f"singular values in {metric_names} have no common axis; draw them separately"
    return no_update_reason(records, options)
