"""The figures by name: which records each needs, and how its page is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from lora_diag.errors import UsageError
from lora_diag.plots.allocation import figure as draw_allocation
from lora_diag.plots.angles import figure as draw_angles
from lora_diag.plots.angles import ranks_of
from lora_diag.plots.energy import figure as draw_energy
from lora_diag.plots.fields import numbers_of, value_of
from lora_diag.plots.fleet import figure as draw_fleet
from lora_diag.plots.heatmap import figure as draw_heatmap
from lora_diag.plots.overlap import figure as draw_overlap
from lora_diag.plots.residual import figure as draw_residual
from lora_diag.plots.series import Options, Series, by_adapter, by_pair, by_step, series_of
from lora_diag.plots.sheet import MAX_PANELS, settle
from lora_diag.plots.spectrum import figure as draw_spectrum
from lora_diag.plots.style import CATEGORIES, Look, look_of, styled
from lora_diag.plots.union import figure as draw_union
from lora_diag.plots.union import shared
from lora_diag.results import Results


@dataclass(frozen=True, slots=True)
class FigureKind:
    """One kind of figure.

    Args:
        name: As users call it.
        shows: One line.
        needs: The kind of record it draws; empty for any.
        draw: Series of such records, a page and options → the figure.
        by_color: Whether runs are told apart by colour, so that there is an end to how many.
    """

    name: str
    shows: str
    needs: str
    draw: Callable[[Sequence[Series[Any]], Look, Options], Figure]
    by_color: bool = True


FIGURES = (
    FigureKind("energy", "C(r): what the best adapter of each rank keeps", "spectrum", draw_energy),
    FigureKind("spectrum", "singular values and the noise edge of the files", "spectrum", draw_spectrum),
    FigureKind("heatmap", "a field by module type and depth", "", draw_heatmap, by_color=False),
    FigureKind("residual", "ε and its floor, layer by layer, by cause", "residual", draw_residual, by_color=False),
    FigureKind("overlap", "κ and tangent overlap over the steps, with baselines", "overlap", draw_overlap),
    FigureKind("allocation", "rank by layer, and energy kept against the bound", "allocation", draw_allocation),
    FigureKind("angles", "principal angles between updates, beside chance", "interference", draw_angles, False),
    FigureKind("union", "rank of the sum of updates, against the sum of ranks", "union", draw_union, by_color=False),
    FigureKind("fleet", "many adapters: norm, and rank used; who stands out", "fleet", draw_fleet),
)


def figure_named(name: str) -> FigureKind:
    """Return a kind of figure by its name.

    Raises:
        UsageError: There is none of that name.
    """
    for kind in FIGURES:
        if kind.name == name:
            return kind
    raise UsageError(f"figure {name}: there are {', '.join(kind.name for kind in FIGURES)}")


def figure(
    name: str,
    results: Results[Any] | Sequence[Results[Any]],
    *,
    labels: Sequence[str] = (),
    width: str = "slide",
    per: str = "layer",
    field: str | None = None,
    rank: int | None = None,
) -> Figure:
    """Return a figure as ``loradiag plot`` writes it; ``pyplot`` does not know of it.

    Args:
        name: One of ``FIGURES``.
        results: Of one run, or of several to compare; those without the records that the figure needs do not count.
        labels: What each of them is called.
        width: ``column`` (3.3 in, 7 pt) or ``slide`` (10 in, 12.5 pt).
        per: ``layer``, or ``type`` for all layers of a module type together.
        field: Of a heat map: the dotted name of any number in the records.
        rank: Of ``overlap`` and ``angles``, where several were measured.

    Raises:
        UsageError: No such figure, width or field, or the results do not have what it needs.
    """
    kind, look = figure_named(name), look_of(width)
    series, options = _asked(results, labels, per, field, rank)
    if reason := _why_not(kind, series, options):
        raise UsageError(f"{name}: {reason}")
    with styled(look):
        return settle(kind.draw(_usable(kind, series, options), look, options))


def why_not(
    name: str,
    results: Results[Any] | Sequence[Results[Any]],
    *,
    labels: Sequence[str] = (),
    width: str = "slide",
    per: str = "layer",
    field: str | None = None,
    rank: int | None = None,
) -> str | None:
    """Say why ``figure`` cannot draw some results; None if it can.

    Raises:
        UsageError: No such figure or width.
    """
    look_of(width)
    return _why_not(figure_named(name), *_asked(results, labels, per, field, rank))


def _asked(
    results: Results[Any] | Sequence[Results[Any]], labels: Sequence[str], per: str, field: str | None, rank: int | None
) -> tuple[tuple[Series[Any], ...], Options]:
    runs = [results] if isinstance(results, Results) else list(results)
    if labels and len(labels) != len(runs):
        raise UsageError(f"{len(labels)} labels for {len(runs)} results: give one label each, in their order")
    if per not in {"layer", "type"}:
        raise UsageError(f"per {per}: choose layer or type")
    return series_of(runs, labels), Options(per, field, rank)


def _usable(kind: FigureKind, series: Sequence[Series[Any]], options: Options) -> tuple[Series[Any], ...]:
    """Return the series whose records a figure can draw; of a heat map, those of the first kind that has its field."""
    filled = [one for one in series if one.records]
    if kind.needs:
        return tuple(one for one in filled if one.records[0].record == kind.needs)
    # The records of a fleet are of adapters, which have no depth and no module type.
    filled = [one for one in filled if one.records[0].record != "fleet"]
    kinds = dict.fromkeys(type(one.records[0]) for one in filled)
    field = options.field
    having = [k for k in kinds if field is None or _has(field, [o for o in filled if type(o.records[0]) is k])]
    chosen = tuple(one for one in filled if having and type(one.records[0]) is having[0])
    if chosen and chosen[0].records[0].record == "residual":
        return by_adapter(chosen)
    if chosen and chosen[0].records[0].record == "interference":
        return by_pair(chosen)
    return by_step(chosen, options.rank) if chosen and chosen[0].records[0].record == "overlap" else chosen


def _has(field: str, series: Sequence[Series[Any]]) -> bool:
    return any(value_of(record, field) is not None for one in series for record in one.records)


def _why_not(kind: FigureKind, series: Sequence[Series[Any]], options: Options) -> str | None:
    fitting = _usable(kind, series, options)
    if not fitting:
        if options.field and not kind.needs and any(one.records for one in series):
            return f"no record has a number {options.field}; there are {_fields(series)}"
        return f"no {f'{kind.needs} ' if kind.needs else ''}records"
    most = len(CATEGORIES) if kind.by_color else MAX_PANELS
    if len(fitting) > most:
        return f"{len(fitting)} runs at once are not told apart: give {most} results at most"
    records: list[Any] = [record for one in fitting for record in one.records]
    if kind.needs == "spectrum" and not any(record.fro for record in records):
        return "ΔW = 0 in every matrix"
    if kind.needs == "overlap" and options.rank not in {None, *(record.rank for record in records)}:
        ranks = sorted({record.rank for record in records})
        return f"rank {options.rank} was not measured; there are {', '.join(map(str, ranks))}"
    if kind.needs == "interference" and options.rank not in {None, *ranks_of(records)}:
        return f"rank {options.rank} was not measured; there are {', '.join(map(str, ranks_of(records)))}"
    if kind.needs == "union" and not shared(records):
        return "no layer is changed by two updates"
    if kind.needs == "fleet" and all(record.used is None for record in records):
        return "no adapter has a rank"
    if kind.needs == "residual" and all(len(record.shape) == 1 for record in records):
        return "no records of matrices"
    return None


def _fields(series: Sequence[Series[Any]]) -> str:
    return ", ".join(dict.fromkeys(name for one in series for name in numbers_of(one.records[:20])))
