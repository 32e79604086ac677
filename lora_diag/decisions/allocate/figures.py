"""`allocation`: rank of each layer with that of the uniform rule, and the energy kept with its bound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lora_diag.decisions.allocate.record import Allocation, Certificate
from lora_diag.records.vocabulary import METRIC_NAMES
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.fields import Types
from lora_diag.rendering.figures.panels import Slot, label_height, make_slots, slot_axis
from lora_diag.rendering.figures.series import Options, Series
from lora_diag.rendering.figures.sheet import FigureText, Key, sheet
from lora_diag.rendering.figures.style import CATEGORIES, INK, QUIET, PageStyle, category, cut, name_of, width_of

BARS, UNIFORM, BOUND = CATEGORIES[0], CATEGORIES[1], INK
# Colour of the uniform rule where several runs have the colours of the categories.
OTHERS = QUIET

_UNITS = {
    "params": "adapter parameters Σ r (out + in)",
    "total_rank": "total rank Σ r",
    "bytes": "bytes of adapter, gradients and optimizer",
    "energy": "adapter parameters Σ r (out + in)",
}


def allocation(records: Iterable[Allocation], ax: Axes | None = None, *, per: str = "layer") -> Axes:
    """Draw the rank of each layer as bars, and that of the uniform rule as a line.

    Args:
        records: Records of ``allocate``.
        ax: Axes to draw on; default those of a new figure.
        per: ``layer`` for one bar per layer (median over the experts of a block), ``type`` for one bar per module type.

    Returns:
        The Axes drawn on.
    """
    records = tuple(records)
    with panel_axes(ax) as (axes, style):
        slots = make_slots(records, per)
        _draw_ranks(axes, [slots], style)
        slot_axis(axes, slots, float(axes.get_window_extent().width) / axes.figure.dpi, style.ticks if style else 9)
        axes.set_ylabel("rank r")
        axes.legend([Patch(facecolor=BARS), Line2D([], [], color=UNIFORM)], ["allocated", "uniform"], fontsize="small")
    return axes


def budget(certificates: Sequence[Certificate], ax: Axes | None = None) -> Axes:
    """Draw the energy fraction of an allocation with other rules and the bound; of several, over their cost.

    Args:
        certificates: Certificates of one allocation, or of several for the same update with budgets in one unit.
        ax: Axes to draw on; default those of a new figure.

    Returns:
        The Axes drawn on.
    """
    with panel_axes(ax) as (axes, style):
        _draw_kept(axes, certificates, style, float(axes.get_window_extent().width) / axes.figure.dpi)
        legend_keys = _make_budget_keys(certificates, style)
        axes.legend([entry.handle for entry in legend_keys], [entry.label for entry in legend_keys], fontsize="small")
    return axes


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw the ranks of the layers, and below the energy kept by each rule, or over the cost."""
    types = Types(record.layer for run in series for record in run.records)
    certificates = [certificate for run in series for certificate in run.whole if isinstance(certificate, Certificate)]
    # An axis has one unit; allocations in other units are listed as not drawn.
    comparable = [certificate for certificate in certificates if certificate.unit == certificates[0].unit]
    run_slots = [make_slots(run.records, options.per, types) for run in series]
    text = _make_text(series, run_slots, comparable, len(certificates) - len(comparable), style)
    inches = style.width - 6 * style.text / 72
    all_slots = list({slot.name: slot for slots in run_slots for slot in slots}.values())
    heights = [1.3 * style.panel + label_height(all_slots, inches, style.ticks)]
    if comparable:
        bars_height = (len(comparable[0].baselines) + 1) * 1.6 * style.text / 72
        heights.append((1.3 * style.panel if len(comparable) > 1 else bars_height) + 3.5 * style.text / 72)
    panel = sum(heights) / len(heights)
    figure, axes = sheet(style, text, len(heights), 1, panel=panel, ratios=heights, share=False, low=True)
    _draw_ranks(axes[0], run_slots, style)
    slot_axis(axes[0], all_slots, inches, style.ticks)
    axes[0].set_ylabel("rank r")
    if comparable:
        _draw_kept(axes[1], comparable, style, inches)
    return figure


def _draw_ranks(ax: Axes, run_slots: Sequence[Sequence[Slot[Allocation]]], style: PageStyle | None) -> None:
    """Draw the ranks of each run by slot; of a single run also those of the uniform rule."""
    width = style.line if style else 1.2
    for number, slots in enumerate(run_slots):
        for slot in slots:
            ranks = np.array([float(np.median([record.rank for record in bar])) for bar in slot.bars])
            if len(run_slots) > 1:
                ax.stairs(ranks, slot.edges, baseline=None, color=category(number), lw=1.5 * width, label="_ranks")
                continue
            uniform = np.array([float(np.median([record.uniform_rank for record in bar])) for bar in slot.bars])
            ax.stairs(ranks, slot.edges, fill=True, color=BARS, lw=0, label="_ranks")
            ax.stairs(uniform, slot.edges, baseline=None, color=UNIFORM, lw=1.3 * width, label="_uniform")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _draw_kept(ax: Axes, certificates: Sequence[Certificate], style: PageStyle | None, inches: float) -> None:
    """Draw the energy kept: of one allocation rule by rule, of several over their cost."""
    if len(certificates) == 1:
        _draw_rules(ax, certificates[0], style, inches)
    else:
        _draw_over_cost(ax, certificates, style)


def _draw_rules(ax: Axes, certificate: Certificate, style: PageStyle | None, inches: float) -> None:
    """Draw one bar per rule with its energy and cost, and the upper bound."""
    rules = [("this allocation", certificate.kept, _cost_of(certificate), BARS)]
    rules += [(name_of(rule.name), rule.kept, rule.spent, UNIFORM) for rule in certificate.baselines]
    size = style.ticks if style else 8
    max_width = 0.62 * inches
    labels = []
    for name, kept, spent, _ in rules:
        suffix = f": {kept:.1%} ({_format_count(spent)})"
        labels.append(cut(name, max_width - width_of(suffix, size), size) + suffix)
    # The labels start right of the bound; the bars use the remaining width.
    pad = 0.6 * size / 72
    needed = max(width_of(label, size) for label in labels) + 2 * pad
    scale = max(certificate.bound, *(kept for _, kept, *_ in rules)) or 1.0
    ax.set_xlim(0, scale * inches / max(inches - needed, 0.2 * inches))
    for position, (label, (_, kept, _, color)) in enumerate(zip(labels, rules, strict=True)):
        ax.barh(position, kept, height=0.66, color=color, lw=0)
        ax.annotate(
            label,
            (scale, position),
            xytext=(72 * pad, 0),
            textcoords="offset points",
            va="center",
            size=size,
            parse_math=False,
        )
    ax.axvline(certificate.bound, color=BOUND, lw=style.line if style else 1.2, ls=(0, (4, 2)), label="_bound")
    ax.set_yticks([])
    ax.set_ylim(len(rules) - 0.4, -0.6)
    ax.set_xlabel(f"energy fraction kept (and {_UNITS[certificate.unit]})")
    ax.set_xticks([tick for tick in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, scale) if tick <= scale])


def _draw_over_cost(ax: Axes, certificates: Sequence[Certificate], style: PageStyle | None) -> None:
    """Draw the bound over the budget, and the energy kept by allocations and by the uniform rule over their cost."""
    width = style.line if style else 1.2
    ordered = sorted(certificates, key=_cost_of)
    limits = [item.budget if item.budget is not None and item.unit != "energy" else _cost_of(item) for item in ordered]
    uniform = [(rule.spent, rule.kept) for item in ordered if (rule := item.uniform) is not None]
    ax.plot(limits, [item.bound for item in ordered], color=BOUND, lw=width, ls=(0, (4, 2)), label="_bound")
    for points, color, marker, name in (
        (uniform, OTHERS, "s", "_uniform"),
        ([(_cost_of(item), item.kept) for item in ordered], INK, "o", "_kept"),
    ):
        if points:
            ax.plot(*zip(*points, strict=True), color=color, marker=marker, lw=1.2 * width, ms=4.5 * width, label=name)
    ax.set_xlim(0, 1.06 * max([*limits, *(x for x, _ in uniform)]))
    ax.set_ylim(0, min(1.02, 1.15 * max([*(item.bound for item in ordered), *(y for _, y in uniform)])))
    ax.set_xlabel(_UNITS[ordered[0].unit])
    ax.set_ylabel("energy kept")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.xaxis.set_major_formatter(lambda value, _: _format_count(value))


def _cost_of(certificate: Certificate) -> float:
    """Return the cost of an allocation in the unit of the axis: parameters for an energy fraction."""
    return float(certificate.params) if certificate.unit == "energy" else certificate.spent


def _format_count(value: float) -> str:
    """Return an amount in a short form for an axis.

    >>> _format_count(40), _format_count(12_500), _format_count(2_000_000), _format_count(3.2e9)
    ('40', '12.5k', '2M', '3.2G')
    """
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if unit == 'k' else factor):.4g}{unit}"
    return f"{value:.4g}"


def _make_budget_keys(certificates: Sequence[Certificate], style: PageStyle | None) -> tuple[Key, ...]:
    width = style.line if style else 1.2
    bound = Key(Line2D([], [], color=BOUND, lw=width, ls=(0, (4, 2))), "bound: maximum energy within the budget")
    if len(certificates) == 1:
        return (bound,)
    kept = Line2D([], [], color=INK, marker="o", ms=4.5 * width, lw=1.2 * width)
    uniform = Line2D([], [], color=OTHERS, marker="s", ms=4.5 * width, lw=1.2 * width)
    return Key(kept, "kept by the allocation"), Key(uniform, "kept by the uniform rule"), bound


def _make_text(
    series: Sequence[Series[Any]],
    run_slots: Sequence[Sequence[Slot[Allocation]]],
    certificates: Sequence[Certificate],
    not_drawn: int,
    style: PageStyle,
) -> FigureText:
    keys: list[Key] = []
    if len(series) == 1:
        keys.append(Key(Patch(facecolor=BARS), "rank allocated"))
        keys.append(Key(Line2D([], [], color=UNIFORM, lw=1.3 * style.line), "uniform rule, same budget"))
    else:
        keys += [Key(Line2D([], [], color=category(n), lw=1.5 * style.line), run.label) for n, run in enumerate(series)]
    records = [record for run in series for record in run.records]
    layers = len({record.layer for record in records})
    about = f"{layers} {'matrix' if layers == 1 else 'matrices'}"
    if len(certificates) == 1:
        (certificate,) = certificates
        gap = (
            "the optimum"
            if certificate.optimal or certificate.gap == 0
            else f"at most {certificate.gap:.2%} below the optimum"
        )
        about += f"; {certificate.params:,} parameters keep {certificate.kept:.1%} of the energy, {gap}"
    metrics = {run.run.settings.get("metric", "weights") if run.run else "weights" for run in series}
    metric_name = " and ".join(METRIC_NAMES[metric] for metric in sorted(metrics)) if metrics != {"weights"} else ""
    notes = [
        f"Energy is Σσ² as measured{f', in {metric_name}' if metric_name else ''}; "
        "blocks run from left to right in each module type."
    ]
    joined = max((slot.joined for slots in run_slots for slot in slots), default=1)
    if joined > 1:
        notes.append(f"A bar is the median rank of up to {joined} layers.")
    if any(record.weight != 1 for record in records):
        notes.append("Fractions are of the weighted energy.")
    if not_drawn:
        notes.append(
            f"Not drawn: {not_drawn} {'certificate' if not_drawn == 1 else 'certificates'} "
            "with a budget in another unit."
        )
    return FigureText(
        "Allocation: rank r by layer, and the energy kept",
        about,
        (" ".join(notes),),
        (*keys, *(_make_budget_keys(certificates, style) if certificates else ())),
    )
