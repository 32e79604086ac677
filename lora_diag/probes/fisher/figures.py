"""`fisher`: rank correlation of predictors with the effect of truncating each layer, or the expected cost of tails."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_diag.probes.fisher.record import Fisher
from lora_diag.probes.fisher.show import PREDICTORS, Correlations, correlations
from lora_diag.records import Results
from lora_diag.records.names import module_type_of
from lora_diag.rendering.figures.axes import panel_axes, rank_axis
from lora_diag.rendering.figures.pages import Draw, page_of
from lora_diag.rendering.figures.panels import loss_axis, measured_axis
from lora_diag.rendering.figures.series import Options, Series, owner_of, subject_of
from lora_diag.rendering.figures.sheet import FigureText, Key
from lora_diag.rendering.figures.style import (
    CATEGORIES,
    INK,
    QUIET,
    PageStyle,
    category,
    log_label,
    name_of,
)

# Markers of the predictors.
MARKS = ("o", "s", "D", "v", "^")
# Tails below this fraction of the largest are rounding errors.
SMALLEST_SHOWN = 1e-5


def find_obstacle(records: Sequence[Fisher], options: Options) -> str | None:
    """Return why nothing can be drawn; None if it can."""
    return None if any(max(record.fisher, default=0.0) > 0 for record in records) else "no truncation changes the loss"


def fisher(
    results: Results[Any] | Iterable[Fisher], ax: Axes | None = None, *, per: str = "layer", within: bool = False
) -> Axes:
    """Draw Spearman's ρ of each predictor with the measured KL, over the ranks; or ½F(r) of each module type.

    Args:
        results: Results of ``probe fisher``, or their records.
        ax: Axes to draw on; default those of a new figure.
        per: ``layer`` for correlations over layers, if measured; ``type`` for tails of module types.
        within: Whether to compare layers within their module types only.

    Returns:
        The Axes drawn on.
    """
    records = [r for r in (results.whole if isinstance(results, Results) else results) if isinstance(r, Fisher)]
    by_rank = _correlate(records) if per == "layer" else []
    with panel_axes(ax) as (axes, style):
        inches = float(axes.get_window_extent().width) / axes.figure.dpi
        if by_rank:
            _draw_correlations(axes, by_rank, int(within), inches, style)
            axes.set_title(_make_title(by_rank, int(within)), parse_math=False, loc="left")
        else:
            _draw_tails(axes, records, _color_types(records), inches, style)
    return axes


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw panels of correlations per run, or a panel of tails if nothing was measured or ``per`` is ``type``."""
    by_run = [_correlate(item.records) if options.per == "layer" else [] for item in series]
    color_by_type = _color_types(
        [r for item, by_rank in zip(series, by_run, strict=True) if not by_rank for r in item.records]
    )
    panels: list[tuple[str, Draw]] = []
    for item, by_rank in zip(series, by_run, strict=True):
        owner = owner_of(item, series)
        if not by_rank:
            panels.append(
                (
                    item.label if owner else "",
                    partial(_draw_tails, records=item.records, color_by_type=color_by_type, style=style),
                )
            )
            continue
        within = any(pair[1] is not None for at_rank in by_rank for pair in at_rank.kl.values())
        for index in (0, 1) if within else (0,):
            title = f"{owner}{_make_title(by_rank, index)}"
            panels.append((title, partial(_draw_correlations, by_rank=by_rank, index=index, style=style)))
    return page_of(panels, _make_text(series, by_run, color_by_type, style), style)


def _correlate(records: Sequence[Fisher]) -> list[Correlations]:
    ranks = sorted({int(rank) for record in records for rank in record.effect or {}})
    return correlations(records, ranks)


def _draw_correlations(
    ax: Axes, by_rank: Sequence[Correlations], index: int, inches: float, style: PageStyle | None
) -> None:
    """Draw ρ of each predictor over the ranks: over all layers (``index`` 0), or within module types (1)."""
    width = style.line if style else 1.2
    ax.axhline(0, color=INK, lw=0.8 * width, ls=(0, (4, 2)), zorder=1)
    lowest = min(0.0, *(rho for at_rank in by_rank for pair in at_rank.kl.values() for rho in pair if rho is not None))
    for number, (name, _) in enumerate(PREDICTORS):
        points = [(at_rank.rank, rho) for at_rank in by_rank if (rho := at_rank.kl[name][index]) is not None]
        if points:
            ax.plot(*zip(*points, strict=True), label=f"_{name}", **_make_line_style(number, width))
    ax.set_ylim(max(-1.08, lowest - 0.15), 1.08)
    measured_axis(ax, [at_rank.rank for at_rank in by_rank], inches, style)
    loss_axis(ax)
    ax.set(xlabel="rank r to which each layer is truncated", ylabel="Spearman's ρ with the KL")


def _make_line_style(number: int, width: float) -> dict[str, Any]:
    last = number == len(PREDICTORS) - 1
    return {
        "color": CATEGORIES[number],
        "marker": MARKS[number],
        "ms": 3.4 * width,
        "lw": (2.0 if last else 1.2) * width,
        "zorder": 3 if last else 2,
    }


def _make_title(by_rank: Sequence[Correlations], index: int) -> str:
    """Return the title of a panel: its layers, the best predictor at the middle rank, and the next."""
    chosen = by_rank[len(by_rank) // 2]
    ranked = sorted(((pair[index], name) for name, pair in chosen.kl.items() if pair[index] is not None), reverse=True)
    n = chosen.grouped if index else chosen.n
    scope = f"{'within module types' if index else 'over all layers'} (n\xa0=\xa0{n})"
    if not ranked:
        return scope
    second = f", then {ranked[1][1]} {ranked[1][0]:.2f}" if len(ranked) > 1 else ""
    return f"{scope}, r\xa0=\xa0{chosen.rank}: {ranked[0][1]} {ranked[0][0]:.2f}{second}"


def _color_types(records: Sequence[Fisher]) -> dict[str, str]:
    """Return the colours of module types: one for each with the largest F(0); the others are grey."""
    sums: dict[str, float] = {}
    for record in records:
        kind = module_type_of(record.layer)
        sums[kind] = sums.get(kind, 0.0) + record.at(0)
    ordered = sorted(sums, key=lambda kind: -sums[kind])
    shown_types = ordered if len(ordered) <= len(CATEGORIES) else ordered[: len(CATEGORIES) - 1]
    return {kind: category(shown_types.index(kind)) if kind in shown_types else QUIET for kind in ordered}


def _draw_tails(
    ax: Axes, records: Sequence[Fisher], color_by_type: dict[str, str], inches: float, style: PageStyle | None
) -> None:
    """Draw ½F(r) summed over the layers of each type, and of all grey types together."""
    width = style.line if style else 1.2
    ax.set_yscale("log")
    longest = max(len(record.fisher) for record in records)
    ranks = np.arange(1, longest + 1)
    curves = {}
    for kind, color in color_by_type.items():
        of_type = [record for record in records if module_type_of(record.layer) == kind]
        tail = np.array([sum(record.at(int(rank)) for record in of_type) / 2 for rank in ranks])
        curves[kind] = tail
        if color != QUIET:
            ax.plot(ranks, np.where(tail > 0, tail, np.nan), color=color, lw=1.4 * width, label=f"_{kind}")
    remainder = sum((curves[kind] for kind, color in color_by_type.items() if color == QUIET), start=np.zeros(longest))
    if remainder.any():
        ax.plot(ranks, np.where(remainder > 0, remainder, np.nan), color=QUIET, lw=1.4 * width, label="_other types")
    high = max(float(tail.max()) for tail in curves.values())
    visible = np.concatenate([tail[tail > SMALLEST_SHOWN * high] for tail in (*curves.values(), remainder)])
    ax.set_ylim(float(visible.min()) / 2, max(high, float(remainder.max())) * 2)
    ax.yaxis.set_major_formatter(log_label)
    end = (
        int(max((np.flatnonzero(tail > SMALLEST_SHOWN * high).max(initial=0) for tail in curves.values()), default=0))
        + 1
    )
    rank_axis(ax, end, (), style, inches)
    ax.set(xlabel="rank r to which each layer is truncated", ylabel="½F(r) (nats)")


def _make_text(
    series: Sequence[Series[Any]],
    by_run: Sequence[Sequence[Correlations]],
    color_by_type: dict[str, str],
    style: PageStyle,
) -> FigureText:
    width = style.line
    keys, notes = [], []
    if any(by_run):
        keys = [
            Key(Line2D([], [], **_make_line_style(number, width)), name) for number, (name, _) in enumerate(PREDICTORS)
        ]
        title = "Rank correlation of predicted and measured cost of truncating each layer alone"
        notes.append("Each layer is truncated alone, all others as in TUNED. ρ = 1: same order; 0: no correlation.")
        notes.append(
            "Layers of one model are not independent, and with few layers small differences of ρ are not significant."
        )
        quantity = "Spearman's ρ of each predictor with the measured KL on held-out text"
    else:
        title = "Expected cost of truncating each module type: ½F(r)"
        quantity = "second-order estimate of the mean KL per prediction, summed over the layers of a type"
        notes.append("Each layer is truncated alone, all others as in TUNED; the joint cost can differ from the sum.")
    keys += [
        Key(Line2D([], [], color=color, lw=1.4 * width), name_of(kind))
        for kind, color in color_by_type.items()
        if color != QUIET
    ]
    if other_types := [kind for kind, color in color_by_type.items() if color == QUIET]:
        keys.append(Key(Line2D([], [], color=QUIET, lw=1.4 * width), f"{len(other_types)} other types"))
    about = subject_of(series)
    return FigureText(title, f"{about}{quantity}", (" ".join(notes),), tuple(keys))
