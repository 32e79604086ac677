"""`angles`: principal angles between the spaces of two updates, with the distribution of random spaces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from lora_diag.diagnostics.interference.record import Interference
from lora_diag.metrics.angles import random_angles
from lora_diag.records import Agreement
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.series import Options, Series, by_pair, rank_absent
from lora_diag.rendering.figures.sheet import FigureText, Key, sheet
from lora_diag.rendering.figures.style import CATEGORIES, INK, PageStyle, category

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
    chosen = chosen_rank([record for item in series for record in item.records], rank)
    with panel_axes(ax) as (axes, style):
        _draw(axes, series, side, chosen, style)
        axes.set(xlabel="cosine of a principal angle", ylabel=f"fraction of the angles, r = {chosen}")
        keys = _make_keys(series, style)
        axes.legend([key.handle for key in keys], [key.label for key in keys], fontsize="small")
    return axes


def chosen_rank(records: Sequence[Interference], rank: int | None) -> int:
    """Return the rank that is drawn."""
    ranks = ranks_of(records)
    return rank if rank is not None else 8 if 8 in ranks else ranks[0]


def ranks_of(records: Iterable[Interference]) -> list[int]:
    """Return the ranks at which spaces were compared."""
    return sorted({int(rank) for record in records for rank in record.columns})


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw the angles of the column spaces and of the row spaces, one panel each."""
    pairs = by_pair(series)
    all_records = [record for item in pairs for record in item.records]
    rank = chosen_rank(all_records, options.rank)
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
        values = [(record, getattr(record, side)[str(rank)]) for record in item.records if str(rank) in record.columns]
        if not values:
            continue
        cosines, shares = cumulative_distribution([cosine for _, space in values for cosine in space.cosines])
        ax.plot(cosines, shares, color=category(number), lw=1.5 * width, drawstyle="steps-post", label=f"_{item.label}")
        grid = np.linspace(0.0, 1.0, 201)
        chance = by_chance(grid, [(space, record.shape[side == "rows"]) for record, space in values])
        ax.plot(grid, chance, color=category(number), lw=width, ls=(0, (1, 1.5)), label=f"_random {item.label}")
    ax.set_xlim(0, 1.02)
    ax.set_ylim(0, 1.03)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])


def cumulative_distribution(values: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the cumulative distribution of values in [0, 1] as the corners of its steps, from (0, 0) to (1, 1)."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    kept = np.unique(np.linspace(0, len(ordered) - 1, min(POINTS, len(ordered))).round().astype(np.int64))
    return np.concatenate([[0.0], ordered[kept], [1.0]]), np.concatenate([[0.0], shares[kept], [1.0]])


def by_chance(grid: NDArray[np.float64], spaces: Sequence[tuple[Agreement, int]]) -> NDArray[np.float64]:
    """Return the cumulative distribution, at ``grid``, of the cosines of random spaces of the measured dimensions."""
    sizes = Counter(
        (len(space.cosines), round(space.random * dimension), dimension) for space, dimension in spaces if space.cosines
    )
    angles_of = {size: times * size[0] for size, times in sizes.items()}
    total = sum(angles_of.values())
    mixed = np.zeros_like(grid)
    for (first, second, dimension), number in angles_of.items():
        mixed += number / total * random_angles(grid, first, second, dimension)
    return mixed


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
    drawn = {record.layer for record in records if str(rank) in record.columns}
    notes = ["The further a curve is to the right of its dotted line, the more two updates have in common."]
    if missing := len(pairs) - len(shown):
        notes.append(f"Not drawn: {missing} pairs with less in common.")
    if small := len({record.layer for record in records} - drawn):
        notes.append(f"Not drawn: {small} {'layer' if small == 1 else 'layers'} without {rank} directions.")
    if others := [other_rank for other_rank in ranks_of(records) if other_rank != rank]:
        notes.append(f"Also measured: r = {', '.join(map(str, others))} (--show-rank).")
    return FigureText(
        f"Principal angles between the {rank} largest directions of two updates",
        f"{len(drawn)} {'matrix' if len(drawn) == 1 else 'matrices'}; fraction of the principal angles with at most "
        "this cosine (1: common direction, 0: orthogonal)",
        (" ".join(notes),),
        _make_keys(shown, style),
    )


def find_obstacle(records: Sequence[Interference], options: Options) -> str | None:
    """Return why records cannot be drawn: the requested rank was not measured."""
    return rank_absent(ranks_of(records), options)
