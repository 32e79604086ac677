"""Small multiples of curves over the rank: one panel per module type, a common depth scale, one legend."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lora_diag.diagnostics.spectrum.curves import MARKED, Quantity, has_floor, largest_rank
from lora_diag.diagnostics.spectrum.figure_panel import draw_series
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.rendering.figures.fields import changes_of, metric_suffix
from lora_diag.rendering.figures.groups import Types, by_depth, deepest
from lora_diag.rendering.figures.pages import multiples_of
from lora_diag.rendering.figures.series import Series, owner_of
from lora_diag.rendering.figures.sheet import MAX_PANELS, FigureText, Key, depth_bar
from lora_diag.rendering.figures.style import FLOOR, INK, PageStyle, category


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: a module type, and its records of every series."""

    name: str
    series: tuple[Series[Spectrum], ...]


def small_multiples(
    series: Sequence[Series[Spectrum]],
    quantity: Quantity,
    style: PageStyle,
    per: str,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    scale: Callable[[Axes], None],
    also: Callable[[Axes, Sequence[Spectrum]], None] | None = None,
    keys: Sequence[Key] = (),
    formula: str = "",
) -> Figure:
    """Return a figure with one panel per module type.

    Args:
        series: Series to compare; one for lines by depth, several for bands.
        quantity: Quantity over the rank.
        style: The page.
        per: ``layer`` or ``type``.
        title: Title of the figure.
        xlabel: Label of the panels at the bottom.
        ylabel: Label of the panels at the left.
        scale: Sets the y axis of a panel.
        also: Adds further elements to a panel.
        keys: Legend entries of these elements.
        formula: Formula of the quantity.
    """
    records = [record for item in series for record in item.records]
    shown = _make_panels(series)
    bands = per == "type" or len(series) > 1
    depths, largest = deepest(record.layer for record in records), largest_rank(records)
    by_color = not bands and depths > 0
    text = FigureText(
        title,
        f"{_make_subtitle(series, records)}{f'; {formula}' if formula else ''}",
        _make_notes(shown, records, bands),
        (*_make_keys(series, records, largest, bands, style), *keys),
    )

    def draw(ax: Axes, inches: float, of: Sequence[Series[Spectrum]]) -> None:
        draw_series(ax, of, quantity, MARKED, per, style, depths=depths, largest=largest, inches=inches)
        scale(ax)
        if also:
            also(ax, [record for item in of for record in item.records])

    panels = {panel.name: partial(draw, of=panel.series) for panel in shown}
    figure = multiples_of(panels, text, style, xlabel, ylabel, 0.88 if by_color else 0.97)
    if by_color:
        depth_bar(figure, figure.axes, depths, style)
    return figure


def _make_panels(series: Sequence[Series[Spectrum]]) -> tuple[Panel, ...]:
    """Return one panel per module type with an update; of too many, the types of least ‖ΔW‖ share the last."""
    types = Types(record.layer for item in series for record in item.records)
    energy: dict[str, float] = defaultdict(float)
    for item in series:
        for record in item.records:
            energy[types.of(record.layer)] += record.fro**2
    moving = [name for name in types.names if energy[name] > 0]
    alone = set(moving)
    if len(moving) > MAX_PANELS:
        alone = set(sorted(moving, key=lambda name: -energy[name])[: MAX_PANELS - 1])
    others = f"{len(moving) - len(alone)} other types"
    shown = {name: name if name in alone else others for name in moving}
    order = [name for name in moving if name in alone] + ([others] if len(alone) < len(moving) else [])
    groups: dict[str, tuple[list[Spectrum], ...]] = {name: tuple([] for _ in series) for name in order}
    for number, item in enumerate(series):
        for record in item.records:
            if (name := types.of(record.layer)) in shown:
                groups[shown[name]][number].append(record)
    return tuple(
        Panel(name, tuple(Series(item.label, tuple(part)) for item, part in zip(series, groups[name], strict=True)))
        for name in order
    )


def _make_subtitle(series: Sequence[Series[Spectrum]], records: Sequence[Spectrum]) -> str:
    """Return the subtitle: description of the figure."""
    layers = len({record.layer for record in records})
    subject = (
        "gradients" if any(record.source == "gradients" for record in records) else f"updates {changes_of(records)}"
    )
    prefix = series[0].label if len(series) == 1 else ""
    count = f"{layers} {'matrix' if layers == 1 else 'matrices'}{metric_suffix(records)}"
    return f"{f'{prefix}: ' if prefix else ''}{subject} of {count}"


def _make_keys(
    series: Sequence[Series[Spectrum]], records: Sequence[Spectrum], largest: int, bands: bool, style: PageStyle
) -> tuple[Key, ...]:
    """Return the legend entries."""
    keys = []
    if bands:
        for number, item in enumerate(series):
            owner = owner_of(item, series)
            keys.append(Key(Patch(facecolor=category(number), alpha=0.7), f"{owner}median layer, range"))
    elif deepest(record.layer for record in records) == 0:
        keys.append(Key(Line2D([], [], color=INK, lw=style.line), "one line per layer"))
    inside = [str(rank) for rank in MARKED if rank <= largest]
    if inside:
        line = Line2D([], [], color=INK, alpha=0.6, lw=0.8 * style.line, ls=(0, (1, 1.6)))
        keys.append(Key(line, f"LoRA ranks {', '.join(inside)}"))
    if not bands and has_floor(records):
        keys.append(Key(Line2D([], [], color=FLOOR, lw=1.5 * style.line), "beyond the signal rank: rounding"))
    return tuple(keys)


def _make_notes(shown: Sequence[Panel], records: Sequence[Spectrum], bands: bool) -> tuple[str, ...]:
    """Return notes on joined layers and on layers without a curve."""
    notes = []
    joined = max((len(g) for panel in shown for g in by_depth(panel.series[0].records).values()), default=1)
    if joined > 1 and not bands:
        notes.append(f"A line is the median of a block's matrices of its type (up to {joined}).")
    if any(record.fro > 0 and not record.complete for record in records):
        notes.append("Curves end where the values kept (--top) do.")
    if zero := sum(record.fro == 0 for record in records):
        notes.append(f"Δ = 0 in {zero} {'matrix, which has' if zero == 1 else 'matrices, which have'} no curve.")
    return (" ".join(notes),) if notes else ()
