"""Figure of ``overlap``: fraction of the gradients in an update's subspaces over the steps, with random baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.rendering.figures.fields import Types, count_matrices
from lora_diag.rendering.figures.pages import MAX_PANELS, Key, Page, Panel, add_legend, key, panel_axes, run_keys
from lora_diag.rendering.figures.panels import label_ticks
from lora_diag.rendering.figures.series import Options, Series, choose_rank
from lora_diag.rendering.figures.style import CATEGORIES, DOTTED, INK, QUIET, PageStyle, category

# The measures drawn: name, field, field of the baseline, colour, and dashes for when colours distinguish runs.
MEASURES = (
    ("κ", "kappa", "kappa_random", CATEGORIES[0], (0, ())),
    ("tangent", "tangent", "tangent_random", CATEGORIES[1], (0, (3, 1.2))),
)

# Maximum number of layers with a line each in a panel; more are drawn as their range.
SINGLE = 16


@dataclass(frozen=True, slots=True)
class StepCurve:
    """A measure over the steps, for a set of layers.

    Args:
        steps: Steps of the gradients.
        middle: Median over the layers.
        low: Smallest value of a layer.
        high: Largest value of a layer.
        random: Median of the random baseline.
    """

    steps: NDArray[np.int64]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    random: NDArray[np.float64]


def curve_over_steps(records: Sequence[Overlap], field: str, baseline_field: str) -> StepCurve:
    """Return a measure over the steps at which any layer has it."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for record in records:
        if (value := getattr(record, field)) is not None:
            by_step.setdefault(record.step, []).append((value, getattr(record, baseline_field)))
    steps = sorted(by_step)
    values = [np.array(by_step[step]) for step in steps]
    middles = np.array([np.median(pairs, axis=0) for pairs in values]).reshape(-1, 2)
    low, high = (np.array([pool(pairs[:, 0]) for pairs in values]) for pool in (np.min, np.max))
    return StepCurve(np.array(steps, dtype=np.int64), middles[:, 0], low, high, middles[:, 1])


def overlap(records: Iterable[Overlap], ax: Axes | None = None, *, rank: int | None = None, per: str = "layer") -> Axes:
    """Draw κ = ‖UᵀGV‖_F / ‖G‖_F and the tangent overlap ‖P_T G‖_F / ‖G‖_F over the steps, with their baselines.

    Args:
        records: Records of ``overlap``.
        ax: Axes to draw on; default those of a new figure.
        rank: Rank of the subspaces; default 8 if measured, else the smallest.
        per: ``layer`` for a thin line per layer, or their range if there are more than 16; ``type`` for their range.
            The thick line is their median.

    Returns:
        The Axes drawn on.

    Raises:
        UndrawableError: The rank was not measured.
    """
    records = tuple(records)
    rank = choose_rank({record.rank for record in records}, Options(rank=rank))
    shown = (Series("", tuple(record for record in records if record.rank == rank)),)
    with panel_axes(ax) as (axes, style):
        _draw(axes, style, shown, per)
        axes.set(xlabel="training step", ylabel=f"fraction of ‖G‖_F, r = {rank}")
        add_legend(axes, _make_keys(shown, per, style))
    return axes


def make_page(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Page:
    """Return the page of κ and tangent, one panel per module type, up to ``MAX_PANELS``."""
    ranks = {record.rank for item in series for record in item.records}
    rank = choose_rank(ranks, options)
    shown = [replace(item, records=tuple(r for r in item.records if r.rank == rank)) for item in series]
    records = [record for item in shown for record in item.records]
    types = Types(record.layer for record in records)
    draw = partial(_draw, per=options.per, top=_choose_top(records), steps={record.step for record in records})
    ylabel = "fraction of ‖G‖_F" if len(types.names) <= style.columns else "fraction"
    panels = []
    for name in types.names[:MAX_PANELS]:
        part = [replace(item, records=tuple(r for r in item.records if types.of(r.layer) == name)) for item in shown]
        panels.append(Panel(name, partial(draw, series=part), "training step", ylabel))
    prefix = f"{series[0].label}: " if len(series) == 1 and series[0].label else ""
    others = ", ".join(map(str, sorted(ranks - {rank})))
    zero = sum(record.kappa is None for record in records)
    more = len(types.names) - len(panels)
    return Page(
        f"Overlap of gradients with the update's rank-{rank} subspaces: κ and tangent",
        panels,
        f"{prefix}{count_matrices(records)}; κ\xa0=\xa0‖UᵀGV‖_F\xa0/\xa0‖G‖_F, "
        "tangent\xa0=\xa0‖P_T\xa0G‖_F\xa0/\xa0‖G‖_F",
        [
            f"Also measured, not drawn: r = {others} (--show-rank)." if others else "",
            f"Not drawn: {more} more module types (--layers)." if more else "",
            f"Not drawn: {zero} zero gradients." if zero else "",
        ],
        _make_keys(shown, options.per, style, types),
        share=True,
    )


def _draw(
    ax: Axes,
    style: PageStyle,
    series: Sequence[Series[Overlap]],
    per: str,
    top: float | None = None,
    steps: Collection[int] = (),
) -> None:
    """Draw the measures of each run with their baselines.

    Args:
        ax: Axes to draw on.
        style: The page, of the panel's width.
        series: The records of each run, at one rank.
        per: ``layer`` for up to ``SINGLE`` single layers, ``type`` for their range; of several runs only the median.
        top: Upper limit of the fractions; default by these records.
        steps: Steps of all panels; default by these records.
    """
    single, width = len(series) == 1, style.line
    for number, item in enumerate(series):
        layers = list(dict.fromkeys(record.layer for record in item.records))
        as_range = per == "type" or len(layers) > SINGLE
        for name, field, baseline_field, measure_color, dashes in MEASURES:
            curve = curve_over_steps(item.records, field, baseline_field)
            if not len(curve.steps):
                continue
            color = measure_color if single else category(number)
            if single and as_range:
                ax.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.2, lw=0)
            for layer in layers if single and not as_range else ():
                one = curve_over_steps([r for r in item.records if r.layer == layer], field, baseline_field)
                thin: dict[str, Any] = {"color": color, "lw": 0.5 * width, "alpha": 0.45}
                ax.plot(one.steps, one.middle, label=f"_{name} of {layer}", **thin)
            line: dict[str, Any] = {"lw": 1.5 * width, "ls": "-" if single else dashes}
            ax.plot(curve.steps, curve.middle, label=f"_{name}", color=color, marker="o", ms=2.6 * width, **line)
            single_step = len(curve.steps) == 1
            baseline: dict[str, Any] = (
                {"marker": "_", "ms": 6 * width} if single_step else {"lw": 0.9 * width, "ls": DOTTED}
            )
            ax.plot(curve.steps, curve.random, label=f"_random {name}", color=color, **baseline)
    records = [record for item in series for record in item.records]
    ax.set_ylim(0, _choose_top(records) if top is None else top)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    ordered = sorted(steps or {record.step for record in records})
    margin = 0.06 * (ordered[-1] - ordered[0]) or 1
    ax.set_xlim(ordered[0] - margin, ordered[-1] + margin)
    label_ticks(ax, (ordered[0], ordered[-1], *ordered), style)


def _choose_top(records: Sequence[Overlap]) -> float:
    """Return the upper limit of the y axis: above all values and baselines."""
    values = [value for record in records for value in (record.kappa, record.tangent) if value is not None]
    return min(1.02, 1.08 * max([*values, *(record.tangent_random for record in records)], default=1.0) or 1.0)


def _make_keys(series: Sequence[Series[Overlap]], per: str, style: PageStyle, types: Types | None = None) -> list[Key]:
    """Return the legend entries of a page with one panel per module type; without types, of a single panel."""
    width, single = style.line, len(series) == 1
    keys = run_keys(series, lw=2 * width)
    for name, _, _, color, dashes in MEASURES:
        line: dict[str, Any] = {"color": color} if single else {"color": INK, "ls": dashes}
        keys.append(key(f"{name}, median layer", lw=1.5 * width, **line))
    if single:
        layers = {record.layer for record in series[0].records}
        most = max(Counter(types.of(layer) if types else "" for layer in layers).values())
        description, thick = ("range of the layers", 4.0) if per == "type" or most > SINGLE else ("single layers", 0.5)
        keys.append(key(description, color=QUIET, lw=thick * width, alpha=0.4))
    return [*keys, key("random subspaces", color=QUIET, lw=1.2 * width, ls=DOTTED)]
