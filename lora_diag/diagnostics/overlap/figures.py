"""`overlap`: fraction of the gradients in an update's subspaces, step by step, with random baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.rendering.figures.axes import label_ticks, panel_axes
from lora_diag.rendering.figures.fields import Types
from lora_diag.rendering.figures.pages import multiples_of
from lora_diag.rendering.figures.series import Options, Series, rank_absent
from lora_diag.rendering.figures.sheet import MAX_PANELS, FigureText, Key
from lora_diag.rendering.figures.style import CATEGORIES, INK, QUIET, PageStyle, category

# The measures drawn: name, field, field of the baseline, colour, and dashes for when colours distinguish runs.
MEASURES = (
    ("κ", "kappa", "kappa_random", CATEGORIES[0], (0, ())),
    ("tangent", "tangent", "tangent_random", CATEGORIES[1], (0, (3, 1.2))),
)

# Maximum number of lines of a panel; more are drawn as their range.
SINGLE = 16


@dataclass(frozen=True, slots=True)
class StepCurve:
    """A measure over the steps, for a set of layers.

    Args:
        steps: Steps of the gradients.
        middle: Median over the layers.
        low: Smallest.
        high: Largest.
        random: Median of the random baseline.
    """

    steps: NDArray[np.int64]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    random: NDArray[np.float64]


def curve_over_steps(records: Sequence[Overlap], field: str, baseline_field: str) -> StepCurve:
    """Return a measure over the steps at which any layer has it."""
    values_by_step: dict[int, list[float]] = {}
    baseline_by_step: dict[int, list[float]] = {}
    for record in records:
        if (value := getattr(record, field)) is not None:
            values_by_step.setdefault(record.step, []).append(value)
            baseline_by_step.setdefault(record.step, []).append(getattr(record, baseline_field))
    steps = sorted(values_by_step)

    def pool_steps(pool: Callable[[list[float]], Any], numbers_by_step: dict[int, list[float]]) -> NDArray[np.float64]:
        return np.array([float(pool(numbers_by_step[step])) for step in steps])

    return StepCurve(
        np.array(steps, dtype=np.int64),
        pool_steps(np.median, values_by_step),
        pool_steps(min, values_by_step),
        pool_steps(max, values_by_step),
        pool_steps(np.median, baseline_by_step),
    )


def overlap(records: Iterable[Overlap], ax: Axes | None = None, *, rank: int | None = None, per: str = "layer") -> Axes:
    """Draw κ = ‖UᵀGV‖_F / ‖G‖_F and the tangent overlap ‖P_T G‖_F / ‖G‖_F over the steps, with their baselines.

    Args:
        records: Records of ``overlap``.
        ax: Axes to draw on; default those of a new figure.
        rank: Rank of the subspaces; default 8 if measured, else the smallest.
        per: ``layer`` for a thin line per layer (up to 16), ``type`` for their range; the thick line is their median.

    Returns:
        The Axes drawn on.
    """
    records = tuple(records)
    drawn_rank = choose_rank(records, rank)
    shown = tuple(record for record in records if record.rank == drawn_rank)
    with panel_axes(ax) as (axes, style):
        _draw(axes, (Series("", shown),), per, style)
        steps = sorted({record.step for record in shown})
        _set_step_axis(axes, steps, float(axes.get_window_extent().width) / axes.figure.dpi, style)
        axes.set(xlabel="training step", ylabel=f"fraction of ‖G‖_F, r = {drawn_rank}", ylim=(0, _choose_top(shown)))
        keys = _make_keys((Series("", shown),), per, style, len({record.layer for record in shown}))
        axes.legend([key.handle for key in keys], [key.label for key in keys], fontsize="small")
    return axes


def choose_rank(records: Sequence[Overlap], rank: int | None) -> int:
    """Return the rank to draw: the requested one, else 8 if measured, else the smallest."""
    ranks = sorted({record.rank for record in records})
    return rank if rank is not None else 8 if 8 in ranks else ranks[0]


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw κ and tangent by module type, one panel each, up to ``MAX_PANELS``."""
    all_records = [record for item in series for record in item.records]
    rank = choose_rank(all_records, options.rank)
    shown = [Series(item.label, tuple(r for r in item.records if r.rank == rank)) for item in series]
    records = [record for item in shown for record in item.records]
    types = Types(record.layer for record in records)
    panel_types = types.names[:MAX_PANELS]
    steps = sorted({record.step for record in records})
    layers_per_panel = max(Counter(types.of(layer) for layer in {record.layer for record in records}).values())
    text = _make_text(
        shown, all_records, rank, options.per, len(types.names) - len(panel_types), layers_per_panel, style
    )

    def draw(ax: Axes, inches: float, name: str) -> None:
        panel_series = [Series(s.label, tuple(r for r in s.records if types.of(r.layer) == name)) for s in shown]
        _draw(ax, panel_series, options.per, style)
        _set_step_axis(ax, steps, inches, style)

    panels = {name: partial(draw, name=name) for name in panel_types}
    ylabel = "fraction of ‖G‖_F" if len(panel_types) <= style.columns else "fraction"
    page = multiples_of(panels, text, style, "training step", ylabel)
    page.axes[0].set_ylim(0, _choose_top(records))
    page.axes[0].yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    return page


def _draw(ax: Axes, series: Sequence[Series[Overlap]], per: str, style: PageStyle | None) -> None:
    width = style.line if style else 1.2
    for number, item in enumerate(series):
        for name, field, baseline_field, color, dashes in MEASURES:
            curve = curve_over_steps(item.records, field, baseline_field)
            if not len(curve.steps):
                continue
            many_runs = len(series) > 1
            color = category(number) if many_runs else color
            marker_style: dict[str, Any] = {"marker": "o", "markersize": 2.6 * width}
            layers = list(dict.fromkeys(record.layer for record in item.records))
            banded = per == "type" or len(layers) > SINGLE
            if banded and not many_runs:
                ax.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.2, lw=0)
            elif not many_runs:
                for layer in layers:
                    layer_curve = curve_over_steps(
                        [record for record in item.records if record.layer == layer], field, baseline_field
                    )
                    ax.plot(
                        layer_curve.steps,
                        layer_curve.middle,
                        color=color,
                        lw=0.5 * width,
                        alpha=0.45,
                        label=f"_{name} of {layer}",
                    )
            line_style: dict[str, Any] = {"color": color, "lw": 1.5 * width, "ls": dashes if many_runs else "-"}
            ax.plot(curve.steps, curve.middle, label=f"_{name}", **line_style, **marker_style)
            baseline_style: dict[str, Any] = {"color": color, "lw": 0.9 * width, "ls": (0, (1, 1.5))}
            if len(curve.steps) == 1:
                ax.plot(curve.steps, curve.random, color=color, marker="_", ms=6 * width, label=f"_random {name}")
            else:
                ax.plot(curve.steps, curve.random, label=f"_random {name}", **baseline_style)


def _choose_top(records: Sequence[Overlap]) -> float:
    values = [value for record in records for value in (record.kappa, record.tangent) if value is not None]
    return min(1.02, 1.08 * max([*values, *(record.tangent_random for record in records)], default=1.0) or 1.0)


def _set_step_axis(ax: Axes, steps: Sequence[int], inches: float, style: PageStyle | None) -> None:
    """Set up the step axis, with labels at measured steps as far as they fit."""
    low, high = steps[0], steps[-1]
    margin = 0.06 * (high - low) or 1
    ax.set_xlim(low - margin, high + margin)
    label_ticks(ax, (low, high, *steps), inches, style)


def _make_keys(
    series: Sequence[Series[Overlap]], per: str, style: PageStyle | None, max_layers: int
) -> tuple[Key, ...]:
    width = style.line if style else 1.2
    many_runs = len(series) > 1
    keys = []
    for number, item in enumerate(series if many_runs else ()):
        keys.append(Key(Line2D([], [], color=category(number), lw=2 * width), item.label))
    for name, _, _, color, dashes in MEASURES:
        color = INK if many_runs else color
        line = Line2D([], [], color=color, lw=1.5 * width, ls=dashes if many_runs else "-")
        keys.append(Key(line, f"{name}, median layer"))
    if not many_runs:
        banded = per == "type" or max_layers > SINGLE
        description, thick = ("range of the layers", 4.0) if banded else ("single layers", 0.5)
        keys.append(Key(Line2D([], [], color=QUIET, lw=thick * width, alpha=0.4), description))
    keys.append(Key(Line2D([], [], color=QUIET, lw=1.2 * width, ls=(0, (1, 1.5))), "random subspaces"))
    return tuple(keys)


def _make_text(
    series: Sequence[Series[Overlap]],
    all_records: Sequence[Overlap],
    rank: int,
    per: str,
    missing_types: int,
    max_layers: int,
    style: PageStyle,
) -> FigureText:
    layers = len({record.layer for item in series for record in item.records})
    prefix = f"{series[0].label}: " if len(series) == 1 and series[0].label else ""
    other_ranks = sorted({record.rank for record in all_records} - {rank})
    notes = []
    if other_ranks:
        notes.append(f"Also measured, not drawn: r = {', '.join(map(str, other_ranks))} (--show-rank).")
    if missing_types:
        notes.append(f"Not drawn: {missing_types} more module types (--layers).")
    if zero := sum(record.kappa is None for item in series for record in item.records):
        notes.append(f"Not drawn: {zero} zero gradients.")
    return FigureText(
        f"Overlap of gradients with the update's rank-{rank} subspaces: κ and tangent",
        f"{prefix}{layers} {'matrix' if layers == 1 else 'matrices'}; κ\xa0=\xa0‖UᵀGV‖_F\xa0/\xa0‖G‖_F, "
        "tangent\xa0=\xa0‖P_T\xa0G‖_F\xa0/\xa0‖G‖_F",
        (" ".join(notes),) if notes else (),
        _make_keys(series, per, style, max_layers),
    )


def find_obstacle(records: Sequence[Overlap], options: Options) -> str | None:
    """Return why records cannot be drawn: the requested rank was not measured; None if they can."""
    return rank_absent({record.rank for record in records}, options)
