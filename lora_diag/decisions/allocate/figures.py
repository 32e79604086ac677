"""`allocation`: rank of each layer with that of the uniform rule, and the energy kept with its
bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lora_diag.decisions.allocate.record import Allocation, Certificate
from lora_diag.records.vocabulary import METRIC_NAMES
from lora_diag.rendering.figures.fields import count_matrices
from lora_diag.rendering.figures.pages import Page, Panel
from lora_diag.rendering.figures.panels import Slot, draw_bars, make_slots, median_of, stack_panels
from lora_diag.rendering.figures.series import Options, Series
from lora_diag.rendering.figures.style import (
    CATEGORIES,
    DASHED,
    INK,
    QUIET,
    PageStyle,
    category,
    crop_names,
    name_of,
)
from lora_diag.rendering.text import count

# Returns the height of the bar of some layers.
Rank = Callable[[Sequence[Allocation]], float | None]

BARS, UNIFORM, BOUND = CATEGORIES[0], CATEGORIES[1], INK
# Colour of the uniform rule where several runs have the colours of the categories.
OTHERS = QUIET

_BOUND_LABEL = "bound: maximum energy within the budget"
_UNITS = {
    "params": "adapter parameters Σ r (out + in)",
    "total_rank": "total rank Σ r",
    "bytes": "bytes of adapter, gradients and optimizer",
    "energy": "adapter parameters Σ r (out + in)",
}


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return a page with the ranks of the layers, and below the energy kept by rule, or of several
    runs over cost.
    """
    certificates = [
        record for run in series for record in run.whole if isinstance(record, Certificate)
    ]
    # An axis has one unit; allocations in other units are listed as not drawn.
    comparable = [item for item in certificates if item.unit == certificates[0].unit]
    runs = make_slots([run.records for run in series], options.per)
    ranks = Panel(
        "",
        partial(_draw_ranks, runs=runs, labels=[run.label for run in series]),
        ylabel="rank r",
        height=1.3 * style.panel,
    )
    panels = stack_panels([ranks], runs, style)
    if comparable:
        bars = (len(comparable[0].baselines) + 1) * 1.6 * style.text / 72
        height = (1.3 * style.panel if len(comparable) > 1 else bars) + 3.5 * style.text / 72
        draw = partial(_draw_kept, certificates=comparable)
        panels.append(Panel("", draw, height=height, name="energy"))
    about = count_matrices([record for run in series for record in run.records])
    if len(comparable) == 1:
        (only,) = comparable
        best = only.optimal or only.gap == 0
        gap = "the optimum" if best else f"at most {only.gap:.2%} below the optimum"
        about += f"; {only.params:,} parameters keep {only.kept:.1%} of the energy, {gap}"
    notes = _list_notes(series, max((slot.joined for slots in runs for slot in slots), default=1))
    if other_units := len(certificates) - len(comparable):
        notes.append(f"Not drawn: {other_units} with a budget in another unit.")
    title = "Allocation: rank r by layer, and the energy kept"
    return Page(title, panels, about, notes, columns=1, low=True)


def _list_notes(series: Sequence[Series[Any]], joined: int) -> list[str]:
    """Return the notes on the metric, on bars of up to ``joined`` layers, and on weights."""
    metrics = {run.run.settings.get("metric", "weights") for run in series if run.run}
    metric = ""
    if metrics - {"weights"}:
        metric = ", in " + " and ".join(METRIC_NAMES[metric] for metric in sorted(metrics))
    notes = [
        f"Energy is Σσ² as measured{metric}; blocks run from left to right in each module type."
    ]
    if joined > 1:
        notes.append(f"A bar is the median rank of up to {joined} layers.")
    if any(record.weight != 1 for run in series for record in run.records):
        notes.append("Fractions are of the weighted energy.")
    return notes


def _draw_ranks(
    ax: Axes, style: PageStyle, runs: Sequence[Sequence[Slot[Allocation]]], labels: Sequence[str]
) -> None:
    """Draw the ranks of each run by slot; of a single run also those of the uniform rule."""
    rank_of: Rank = median_of(lambda record: record.rank)
    if len(runs) == 1:
        [slots] = runs
        draw_bars(
            ax, slots, rank_of, label="rank allocated", color=BARS, fill=True, baseline=0, lw=0
        )
        uniform: Rank = median_of(lambda record: record.uniform_rank)
        label = "uniform rule, same budget"
        draw_bars(ax, slots, uniform, label=label, color=UNIFORM, lw=1.3 * style.line)
    else:
        for number, (slots, label) in enumerate(zip(runs, labels, strict=True)):
            color = category(number)
            draw_bars(ax, slots, rank_of, label=label, color=color, lw=1.5 * style.line)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _draw_kept(ax: Axes, style: PageStyle, certificates: Sequence[Certificate]) -> None:
    """Draw the energy kept: of one allocation rule by rule, of several over their cost."""
    if len(certificates) == 1:
        _draw_rules(ax, style, certificates[0])
    else:
        _draw_over_cost(ax, style, certificates)


def _draw_rules(ax: Axes, style: PageStyle, certificate: Certificate) -> None:
    """Draw one bar per rule with its energy and cost, and the upper bound."""
    rules = [("this allocation", certificate.kept, _cost_of(certificate), BARS)]
    rules += [
        (name_of(rule.name), rule.kept, rule.spent, UNIFORM) for rule in certificate.baselines
    ]
    short = crop_names([name for name, *_ in rules], 24)
    scale = max(certificate.bound, *(kept for _, kept, *_ in rules)) or 1.0
    ax.set_xlim(0, scale / 0.7)
    for position, (_, kept, spent, color) in enumerate(rules):
        ax.barh(position, kept, height=0.66, color=color, lw=0)
        # Right of all bars and of the bound.
        text, place = f"{kept:.1%} ({count(round(spent))})", (scale, position)
        ax.annotate(
            text, place, xytext=(4, 0), textcoords="offset points", size=style.ticks, va="center"
        )
    ax.axvline(certificate.bound, color=BOUND, lw=style.line, ls=DASHED, label=_BOUND_LABEL)
    names = [short[name] for name, *_ in rules]
    ax.set_yticks(range(len(rules)), names, parse_math=False, size=style.ticks)
    ax.set_ylim(len(rules) - 0.4, -0.6)
    ax.set_xlabel(f"energy fraction kept (and {_UNITS[certificate.unit]})")
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, scale)
    ax.set_xticks([tick for tick in ticks if tick <= scale])


def _draw_over_cost(ax: Axes, style: PageStyle, certificates: Sequence[Certificate]) -> None:
    """Draw the bound over the budget, and the energy kept by allocations and by the uniform rule
    over their cost.
    """
    width = style.line
    ordered = sorted(certificates, key=_cost_of)
    limits = [_limit_of(item) for item in ordered]
    bounds = [item.bound for item in ordered]
    ax.plot(limits, bounds, color=BOUND, lw=width, ls=DASHED, label=_BOUND_LABEL)
    line: dict[str, Any] = {"lw": 1.2 * width, "ms": 4.5 * width}
    uniform = [item.uniform for item in ordered if item.uniform is not None]
    uniform_costs = [rule.spent for rule in uniform]
    uniform_kept = [rule.kept for rule in uniform]
    if uniform:
        label = "kept by the uniform rule"
        ax.plot(uniform_costs, uniform_kept, color=OTHERS, marker="s", label=label, **line)
    costs = [_cost_of(item) for item in ordered]
    kept = [item.kept for item in ordered]
    ax.plot(costs, kept, color=INK, marker="o", label="kept by the allocation", **line)
    ax.set_xlim(0, 1.06 * max([*limits, *uniform_costs]))
    ax.set_ylim(0, min(1.02, 1.15 * max([*bounds, *uniform_kept])))
    ax.set(xlabel=_UNITS[ordered[0].unit], ylabel="energy kept")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.xaxis.set_major_formatter(lambda value, _: count(round(value)))


def _limit_of(certificate: Certificate) -> float:
    """Return the budget of an allocation, or its cost for an energy fraction."""
    if certificate.budget is None or certificate.unit == "energy":
        return _cost_of(certificate)
    return certificate.budget


def _cost_of(certificate: Certificate) -> float:
    """Return the cost of an allocation in the unit of the axis: parameters for an
    energy fraction.
    """
    return float(certificate.params) if certificate.unit == "energy" else certificate.spent
