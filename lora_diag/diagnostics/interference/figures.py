"""`union`: rank of the sum of several updates against the sum of their ranks, layer by layer.

`angles`: principal angles between the spaces of two updates, with the distribution of random spaces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lora_diag.diagnostics.interference.record import Interference, Union
from lora_diag.metrics.subspaces import random_angles
from lora_diag.records import Agreement
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.fields import Types
from lora_diag.rendering.figures.panels import Slot, label_height, make_slots, slot_axis
from lora_diag.rendering.figures.series import Options, Series, by_pair, rank_absent
from lora_diag.rendering.figures.sheet import FigureText, Key, sheet
from lora_diag.rendering.figures.style import CATEGORIES, INK, PageStyle, category, wrap_text

SUM, APART, EVERY = CATEGORIES[0], CATEGORIES[1], CATEGORIES[2]

# Fraction of the energy at which ranks are shown.
ENERGY = "0.9"


def union(records: Iterable[Union], ax: Axes | None = None, *, per: str = "layer") -> Axes:
    """Draw the rank at which the sum of the updates has 90% of its energy, and the sum of the ranks of the updates.

    Their ratio is the additive fraction: 1 if every direction is needed, 1/K for K equal updates. Green: the rank at
    which every update keeps 90% of its energy; no line if none does.

    Args:
        records: Records of ``interference``; layers that a single update changes are skipped.
        ax: Axes to draw on; default those of a new figure.
        per: ``layer`` for one bar per layer (median over the experts of a block), ``type`` for one bar per module type.

    Returns:
        The Axes drawn on.
    """
    with panel_axes(ax) as (axes, style):
        slots = make_slots(select_shared(records), per)
        _draw_ranks(axes, slots, style)
        slot_axis(axes, slots, float(axes.get_window_extent().width) / axes.figure.dpi, style.ticks if style else 9)
        axes.set_ylabel("rank at 90% of the energy")
        keys = _make_union_keys(style, shares=False)
        axes.legend([key.handle for key in keys], [key.label for key in keys], fontsize="small")
    return axes


def select_shared(records: Iterable[Union]) -> tuple[Union, ...]:
    """Return the records of layers that at least two updates change."""
    return tuple(record for record in records if len(record.updates) > 1)


def union_figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw the ranks of the layers, with the additive fraction below, once per run."""
    shown = [(item, select_shared(item.records)) for item in series]
    shown = [(item, records) for item, records in shown if records]
    types = Types(record.layer for _, records in shown for record in records)
    slots_by_run = [make_slots(records, options.per, types) for _, records in shown]
    inches = style.width - 6 * style.text / 72
    all_slots = list({slot.name: slot for slots in slots_by_run for slot in slots}.values())
    below = label_height(all_slots, inches, style.ticks) / (2 * len(shown))
    heights = [1.25 * style.panel + below, 0.85 * style.panel + below] * len(shown)
    page, axes = sheet(
        style,
        _make_union_text(series, shown, slots_by_run, style),
        len(heights),
        1,
        panel=sum(heights) / len(heights),
        ratios=heights,
        share=False,
        low=True,
    )
    for position, ((item, records), slots) in enumerate(zip(shown, slots_by_run, strict=True)):
        ranks, shares = axes[2 * position : 2 * position + 2]
        _draw_ranks(ranks, slots, style)
        ranks.set_title(wrap_text(_describe_run(item, records), inches, style.text), parse_math=False)
        ranks.set_ylabel("rank")
        _draw_shares(shares, slots, max(len(record.updates) for record in records), style)
        shares.set_ylabel("fraction")
        for ax in (ranks, shares):
            slot_axis(ax, slots, inches, style.ticks, labels=False)
            ax.set_xlim(-0.5, len(all_slots) - 0.5)
    slot_axis(axes[-1], all_slots, inches, style.ticks)
    return page


def _draw_ranks(ax: Axes, slots: Sequence[Slot[Union]], style: PageStyle | None) -> None:
    width = style.line if style else 1.2
    _draw_stairs(ax, slots, lambda record: record.spectrum.rank_at[ENERGY], "_sum", fill=True, color=SUM, lw=0)
    _draw_stairs(ax, slots, lambda r: r.rank_for_all.get(ENERGY), "_every", baseline=None, color=EVERY, lw=1.3 * width)
    _draw_stairs(ax, slots, lambda r: r.parts_rank_at[ENERGY], "_apart", baseline=None, color=APART, lw=1.3 * width)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _draw_shares(ax: Axes, slots: Sequence[Slot[Union]], update_count: int, style: PageStyle | None) -> None:
    width = style.line if style else 1.2
    _draw_stairs(ax, slots, lambda record: record.additive[ENERGY], "_additive", fill=True, color=SUM, lw=0)
    for share in (1.0, 1 / update_count):
        ax.axhline(share, color=INK, lw=0.8 * width, ls=(0, (4, 2)), zorder=3)
    ax.set_ylim(0, max(1.08, 1.05 * ax.get_ylim()[1]))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=3))


def _draw_stairs(
    ax: Axes, slots: Sequence[Slot[Union]], value_of: Callable[[Union], float | None], label: str, **line_style: Any
) -> None:
    for slot in slots:
        heights = _compute_medians(slot, value_of)
        if np.isfinite(heights).any():
            ax.stairs(heights, slot.edges, label=label, **line_style)


def _compute_medians(slot: Slot[Union], value_of: Callable[[Union], float | None]) -> NDArray[np.float64]:
    """Return the median of each bar's layers; NaN if a layer has no value."""
    by_bar = [[value_of(record) for record in bar] for bar in slot.bars]
    return np.array([np.nan if None in values else float(np.median(np.array(values, float))) for values in by_bar])


def _describe_run(item: Series[Any], records: Sequence[Union]) -> str:
    """Return the label of a run with the total rank of its layers."""
    with_rank = [record for record in records if record.spectrum.rank_at[ENERGY] is not None]
    sum_rank = sum(record.spectrum.rank_at[ENERGY] or 0 for record in with_rank)
    separate_rank = sum(record.parts_rank_at[ENERGY] for record in with_rank)
    text = f"Σr = {sum_rank} of {separate_rank}" + (
        f", fraction {sum_rank / separate_rank:.2f}" if separate_rank else ""
    )
    return f"{item.label}: {text}" if item.label else text


def _make_union_keys(style: PageStyle | None, shares: bool = True) -> tuple[Key, ...]:
    width = style.line if style else 1.2
    line = Line2D([], [], color=INK, lw=0.8 * width, ls=(0, (4, 2)))
    return (
        Key(Patch(facecolor=SUM), "rank of the sum"),
        Key(Line2D([], [], color=APART, lw=1.3 * width), "sum of the updates' ranks"),
        Key(Line2D([], [], color=EVERY, lw=1.3 * width), "rank that keeps 90% of every update"),
        *((Key(line, "fraction 1: every direction needed; 1/K: K equal updates"),) if shares else ()),
    )


def _make_union_text(
    series: Sequence[Series[Any]],
    shown: Sequence[tuple[Series[Any], tuple[Union, ...]]],
    slots_by_run: Sequence[Sequence[Slot[Union]]],
    style: PageStyle,
) -> FigureText:
    layers = len({record.layer for _, records in shown for record in records})
    joined = max((slot.joined for slots in slots_by_run for slot in slots), default=1)
    notes = ["Blocks run from left to right in each module type. Weights alone do not show interference between tasks."]
    if joined > 1:
        notes.append(f"A bar is the median of up to {joined} layers.")
    if singles := sum(len(item.records) - len(select_shared(item.records)) for item in series):
        notes.append(f"Not drawn: {singles} {'layer' if singles == 1 else 'layers'} changed by fewer than two updates.")
    if any(record.rank_for_all.get(ENERGY) is None for _, records in shown for record in records):
        notes.append("No green line: no rank of the sum keeps 90% of every update.")
    return FigureText(
        "Rank of the sum of updates, compared with the sum of their ranks",
        f"{layers} {'matrix' if layers == 1 else 'matrices'}; ranks at 90% of the energy Σσ²; below, the additive "
        "fraction: rank of the sum / sum of the ranks",
        (" ".join(notes),),
        _make_union_keys(style),
    )


def find_union_obstacle(records: Sequence[Union], options: Options) -> str | None:
    """Return why records cannot be drawn: no layer is changed by two updates; None if they can."""
    return None if select_shared(records) else "no layer is changed by two updates"


Side = Literal["columns", "rows"]
SIDES: tuple[tuple[Side, str], ...] = (("columns", "column spaces"), ("rows", "row spaces"))

# Maximum number of points of a curve; of more angles, evenly spaced ones are drawn.
POINTS = 400


def angles(
    records: Iterable[Interference], ax: Axes | None = None, *, side: Side = "columns", rank: int | None = None
) -> Axes:
    """Draw the cumulative distribution of the cosines of principal angles between two updates, over all layers.

    Dotted: the same for random spaces of these dimensions (``metrics.angles.random_angles``).

    Args:
        records: Records of ``interference``; one curve per pair.
        ax: Axes to draw on; default those of a new figure.
        side: ``columns`` for the spaces of the left singular vectors, ``rows`` for those of the right ones.
        rank: Number of singular vectors that span each space; default 8 if measured, else the smallest.

    Returns:
        The Axes drawn on.
    """
    series = by_pair((Series("", tuple(records)),))
    drawn_rank = choose_rank([record for item in series for record in item.records], rank)
    with panel_axes(ax) as (axes, style):
        _draw(axes, series, side, drawn_rank, style)
        axes.set(xlabel="cosine of a principal angle", ylabel=f"fraction of the angles, r = {drawn_rank}")
        keys = _make_keys(series, style)
        axes.legend([key.handle for key in keys], [key.label for key in keys], fontsize="small")
    return axes


def choose_rank(records: Sequence[Interference], rank: int | None) -> int:
    """Return the rank to draw: the requested one, else 8 if measured, else the smallest."""
    ranks = ranks_of(records)
    return rank if rank is not None else 8 if 8 in ranks else ranks[0]


def ranks_of(records: Iterable[Interference]) -> list[int]:
    """Return the ranks at which spaces were compared."""
    return sorted({int(rank) for record in records for rank in record.columns})


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw the angles of the column spaces and of the row spaces, one panel each, of the pairs that overlap most."""
    pairs = by_pair(series)
    all_records = [record for item in pairs for record in item.records]
    rank = choose_rank(all_records, options.rank)
    measured = [item for item in pairs if any(str(rank) in record.columns for record in item.records)]
    shown = sorted(measured, key=lambda item: -_compute_mean_overlap(item.records, rank))[: len(CATEGORIES)]
    figure, axes = sheet(style, _make_text(pairs, shown, rank, style), 1, 2, panel=1.4 * style.panel)
    for (side, title), ax in zip(SIDES, axes, strict=True):
        _draw(ax, shown, side, rank, style)
        ax.set_title(title)
        ax.set_xlabel("cosine")
    axes[0].set_ylabel("fraction")
    return figure


def _compute_mean_overlap(records: Sequence[Interference], rank: int) -> float:
    return float(np.mean([record.columns[str(rank)].overlap for record in records if str(rank) in record.columns]))


def _draw(ax: Axes, series: Sequence[Series[Interference]], side: Side, rank: int, style: PageStyle | None) -> None:
    width = style.line if style else 1.2
    for number, item in enumerate(series):
        spaces_of_records = [
            (record, getattr(record, side)[str(rank)]) for record in item.records if str(rank) in record.columns
        ]
        if not spaces_of_records:
            continue
        cosines, shares = cumulative_distribution(
            [cosine for _, space in spaces_of_records for cosine in space.cosines]
        )
        ax.plot(cosines, shares, color=category(number), lw=1.5 * width, drawstyle="steps-post", label=f"_{item.label}")
        grid = np.linspace(0.0, 1.0, 201)
        chance = random_distribution(
            grid, [(space, record.shape[side == "rows"]) for record, space in spaces_of_records]
        )
        ax.plot(grid, chance, color=category(number), lw=width, ls=(0, (1, 1.5)), label=f"_random {item.label}")
    ax.set_xlim(0, 1.02)
    ax.set_ylim(0, 1.03)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])


def cumulative_distribution(values: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the cumulative distribution of values in [0, 1], from (0, 0) to (1, 1), in at most ``POINTS`` steps."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    indices = np.unique(np.linspace(0, len(ordered) - 1, min(POINTS, len(ordered))).round().astype(np.int64))
    return np.concatenate([[0.0], ordered[indices], [1.0]]), np.concatenate([[0.0], shares[indices], [1.0]])


def random_distribution(grid: NDArray[np.float64], spaces: Sequence[tuple[Agreement, int]]) -> NDArray[np.float64]:
    """Return the cumulative distribution, at ``grid``, of the cosines of random spaces of the measured dimensions."""
    space_counts = Counter(
        (len(space.cosines), round(space.random * dimension), dimension) for space, dimension in spaces if space.cosines
    )
    angle_counts = {dimensions: space_count * dimensions[0] for dimensions, space_count in space_counts.items()}
    total = sum(angle_counts.values())
    distribution = np.zeros_like(grid)
    for (first, second, dimension), angle_count in angle_counts.items():
        distribution += angle_count / total * random_angles(grid, first, second, dimension)
    return distribution


def _make_keys(series: Sequence[Series[Interference]], style: PageStyle | None) -> tuple[Key, ...]:
    width = style.line if style else 1.2
    return (
        *(Key(Line2D([], [], color=category(n), lw=2 * width), item.label) for n, item in enumerate(series)),
        Key(Line2D([], [], color=INK, lw=width, ls=(0, (1, 1.5))), "random subspaces"),
    )


def _make_text(
    pairs: Sequence[Series[Interference]], shown: Sequence[Series[Interference]], rank: int, style: PageStyle
) -> FigureText:
    records = [record for item in shown for record in item.records]
    drawn_layers = {record.layer for record in records if str(rank) in record.columns}
    notes = ["The further a curve is to the right of its dotted line, the more two updates have in common."]
    if hidden_pairs := len(pairs) - len(shown):
        notes.append(f"Not drawn: {hidden_pairs} pairs with less in common.")
    if omitted := len({record.layer for record in records} - drawn_layers):
        notes.append(f"Not drawn: {omitted} {'layer' if omitted == 1 else 'layers'} without {rank} directions.")
    if other_ranks := [other_rank for other_rank in ranks_of(records) if other_rank != rank]:
        notes.append(f"Also measured: r = {', '.join(map(str, other_ranks))} (--show-rank).")
    return FigureText(
        f"Principal angles between the {rank} largest directions of two updates",
        f"{len(drawn_layers)} {'matrix' if len(drawn_layers) == 1 else 'matrices'}; fraction of the principal angles "
        "with at most this cosine (1: common direction, 0: orthogonal)",
        (" ".join(notes),),
        _make_keys(shown, style),
    )


def find_obstacle(records: Sequence[Interference], options: Options) -> str | None:
    """Return why records cannot be drawn: the requested rank was not measured; None if they can."""
    return rank_absent(ranks_of(records), options)
