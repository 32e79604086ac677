"""The figures by name: the records that each needs, and the drawing of its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from matplotlib.figure import Figure

from lora_diag.catalog import figures
from lora_diag.errors import UsageError
from lora_diag.feature import Feature
from lora_diag.feature import Figure as Spec
from lora_diag.records import LayerRecord, Results
from lora_diag.rendering.figures.fields import numbers_of, value_of
from lora_diag.rendering.figures.series import (
    Options,
    Series,
    by_adapter,
    by_pair,
    by_program,
    by_step,
    kind_of,
    series_of,
)
from lora_diag.rendering.figures.sheet import MAX_PANELS, freeze_layout
from lora_diag.rendering.figures.style import CATEGORIES, PageStyle, apply_style, encode_figure, page_style_of


@dataclass(frozen=True, slots=True)
class Obstacle:
    """The reason why a figure cannot be drawn.

    Attributes:
        reason: The reason as text.
        missing: Description of the records that the figure needs: ``records``, or ``values`` that the given
            records do not have; empty if it would not help.
    """

    reason: str
    missing: Literal["", "records", "values"] = ""


@dataclass(frozen=True, slots=True)
class FigureKind:
    """One kind of figure: its feature and its declaration.

    Attributes:
        feature: The feature.
        spec: Its declaration.
    """

    feature: Feature
    spec: Spec

    @property
    def name(self) -> str:
        """The figure's name on the command line."""
        return self.spec.name

    @property
    def shows(self) -> str:
        """One-line description of its contents."""
        return self.spec.shows

    @property
    def made_by(self) -> str:
        """The command whose records it draws."""
        return self.spec.made_by

    def draw(self, series: Sequence[Series[Any]], style: PageStyle, options: Options) -> Figure:
        """Return the page."""
        drawn: Figure = self.feature.load(self.spec.draw)(series, style, options)
        return drawn

    def find_obstacle(self, records: Sequence[Any], options: Options) -> str | None:
        """Return why records cannot be drawn with these options; None if they can."""
        if not self.spec.obstacle:
            return None
        reason: str | None = self.feature.load(self.spec.obstacle)(records, options)
        return reason


FIGURES = tuple(FigureKind(feature, spec) for feature, spec in figures())


def figure_named(name: str) -> FigureKind:
    """Return a kind of figure by its name.

    Raises:
        UsageError: There is no figure of this name.
    """
    for kind in FIGURES:
        if kind.name == name:
            return kind
    raise UsageError(f"--figure {name}: unknown; use one of {', '.join(kind.name for kind in FIGURES)}")


def figure(
    name: str,
    results: Results[Any] | Sequence[Results[Any]],
    *,
    labels: Sequence[str] = (),
    width: str = "slide",
    per: str = "layer",
    field: str | None = None,
    rank: int | None = None,
    files: Sequence[str] = (),
    plain: bool = False,
) -> Figure:
    """Return a figure as written by ``loradiag plot``; it is not registered with ``pyplot``.

    Args:
        name: One of ``FIGURES``.
        results: Results of one run, or of several to compare; those without the records that the figure needs are
            ignored.
        labels: Label of each of ``results``; default by the inputs that were measured.
        width: ``column`` (3.3 in, 7 pt) or ``slide`` (10 in, 12.5 pt).
        per: ``layer``, or ``type`` to pool the layers of a module type.
        field: For a heat map: dotted name of a numeric field.
        rank: For ``overlap`` and ``angles`` with several measured ranks.
        files: Path of each of ``results``; the label of runs that are otherwise identical.
        plain: Whether to omit title and notes, for a paper with its own caption.

    Raises:
        UsageError: The figure, width or field does not exist, or the results do not have the records it needs.
    """
    kind, style = figure_named(name), replace(page_style_of(width), plain=plain)
    series, options = _make_series_and_options(results, labels, per, field, rank, files)
    if problem := _find_obstacle(kind, series, options):
        raise UsageError(f"{name}: {problem.reason}")
    with apply_style(style):
        return freeze_layout(kind.draw(_select_usable(kind, series, options), style, options))


def figure_of(results: Results[Any], name: str | None = None, **options: Any) -> Figure:
    """Return a figure that a notebook displays with any backend.

    Args:
        results: Results of one run.
        name: One of ``FIGURES``; None for the first that the records allow.
        **options: Of ``figure``.

    Raises:
        UsageError: There is no such figure, or the records cannot be drawn.
    """
    selection = {key: value for key, value in options.items() if key != "plain"}
    chosen = name or next((kind.name for kind in FIGURES if obstacle(kind.name, results, **selection) is None), None)
    if chosen is None:
        raise UsageError(f"results of loradiag {results.run.command}: no figure shows them")
    page = figure(chosen, results, **options)
    setattr(page, "_repr_png_", partial(encode_figure, page, "png"))  # noqa: B010  (Figure does not declare it)
    return page


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
    """Return why ``figure`` cannot draw some results; None if it can.

    Raises:
        UsageError: The figure or width does not exist.
    """
    problem = obstacle(name, results, labels=labels, width=width, per=per, field=field, rank=rank)
    return problem.reason if problem else None


def obstacle(
    name: str,
    results: Results[Any] | Sequence[Results[Any]],
    *,
    labels: Sequence[str] = (),
    width: str = "slide",
    per: str = "layer",
    field: str | None = None,
    rank: int | None = None,
) -> Obstacle | None:
    """Return why ``figure`` cannot draw some results, and what would help; None if it can.

    Raises:
        UsageError: The figure or width does not exist.
    """
    page_style_of(width)
    return _find_obstacle(figure_named(name), *_make_series_and_options(results, labels, per, field, rank))


def _make_series_and_options(
    results: Results[Any] | Sequence[Results[Any]],
    labels: Sequence[str],
    per: str,
    field: str | None,
    rank: int | None,
    files: Sequence[str] = (),
) -> tuple[tuple[Series[Any], ...], Options]:
    runs = [results] if isinstance(results, Results) else list(results)
    if labels and len(labels) != len(runs):
        raise UsageError(
            f"{len(labels)} labels for {len(runs)} results: give one label per results file, in their order"
        )
    if per not in {"layer", "type"}:
        raise UsageError(f"--per {per}: unknown; use layer or type")
    return series_of(runs, labels, files), Options(per, field, rank)


def _select_usable(kind: FigureKind, series: Sequence[Series[Any]], options: Options) -> tuple[Series[Any], ...]:
    """Return the series whose records a figure can draw; for a heat map, of the first kind that has its field."""
    filled = [item for item in series if item.records]
    if kind.spec.needs:
        return tuple(item for item in filled if kind_of(item.records[0]) == kind.spec.needs)
    # Records of a fleet describe adapters, which have no depth or module type; records of probes describe whole runs.
    filled = [item for item in filled if isinstance(item.records[0], LayerRecord) and item.records[0].record != "fleet"]
    kinds = dict.fromkeys(type(item.records[0]) for item in filled)
    field = options.field
    having = [k for k in kinds if field is None or _has_field(field, [o for o in filled if type(o.records[0]) is k])]
    chosen = tuple(item for item in filled if having and type(item.records[0]) is having[0])
    if chosen and chosen[0].records[0].record == "residual":
        return by_adapter(chosen)
    if chosen and chosen[0].records[0].record == "interference":
        return by_pair(chosen)
    if chosen and chosen[0].records[0].record == "portability":
        return by_program(chosen)
    return by_step(chosen, options.rank) if chosen and chosen[0].records[0].record == "overlap" else chosen


def _has_field(field: str, series: Sequence[Series[Any]]) -> bool:
    return any(value_of(record, field) is not None for item in series for record in item.records)


def _find_obstacle(kind: FigureKind, series: Sequence[Series[Any]], options: Options) -> Obstacle | None:
    fitting = _select_usable(kind, series, options)
    if not fitting:
        if options.field and not kind.spec.needs and any(item.records for item in series):
            return Obstacle(f"no record has a numeric field {options.field}; use one of {_list_fields(series)}")
        return Obstacle(f"no {f'{kind.spec.needs} ' if kind.spec.needs else ''}records", "records")
    max_runs = len(CATEGORIES) if kind.spec.by_color else MAX_PANELS
    if len(fitting) > max_runs:
        return Obstacle(f"{len(fitting)} runs are too many for one figure; give at most {max_runs} results")
    records: list[Any] = [record for item in fitting for record in item.records]
    reason = kind.find_obstacle(records, options)
    return Obstacle(reason, "values") if reason else None


def _list_fields(series: Sequence[Series[Any]]) -> str:
    return ", ".join(dict.fromkeys(name for item in series for name in numbers_of(item.records[:20])))
