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
    unmeasured: list[Fisher] = []
    for item in series:
        found: list[Correlations] = []
        if options.per == "layer":
            ranks = sorted({int(rank) for record in item.records for rank in record.effect or {}})
            found = correlate_predictors(item.records, ranks)
        by_run.append(found)
        if not found:
            unmeasured += item.records
    names = _name_types(unmeasured)
    xlabel = "rank r to which each layer is truncated"
    panels = []
    for item, by_rank in zip(series, by_run, strict=True):
        owner = owner_of(item, series)
        if not by_rank:
            draw = partial(_draw_tails, records=item.records, names=names)
            panels.append(Panel(item.label if owner else "", draw, xlabel, "½F(r) (nats)"))
            continue
        middle = by_rank[len(by_rank) // 2]
        scopes = [("all", f"over all layers (n = {middle.n})")]
        if any(pair[1] is not None for at_rank in by_rank for pair in at_rank.kl.values()):
            scopes.append(("within", f"within module types (n = {middle.grouped})"))
        for index, (name, scope) in enumerate(scopes):
            draw = partial(_draw_rho, by_rank=by_rank, index=index)
            title = f"{owner}{scope}"
            panels.append(Panel(title, draw, xlabel, "Spearman's ρ with the KL", name=name))
    note = "Each layer is truncated alone, all others as in TUNED"
    if any(by_run):
        title = "Rank correlation of predicted and measured cost of truncating each layer alone"
        quantity = "Spearman's ρ of each predictor with the measured KL on held-out text"
        note += (
            ". ρ = 1: same order; 0: no correlation. Layers of one model are not independent, and "
            "with few layers small differences of ρ are not significant."
        )
    else:
        title = "Expected cost of truncating each module type: ½F(r)"
        quantity = (
            "second-order estimate of the mean KL per prediction, summed over the layers of a type"
        )
        note += "; the joint cost can differ from the sum."
    return Page(title, panels, f"{subject_of(series)}{quantity}", [note])


def _draw_rho(ax: Axes, style: PageStyle, by_rank: Sequence[Correlations], index: int) -> None:
    """Draw ρ of each predictor over the ranks: over all layers (``index`` 0), or within module
    types (1).
    """
    ax.axhline(0, color=INK, lw=0.8 * style.line, ls=DASHED, zorder=1)
    pairs = [pair for at_rank in by_rank for pair in at_rank.kl.values()]
    lowest = min(rho or 0.0 for pair in pairs for rho in pair)
    for (name, _), color, marker in zip(PREDICTORS, CATEGORIES, MARKS, strict=False):
        points = [
            (at_rank.rank, rho)
            for at_rank in by_rank
            if (rho := at_rank.kl[name][index]) is not None
        ]
        if points:
            line: dict[str, Any] = {"color": color, "marker": marker, "ms": 3.4 * style.line}
            width, order = (2.0, 3) if name == PREDICTORS[-1][0] else (1.2, 2)
            line |= {"label": name, "lw": width * style.line, "zorder": order}
            ax.plot(*zip(*points, strict=True), **line)
    ax.set_ylim(max(-1.08, min(0.0, lowest) - 0.15), 1.08)
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
    tails = {name: np.zeros(len(ranks)) for name in names.values()}
    for record in records:
        name = names[module_type_of(record.layer)]
        tails[name] += np.array([record.at(rank) / 2 for rank in ranks])
    for number, (name, tail) in enumerate(tails.items()):
        if tail.any():
            drawn = np.where(tail > 0, tail, np.nan)
            ax.plot(ranks, drawn, label=name_of(name), color=category(number), lw=1.4 * style.line)
    curves = np.stack(list(tails.values()))
    is_visible = curves > SMALLEST_SHOWN * curves.max()
    visible = curves[is_visible]
    ax.set_yscale("log")
    ax.set_ylim(float(visible.min()) / 2, float(visible.max()) * 2)
    ax.yaxis.set_major_formatter(log_label)
    set_rank_axis(ax, int(np.nonzero(is_visible)[1].max()) + 1, style)
