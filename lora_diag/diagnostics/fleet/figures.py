"""`fleet`: norm of the updates of many adapters against the fraction of their rank in use; outliers are named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from lora_diag.diagnostics.fleet.record import Fleet
from lora_diag.metrics.statistics import OVER_RANKED_BELOW, OutlierKind, find_outlier_kinds, order_by_rarity
from lora_diag.rendering.figures.axes import panel_axes
from lora_diag.rendering.figures.series import Options, Series, short_names
from lora_diag.rendering.figures.sheet import FigureText, Key, sheet
from lora_diag.rendering.figures.style import (
    INK,
    QUIET,
    PageStyle,
    category,
    crop_name,
    log_label,
    width_of,
)

# Fraction of the width for the points; the rest is for names. Maximum number of names.
_PLOT, _NAMES = 0.62, 12


@dataclass(frozen=True, slots=True)
class _Point:
    """One adapter.

    Args:
        name: Label in the figure.
        remark: Kinds of outlier that it is; empty for other adapters.
        used: Position on the x axis.
        fro: Position on the y axis; 0 for a zero update.
        run: Index of its run.
    """

    name: str
    remark: tuple[OutlierKind, ...]
    used: float
    fro: float
    run: int


def fleet(records: Iterable[Fleet], ax: Axes | None = None) -> Axes:
    """Draw ‖ΔW‖_F of every adapter over the fraction of its rank that 99% of the energy needs; name outliers.

    Args:
        records: Records of ``fleet``; adapters without a rank are skipped.
        ax: Axes to draw on; default those of a new figure.

    Returns:
        The Axes drawn on.
    """
    with panel_axes(ax) as (axes, style):
        _draw(axes, _make_points((Series("", tuple(records)),)), style, *_measure_inches(axes))
    return axes


def _measure_inches(ax: Axes) -> tuple[float, float]:
    box = ax.get_window_extent()
    return box.width / ax.figure.dpi, box.height / ax.figure.dpi


def figure(series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
    """Draw the scatter plot of all adapters, with a colour per run."""
    points = _make_points(series)
    figure, (ax,) = sheet(style, _make_text(series, points, style), 1, 1)
    # The panel's height depends on the text around it; names have the remaining space.
    _draw(ax, (), style, 1.0, 1.0)
    figure.draw_without_rendering()
    _draw(ax, points, style, *_measure_inches(ax))
    return figure


def _make_points(series: Sequence[Series[Any]]) -> list[_Point]:
    """Return a point for each adapter that has a rank."""
    records = [(record, run) for run, item in enumerate(series) for record in item.records]
    names = short_names(record.adapter for record, _ in records)
    remarks = [remark for item in series for remark in find_outlier_kinds(item.records)]
    return [
        _Point(names[record.adapter], remark, record.used, record.fro, run)
        for (record, run), remark in zip(records, remarks, strict=True)
        if record.used is not None
    ]


def _draw(ax: Axes, points: Sequence[_Point], style: PageStyle | None, width: float, height: float) -> None:
    line, size = (style.line, style.ticks) if style else (1.2, 8.0)
    norms = [point.fro for point in points if point.fro > 0] or [1.0]
    low, high = min(norms) / 2, max(norms) * 1.6
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.set_xlim(-0.03, 1 / _PLOT)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=6))
    ax.yaxis.set_major_formatter(_format_norm if high / low < 100 else log_label)
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("rank at 99% of the energy / r", loc="left")
    ax.set_ylabel("‖ΔW‖_F")
    ax.spines["bottom"].set_bounds(-0.03, 1.03)
    if not points:
        return
    ax.plot(
        [OVER_RANKED_BELOW, OVER_RANKED_BELOW],
        [low, high],
        color=INK,
        alpha=0.4,
        lw=0.7 * line,
        ls=(0, (1, 1.6)),
        label="_used",
    )
    for dead in (False, True):
        for run in {point.run for point in points}:
            subset = [point for point in points if point.run == run and (point.fro == 0) == dead]
            if not subset:  # a line without points would count in the layout, at the corner of the page
                continue
            ax.plot(
                [point.used for point in subset],
                [point.fro or low for point in subset],
                ls="",
                marker="v" if dead else "o",
                ms=3.4 * line,
                mew=0,
                color=category(run),
                alpha=0.8,
                clip_on=False,
                label="_dead" if dead else "_adapters",
            )
    _write_names(ax, _select_named(points, height, size), low, high, width, height, size, line)


def _select_named(points: Sequence[_Point], height: float, size: float) -> list[_Point]:
    """Return the adapters to name, by norm: the rarest outliers, as many as fit, at most ``_NAMES``."""
    outliers = [points[i] for i in order_by_rarity([point.remark for point in points])]
    return sorted(outliers[: min(_NAMES, int(height * 72 / (1.5 * size)))], key=lambda point: (point.fro, point.used))


def _write_names(
    ax: Axes,
    named: Sequence[_Point],
    low: float,
    high: float,
    width: float,
    height: float,
    size: float,
    line: float,
) -> None:
    """Write names at the right, ordered by norm and without overlap, each with a line to its point."""
    step = 1.5 * size / 72 / height
    span = (high / low) ** step
    # Move each name up from its norm until it is clear of the one below, then down from the top.
    heights: list[float] = []
    for point in named:
        lowest = max(point.fro or low, low * span**0.5)
        heights.append(max(lowest, heights[-1] * span) if heights else lowest)
    upper_limit = high / span**0.5
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], upper_limit)
        upper_limit = heights[i] / span
    # Letters are drawn slightly wider than they are measured.
    max_width = 0.95 * (1 / _PLOT - 1.07) / (1 / _PLOT + 0.03) * width
    for point, y in zip(named, heights, strict=True):
        name_and_remark = f"{point.name}: {', '.join(point.remark)}"
        # Without space for both, show the name alone: the remark can be seen in the figure.
        text = (
            name_and_remark if width_of(name_and_remark, size) <= max_width else crop_name(point.name, max_width, size)
        )
        ax.plot(
            [point.used, 1.03, 1.06],
            [point.fro or low, y, y],
            color=QUIET,
            lw=0.5 * line,
            alpha=0.6,
            zorder=1,
            clip_on=False,
            label="_to a name",
        )
        ax.text(1.07, y, text, size=size, va="center", parse_math=False, in_layout=False)


def _format_norm(value: float, _: object = None) -> str:
    return f"{value:,.0f}".replace(",", "\u202f") if 1000 <= value < 1e7 else f"{value:.3g}"


def _make_text(series: Sequence[Series[Any]], points: Sequence[_Point], style: PageStyle) -> FigureText:
    marker_style: dict[str, Any] = {"ls": "", "mew": 0, "ms": 3.4 * style.line}
    many_runs = len(series) > 1
    keys = [
        Key(Line2D([], [], color=category(n), marker="o", **marker_style), item.label if many_runs else "one adapter")
        for n, item in enumerate(series)
    ]
    if any(point.fro == 0 for point in points):
        keys.append(Key(Line2D([], [], color=INK if many_runs else category(0), marker="v", **marker_style), "ΔW = 0"))
    line = Line2D([], [], color=INK, alpha=0.6, lw=0.8 * style.line, ls=(0, (1, 1.6)))
    keys.append(Key(line, f"over-ranked: at most {OVER_RANKED_BELOW:g}"))
    outliers = sum(bool(point.remark) for point in points)
    notes = [
        f"{outliers or 'None'} of them {'is an outlier' if outliers == 1 else 'are outliers'}; the rarest are named "
        "where space permits."
    ]
    if rankless := sum(len(item.records) for item in series) - len(points):
        notes.append(f"Not drawn: {rankless} without a rank.")
    adapter_count = "1 adapter" if len(points) == 1 else f"{len(points)} adapters"
    return FigureText(
        "A fleet of adapters: norm of the update and used fraction of its rank",
        f"{adapter_count}; ‖ΔW‖_F over all layers; rank: Σ of the layers' ranks at 99% of the energy over Σr",
        (" ".join(notes),),
        tuple(keys),
    )


def find_obstacle(records: Sequence[Fleet], options: Options) -> str | None:
    """Return why records cannot be drawn: no adapter has a rank; None if they can."""
    return "no adapter has a rank" if all(record.used is None for record in records) else None
