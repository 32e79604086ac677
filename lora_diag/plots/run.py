"""``plot``: draw one figure of results, or all that their records allow; the figures by name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

from matplotlib.figure import Figure

from lora_diag.catalog import figures, read_results
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.feature import Feature
from lora_diag.feature import Figure as Spec
from lora_diag.files import PDF, PNG, SVG, check_folder_of, check_output, write_whole
from lora_diag.plots.options import PlotOptions
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
from lora_diag.running.options import fill_options, show_options


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
        """Draw the page."""
        page: Figure = self.feature.load(self.spec.draw)(series, style, options)
        return page

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
    """Draw a figure as written by ``loradiag plot``; it is not registered with ``pyplot``.

    Args:
        name: One of ``FIGURES``.
        results: Results of one run, or of several to compare; those without the records that the figure needs are
            ignored.
        labels: Label of each of ``results``; default by the inputs that were measured.
        width: ``column`` (3.3 in, 7 pt) or ``slide`` (10 in, 12.5 pt).
        per: ``layer``, or ``type`` to pool the layers of a module type.
        field: For a heat map: dotted name of a numeric field.
        rank: For ``overlap``, ``angles`` and ``alone`` with several measured ranks.
        files: Path of each of ``results``; the label of runs that are otherwise identical.
        plain: Whether to omit title and notes, for a paper with its own caption.

    Raises:
        UsageError: An argument is invalid, the figure does not exist, or the results do not have the records it needs.
    """
    kind, style = figure_named(name), replace(page_style_of(width), plain=plain)
    series, options = _make_series_and_options(results, labels, per, field, rank, files)
    if problem := _find_obstacle(kind, series, options):
        raise UsageError(f"{name}: {problem.reason}")
    with apply_style(style):
        return freeze_layout(kind.draw(_select_usable(kind, series, options), style, options))


def figure_of(results: Results[Any], name: str | None = None, **options: Any) -> Figure:
    """Draw a figure that a notebook displays with any backend.

    Args:
        results: Results of one run.
        name: One of ``FIGURES``; None for the first that the records allow.
        **options: Of ``figure``.

    Raises:
        UsageError: There is no such figure, or the records cannot be drawn.
    """
    obstacle_options = {key: value for key, value in options.items() if key not in {"files", "plain"}}
    figure_name = name or next(
        (kind.name for kind in FIGURES if obstacle(kind.name, results, **obstacle_options) is None), None
    )
    if figure_name is None:
        raise UsageError(f"results of loradiag {results.run.command}: no figure shows them")
    page = figure(figure_name, results, **options)
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
        UsageError: The figure does not exist, or an argument is invalid.
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
        UsageError: The figure does not exist, or an argument is invalid.
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
    """Return the series whose records a figure can draw; for a heat map, of the first kind that has its field.

    A heat map of records that differ in adapter, pair, program or step gets a series for each of these; of many steps,
    for the first, the middle and the last.
    """
    nonempty = [item for item in series if item.records]
    if kind.spec.needs:
        return tuple(item for item in nonempty if kind_of(item.records[0]) == kind.spec.needs)
    # Records of a fleet describe adapters, which have no depth or module type; records of probes describe whole runs.
    nonempty = [
        item for item in nonempty if isinstance(item.records[0], LayerRecord) and item.records[0].record != "fleet"
    ]
    kinds = dict.fromkeys(type(item.records[0]) for item in nonempty)
    field = options.field
    kinds_with_field = [
        k for k in kinds if field is None or _has_field(field, [o for o in nonempty if type(o.records[0]) is k])
    ]
    usable = tuple(item for item in nonempty if kinds_with_field and type(item.records[0]) is kinds_with_field[0])
    if usable and usable[0].records[0].record == "residual":
        return by_adapter(usable)
    if usable and usable[0].records[0].record == "interference":
        return by_pair(usable)
    if usable and usable[0].records[0].record == "portability":
        return by_program(usable)
    return by_step(usable, options.rank) if usable and usable[0].records[0].record == "overlap" else usable


def _has_field(field: str, series: Sequence[Series[Any]]) -> bool:
    return any(value_of(record, field) is not None for item in series for record in item.records)


def _find_obstacle(kind: FigureKind, series: Sequence[Series[Any]], options: Options) -> Obstacle | None:
    usable = _select_usable(kind, series, options)
    if not usable:
        if options.field and not kind.spec.needs and any(item.records for item in series):
            return Obstacle(f"no record has a numeric field {options.field}; use one of {_list_fields(series)}")
        return Obstacle(f"no {f'{kind.spec.needs} ' if kind.spec.needs else ''}records", "records")
    max_runs = len(CATEGORIES) if kind.spec.by_color else MAX_PANELS
    if len(usable) > max_runs:
        return Obstacle(f"{len(usable)} runs are too many for one figure; give at most {max_runs} results")
    records: list[Any] = [record for item in usable for record in item.records]
    reason = kind.find_obstacle(records, options)
    return Obstacle(reason, "values") if reason else None


def _list_fields(series: Sequence[Series[Any]]) -> str:
    return ", ".join(dict.fromkeys(name for item in series for name in numbers_of(item.records[:20])))


KINDS = {"png": PNG, "svg": SVG, "pdf": PDF}


@dataclass(frozen=True, slots=True)
class Drawn:
    """One figure: its file, or the reason why it was not drawn.

    Args:
        name: Name of the figure.
        shows: One-line description of its contents.
        path: Its file; None if it was not drawn.
        reason: Reason why it was not drawn; empty if it was.
        made_by: Command that makes the records it draws; empty if any command does.
        missing: What that command would add: ``records`` of the figure's kind, or ``values`` that the given records do
            not have; empty if it would not help.
    """

    name: str
    shows: str
    path: Path | None
    reason: str = ""
    made_by: str = ""
    missing: Literal["", "records", "values"] = ""


@show_options
def plot(
    *results: Results[Any] | Path | str,
    output: Path | str,
    **options: Unpack[PlotOptions],
) -> tuple[Drawn, ...]:
    """Draw figures of results into files; ``lora_diag.plots`` has the same figures for notebooks.

    Args:
        results: Results or results files; several runs of one command are compared.
        output: A file whose suffix (png, svg, pdf) gives the format, for one figure; else a folder.
        figure: Name of a figure, or ``all``; None for all in a folder; in a file, None for
            the heat map if ``field`` is given, else for the first figure that the records allow.
        labels: Label of each of ``results``.
        field: For the heat map: dotted name of a numeric field, such as ``energy.16``.
        show_rank: For ``overlap``, ``angles`` and ``alone`` with several measured ranks.
        per: ``layer``, or ``type`` to pool the layers of a module type.
        width: ``column`` (3.3 in, 7 pt) or ``slide`` (10 in, 12.5 pt).
        format: Format of files in a folder: ``png`` (the default), ``svg`` or ``pdf``.
        layers: Regular expression; only layers whose name contains a match.
        plain: Whether to omit title and notes, for a paper with its own caption.
        overwrite: Replace existing files even if loradiag did not write them or they were edited since.
        **options: ``PlotOptions``.

    Returns:
        All figures, drawn or not, in the order of ``lora_diag.plots.FIGURES``.

    Raises:
        UsageError: The figure, field or format does not exist, or the requested figure cannot be drawn.
        InputError: A results file cannot be read, or a figure cannot be written.
        NothingComparedError: No figure can be drawn from these records.

    Example:
        >>> results = lora_diag.spectrum("sample_checkpoints/base", "sample_checkpoints/full_ft")  # doctest: +SKIP
        >>> plot(results, output="energy.pdf", figure="energy")  # doctest: +SKIP
    """
    from lora_diag import plots  # deferred: importing Matplotlib takes half a second

    option_values = fill_options(PlotOptions, options)
    figure, labels, field, rank, per = (
        option_values[name] for name in ("figure", "labels", "field", "show_rank", "per")
    )
    width, format, layers, plain, overwrite = (
        option_values[name] for name in ("width", "format", "layers", "plain", "overwrite")
    )
    if not results:
        raise UsageError("no results: give at least one results file")
    if labels and len(labels) != len(results):
        raise UsageError(
            f"--label: {len(labels)} labels for {len(results)} results files; give one for each, in their order"
        )
    path = Path(output)
    folder_exists = os.path.isdir(path)  # noqa: PTH112  (unlike Path.is_dir(), False also for names that no file can have)
    single = path.suffix.lower().removeprefix(".") in plots.FORMATS and not folder_exists
    file_format = _choose_format(path, single, format, plots.FORMATS)
    _check_output(path, file_format if single else None, folder_exists, overwrite)
    if single and figure == "all":
        raise UsageError(f"{path}: one file cannot hold all figures; give a folder, or one --figure")
    if single and figure is None and field is not None:
        figure = "heatmap"
    _check_options(figure, field, rank)
    runs = [
        _select_layers(source if isinstance(source, Results) else read_results(source), layers) for source in results
    ]
    if not any(map(plots.drawn, runs)):
        raise NothingComparedError(f"no layer left to draw: {_explain_no_layer(runs, layers)}")
    files = () if any(isinstance(source, Results) for source in results) else tuple(map(str, results))
    figure_options: dict[str, Any] = {"labels": labels, "width": width, "per": per, "field": field, "rank": rank}
    requested = plots.FIGURES if figure in {None, "all"} else (plots.figure_named(str(figure)),)
    figures: list[Drawn] = []
    for figure_kind in requested:
        obstacle = plots.obstacle(figure_kind.name, runs, **figure_options)
        if obstacle and figure not in {None, "all"}:
            suggestion = (
                f"; measure them with {figure_kind.made_by}"
                if figure_kind.made_by and obstacle.missing == "records"
                else ""
            )
            raise UsageError(f"--figure {figure_kind.name}: {obstacle.reason}{suggestion}")
        if obstacle:
            figures.append(
                Drawn(figure_kind.name, figure_kind.shows, None, obstacle.reason, figure_kind.made_by, obstacle.missing)
            )
            continue
        if single and any(drawn.path for drawn in figures):
            reason = f"{path}: one file cannot hold several figures; choose one with --figure, or give a folder"
            figures.append(Drawn(figure_kind.name, figure_kind.shows, None, reason, figure_kind.made_by))
            continue
        target = path if single else path / f"{figure_kind.name}.{file_format}"
        if folder_exists:
            check_output(target, KINDS[file_format], overwrite)  # checked for all files before the first is drawn
        figures.append(Drawn(figure_kind.name, figure_kind.shows, target, made_by=figure_kind.made_by))
    for drawn in figures:
        if drawn.path is not None:
            content = plots.encoded(
                plots.figure(drawn.name, runs, files=files, plain=plain, **figure_options), file_format, width
            )
            _write(drawn.path, content, file_format, overwrite)
    if not any(drawn.path for drawn in figures):
        raise NothingComparedError(f"no figure can be drawn: {_explain_no_figure(runs, figures)}")
    return tuple(figures)


def _choose_format(path: Path, single: bool, requested: str | None, formats: Sequence[str]) -> str:
    """Return the format of the files.

    Raises:
        UsageError: The format is not supported, or contradicts the file's suffix.
    """
    suffix = path.suffix.lower().removeprefix(".")
    if requested is not None and requested not in formats:
        raise UsageError(f"--format {requested}: unknown; use {', '.join(formats)}")
    if single:
        if requested not in {None, suffix}:
            raise UsageError(f"{path}: the suffix .{suffix} contradicts --format {requested}; give one of them")
        return suffix
    # A folder's name may contain a dot, but the suffix of another image format is a mistake.
    if suffix in {"jpg", "jpeg", "eps", "ps", "gif", "tif", "tiff", "webp", "html", "jsonl"} and not path.is_dir():
        raise UsageError(f"{path}: unsupported format; use .{', .'.join(formats)}")
    return requested or "png"


def _check_output(path: Path, file_format: str | None, folder_exists: bool, overwrite: bool) -> None:
    """Check, before drawing, that figures can be written; their folder may be missing, but not its parents.

    Args:
        path: A file of this format, or a folder, or a link to one.
        file_format: Format of the file; None for a folder.
        folder_exists: Whether the path is an existing folder.
        overwrite: Replace a file that loradiag did not write.

    Raises:
        UsageError: Another kind of file exists at the path.
        InputError: The location is not writable.
    """
    if file_format is not None:
        check_output(path, KINDS[file_format], overwrite)
        return
    check_folder_of(path / "figure" if folder_exists else path)
    if os.path.lexists(path) and not folder_exists:
        raise UsageError(f"{path}: not a folder; give a folder, or a name that ends in .png, .svg or .pdf")


def _check_options(figure: str | None, field: str | None, rank: int | None) -> None:
    """Refuse an option that the requested figure does not use.

    Raises:
        UsageError: The figure does not use the option.
    """
    if field is not None and figure not in {None, "all", "heatmap"}:
        raise UsageError(f"--field {field}: not used by {figure}; use it with the heatmap")
    if rank is not None and figure not in {None, "all", "overlap", "angles", "heatmap", "alone"}:
        raise UsageError(f"--show-rank {rank}: not used by {figure}; use it with overlap, angles or alone")


def _explain_no_layer(runs: Sequence[Results[Any]], layers: str | None) -> str:
    if layers is not None:
        return f"no name matches {layers}"
    commands = ", ".join(dict.fromkeys(run.run.command for run in runs))
    return f"results of loradiag {commands} have no records of layers; show them with loradiag inspect"


def _explain_no_figure(runs: Sequence[Results[Any]], figures: Sequence[Drawn]) -> str:
    """Return the obstacles of the figures whose records exist, or that no figure draws these results."""
    reasons = [f"{figure.name}: {figure.reason}" for figure in figures if figure.missing != "records"]
    commands = ", ".join(dict.fromkeys(run.run.command for run in runs))
    return (
        "; ".join(reasons)
        or f"no figure draws results of {commands}; show them with loradiag inspect or loradiag report"
    )


def _select_layers(results: Results[Any], layers: str | None) -> Results[Any]:
    if layers is None:
        return results
    try:
        return results.filter(layers)
    except re.error as error:
        raise UsageError(f"--layers {layers}: not a valid regular expression ({error}); correct it") from error


def _write(path: Path, content: bytes, file_format: str, overwrite: bool) -> None:
    """Write a figure; create its folder if needed."""
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    write_whole(path, content, KINDS[file_format], overwrite)
