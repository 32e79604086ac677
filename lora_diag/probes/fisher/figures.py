"""`fisher`: rank correlation of predictors with the effect of truncating each layer, or the
expected cost of tails.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lora_diag.probes.fisher.record import Fisher
from lora_diag.probes.fisher.show import PREDICTORS, Correlations, correlate_predictors
from lora_diag.records.names import module_type_of
from lora_diag.rendering.figures.pages import Page, Panel
from lora_diag.rendering.figures.panels import set_loss_axis, set_measured_rank_axis, set_rank_axis
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
    PageStyle,
    category,
    log_label,
    name_of,
)

# Markers of the predictors.
MARKS = ("o", "s", "D", "v", "^")
# Tails below this fraction of the largest are rounding errors.
SMALLEST_SHOWN = 1e-5


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return panels of correlations per run; one of tails if ``per`` is not ``layer`` or too few
    layers were measured.

    Raises:
        UndrawableError: No truncation changes the loss.
    """
    if not any(max(record.fisher, default=0.0) > 0 for item in series for record in item.records):
        raise UndrawableError("no truncation changes the loss")
    by_run: list[list[Correlations]] = []
    for item in series:
        ranks = sorted({int(rank) for record in item.records for rank in record.effect or {}})
        by_run.append(correlate_predictors(item.records, ranks) if options.per == "layer" else [])
    unmeasured = [item for item, by_rank in zip(series, by_run, strict=True) if not by_rank]
    names = _name_types([record for item in unmeasured for record in item.records])
    xlabel = "rank r to which each layer is truncated"
    panels = []
    for item, by_rank in zip(series, by_run, strict=True):
        owner = owner_of(item, series)
        if not by_rank:
            draw = partial(_draw_tails, records=item.records, names=names)
            panels.append(Panel(item.label if owner else "", draw, xlabel, "½F(r) (nats)"))
            continue
        within = any(pair[1] is not None for at_rank in by_rank for pair in at_rank.kl.values())
        for index, name in enumerate(("all", "within") if within else ("all",)):
            middle = by_rank[len(by_rank) // 2]
            scope = (
                f"within module types (n = {middle.grouped})"
                if index
                else f"over all layers (n = {middle.n})"
            )
            draw = partial(_draw_rho, by_rank=by_rank, index=index)
            panels.append(
                Panel(f"{owner}{scope}", draw, xlabel, "Spearman's ρ with the KL", name=name)
            )
    alone = "Each layer is truncated alone, all others as in TUNED"
    if any(by_run):
        title = "Rank correlation of predicted and measured cost of truncating each layer alone"
        quantity = "Spearman's ρ of each predictor with the measured KL on held-out text"
        notes = [
            f"{alone}. ρ = 1: same order; 0: no correlation. Layers of one model are not "
            "independent, and with few layers small differences of ρ are not significant."
        ]
    else:
        title = "Expected cost of truncating each module type: ½F(r)"
        quantity = (
            "second-order estimate of the mean KL per prediction, summed over the layers of a type"
        )
        notes = [f"{alone}; the joint cost can differ from the sum."]
    return Page(title, panels, f"{subject_of(series)}{quantity}", notes)


def _draw_rho(ax: Axes, style: PageStyle, by_rank: Sequence[Correlations], index: int) -> None:
    """Draw ρ of each predictor over the ranks: over all layers (``index`` 0), or within module
    types (1).
    """
    ax.axhline(0, color=INK, lw=0.8 * style.line, ls=DASHED, zorder=1)
    lowest = min(
        0.0,
        *(
            rho
            for at_rank in by_rank
            for pair in at_rank.kl.values()
            for rho in pair
            if rho is not None
        ),
    )
    for (name, _), color, marker in zip(PREDICTORS, CATEGORIES, MARKS, strict=False):
        points = [
            (at_rank.rank, rho)
            for at_rank in by_rank
            if (rho := at_rank.kl[name][index]) is not None
        ]
        if points:
            line: dict[str, Any] = {"color": color, "marker": marker, "ms": 3.4 * style.line}
            width, order = (2.0, 3) if name == PREDICTORS[-1][0] else (1.2, 2)
            ax.plot(
                *zip(*points, strict=True), label=name, lw=width * style.line, zorder=order, **line
            )
    ax.set_ylim(max(-1.08, lowest - 0.15), 1.08)
    set_measured_rank_axis(ax, [at_rank.rank for at_rank in by_rank], style)
    set_loss_axis(ax)


def _name_types(records: Sequence[Fisher]) -> dict[str, str]:
    """Return the line of each module type, the largest ΣF(0) first; those beyond the number of
    colours share one.
    """
    sums: dict[str, float] = {}
    for record in records:
        kind = module_type_of(record.layer)
        sums[kind] = sums.get(kind, 0.0) + record.at(0)
    ordered = sorted(sums, key=lambda kind: -sums[kind])
    alone = len(ordered) if len(ordered) <= len(CATEGORIES) else len(CATEGORIES) - 1
    others = f"{len(ordered) - alone} other types"
    return {kind: kind if place < alone else others for place, kind in enumerate(ordered)}


def _draw_tails(
    ax: Axes, style: PageStyle, records: Sequence[Fisher], names: dict[str, str]
) -> None:
    """Draw ½F(r) summed over the layers of each line, by the names of module types."""
    ranks = range(1, max(len(record.fisher) for record in records) + 1)
    tails = {name: np.zeros(len(ranks)) for name in dict.fromkeys(names.values())}
    for record in records:
        tails[names[module_type_of(record.layer)]] += np.array(
            [record.at(rank) / 2 for rank in ranks]
        )
    smallest = SMALLEST_SHOWN * max(float(tail.max()) for tail in tails.values())
    for number, (name, tail) in enumerate(tails.items()):
        if tail.any():
            drawn = np.where(tail > 0, tail, np.nan)
            ax.plot(ranks, drawn, label=name_of(name), color=category(number), lw=1.4 * style.line)
    visible = np.concatenate([tail[tail > smallest] for tail in tails.values()])
    ax.set_yscale("log")
    ax.set_ylim(float(visible.min()) / 2, float(visible.max()) * 2)
    ax.yaxis.set_major_formatter(log_label)
    set_rank_axis(
        ax,
        max(int(np.flatnonzero(tail > smallest).max(initial=0)) for tail in tails.values()) + 1,
        style,
    )
