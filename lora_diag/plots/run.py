"""``plot``: draw one figure of results, or all that their records allow; the figures by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_diag.catalog import feature_of, figures, read_results
from lora_diag.errors import Given, NothingComparedError, UsageError
from lora_diag.feature import Figure as FigureSpec
from lora_diag.files import PDF, PNG, SVG, check_folder_of, check_output, write_whole
from lora_diag.plots.options import PlotOptions
from lora_diag.records import Results
from lora_diag.rendering.figures.pages import (
    MAX_PANELS,
    Page,
    draw_panel,
    freeze_layout,
    make_figure,
)
from lora_diag.rendering.figures.series import (
    Options,
    UndrawableError,
    drawable_records,
    kind_of,
    series_of,
)
from lora_diag.rendering.figures.style import (
    CATEGORIES,
    FORMATS,
    PageStyle,
    apply_style,
    encode_figure,
    page_style_of,
)
from lora_diag.running.options import fill_options, show_options

_FEATURES = {figure.name: feature for feature, figure in figures()}
FIGURES = tuple(figure for _, figure in figures())


class FigureOptions(TypedDict, total=False):
    """Options of one figure, as in ``figure``."""

    labels: Sequence[str]
    width: str
    by: str
    field: str | None
    rank: int | None
    files: Sequence[str]
    plain: bool


def figure_named(name: str) -> FigureSpec:
    """Return the declaration of a figure by its name.

    Raises:
        UsageError: There is no figure of this name.
    """
    for spec in FIGURES:
        if spec.name == name:
            return spec
    raise UsageError(
        Given("figure", name), "unknown", f"use one of {', '.join(spec.name for spec in FIGURES)}"
    )


def figure(
    name: str,
    results: Results[Any] | Sequence[Results[Any]],
    *,
    ax: Axes | None = None,
    **options: Unpack[FigureOptions],
) -> Figure:
    """Return a figure as written by ``loradiag plot``; it is not registered with ``pyplot``.

    Args:
        name: One of ``FIGURES``.
        results: Results of one run, or of several to compare; those without the records that the
            figure needs are ignored.
        ax: Axes to draw the first panel of one run on, as ``panel`` does, in place of a page;
            their figure is returned.
        **options: ``labels``: label of each of ``results``; default by the inputs that were
            measured. ``width``: ``column`` (3.3 in, 7 pt) or ``slide`` (10 in, 12.5 pt), the
            default. ``by``: ``layer`` (the default), or ``type`` to pool the layers of a module
            type. ``field``: for a heat map, dotted name of a numeric field.
            ``rank``: the rank to draw where several were measured.
            ``files``: path of each of ``results``; the label of runs that are otherwise identical.
            ``plain``: whether to omit title and notes, for a paper with its own caption.

    Raises:
        TypeError: An option is unknown.
        UsageError: An argument is invalid, the figure does not exist, or the results cannot be
            drawn.
    """
    known = FigureOptions.__annotations__
    if unknown := next((option for option in options if option not in known), None):
        raise TypeError(f"unexpected keyword argument {unknown!r}; use one of {', '.join(known)}")
    if ax is not None:
        return _draw_on(ax, name, results, options)
    try:
        return _draw(*_make_page(name, results, options))
    except UndrawableError as error:
        raise UsageError(f"{name}: {error}") from error


def panel(
    figure: str,
    records: Results[Any] | Iterable[Any],
    ax: Axes | None = None,
    *,
    name: str | None = None,
    by: str = "layer",
    field: str | None = None,
    rank: int | None = None,
) -> Axes:
    """Draw one panel of a figure; ``lora_diag.plots.NAME`` draws that of the figure of this name.

    A figure with a panel per module type has all layers in this one, whatever its ``name``.

    Args:
        figure: One of ``FIGURES``.
        records: Results of a run, or its records; those of another kind than the figure's are
            ignored.
        ax: Axes to draw on, whose fonts are kept; default those of a new figure.
        name: Name of the panel where the figure has several, such as an evaluation set, an adapter
            of ``residual``, ``rows`` of ``angles`` or ``energy`` of ``allocation``; default the
            first.
        by: ``layer``, or ``type`` to pool the layers of a module type.
        field: For a heat map, dotted name of a numeric field; default by the kind of record.
        rank: The rank to draw where several were measured.

    Returns:
        The Axes drawn on.

    Raises:
        UsageError: There is no such figure or panel, no record is of the figure's kind, or the
            records cannot be drawn.

    Example:
        >>> import lora_diag
        >>> results = lora_diag.spectrum(
        ...     "sample_checkpoints/base", "sample_checkpoints/full_ft", layers="mlp"
        ... )
        >>> [label.get_text() for label in panel("heatmap", results, field="fro").get_yticklabels()]
        ['mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj']
    """
    spec = figure_named(figure)
    make_page = _FEATURES[figure].load(spec.page)
    return draw_panel(make_page, records, spec.kind, ax, name, Options(by, field, rank))


def figure_of(results: Results[Any], name: str | None = None, **options: Any) -> Figure:
    """Return a figure that a notebook displays with any backend.

    Args:
        results: Results of one run.
        name: One of ``FIGURES``; None for the first that the records allow.
        **options: Of ``figure``.

    Raises:
        UsageError: There is no such figure, an option is invalid, or the records cannot be drawn.
    """
    drawable = (spec.name for spec in FIGURES if why_not(spec.name, results, **options) is None)
    name = name or next(drawable, None)
    if name is None:
        raise UsageError(f"results of loradiag {results.run.command}: no figure shows them")
    page = figure(name, results, **options)
    setattr(page, "_repr_png_", partial(encode_figure, page, "png"))  # noqa: B010  (Figure does not declare it)
    return page


def why_not(
    name: str, results: Results[Any] | Sequence[Results[Any]], **options: Unpack[FigureOptions]
) -> str | None:
    """Return why ``figure`` cannot draw some results; None if it can."""
    try:
        _make_page(name, results, options)
    except UndrawableError as error:
        return str(error)
    return None


def _draw_on(
    ax: Axes,
    name: str,
    results: Results[Any] | Sequence[Results[Any]],
    options: Mapping[str, Any],
) -> Figure:
    """Draw the first panel of one run on a user's axes, and return their figure.

    Raises:
        UsageError: There are several runs or options of a page, or the records cannot be drawn.
    """
    runs = [results] if isinstance(results, Results) else list(results)
    of_panels = {"by", "field", "rank"}
    if len(runs) != 1 or not of_panels.issuperset(options):
        problem = f"takes one run and {', '.join(sorted(of_panels))}"
        raise UsageError("ax", problem, "remove it for a page")
    try:
        panel(name, runs[0], ax, **options)
    except UndrawableError as error:
        raise UsageError(f"{name}: {error}") from error
    return cast(Figure, ax.figure)


def _draw(page: Page, style: PageStyle) -> Figure:
    with apply_style(style):
        return freeze_layout(make_figure(page, style))


def _make_page(
    name: str, results: Results[Any] | Sequence[Results[Any]], options: FigureOptions
) -> tuple[Page, PageStyle]:
    """Return the page of a figure, and its style.

    Raises:
        UsageError: The figure does not exist, or an argument is invalid.
        UndrawableError: The records cannot be drawn.
    """
    spec = figure_named(name)
    style = replace(page_style_of(options.get("width", "slide")), plain=options.get("plain", False))
    runs = [results] if isinstance(results, Results) else list(results)
    labels, by = options.get("labels", ()), options.get("by", "layer")
    if labels and len(labels) != len(runs):
        raise UsageError(
            f"{len(labels)} labels for {len(runs)} results; give one for each, in their order"
        )
    if by not in {"layer", "type"}:
        raise UsageError(Given("by", by), "unknown", "use layer or type")
    series = series_of(list(map(_select_naming_inputs, runs)), labels, options.get("files", ()))
    series = tuple(item for item in series if item.records)
    if spec.kind:
        series = tuple(item for item in series if kind_of(item.records[0]) == spec.kind)
        if not series:
            raise UndrawableError(f"no {spec.kind} records", "records")
        most = len(CATEGORIES) if spec.by_color else MAX_PANELS
        if len(series) > most:
            raise UndrawableError(
                f"{len(series)} runs are too many for one figure; give at most {most} results", ""
            )
    make_page = _FEATURES[name].load(spec.page)
    page_options = Options(by, options.get("field"), options.get("rank"))
    with apply_style(style):
        return make_page(series, style, page_options), style


def _select_naming_inputs(results: Results[Any]) -> Results[Any]:
    """Return results with only the inputs that name them in figures."""
    feature = feature_of(results.run.command)
    if feature is None or not feature.named_by:
        return results
    inputs = tuple(item for item in results.run.inputs if item.role in feature.named_by)
    return replace(results, run=results.run.model_copy(update={"inputs": inputs}))


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
        missing: What that command would add: ``records`` of the figure's kind, or ``values`` that
            the given records do not have; empty if it would not help.
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
        label: Label of each of ``results``.
        field: For the heat map: dotted name of a numeric field, such as ``energy.16``.
        show_rank: The rank to draw where several were measured.
        by: ``layer``, or ``type`` to pool the layers of a module type.
        width: ``column`` (3.3 in, 7 pt) or ``slide`` (10 in, 12.5 pt).
        format: Format of files in a folder: ``png`` (the default), ``svg`` or ``pdf``.
        layers: Regular expression; only layers whose name contains a match.
        plain: Whether to omit title and notes, for a paper with its own caption.
        overwrite: Replace existing files even if loradiag did not write them or they were edited
            since.
        **options: ``PlotOptions``.

    Returns:
        The requested figures, drawn or not, in the order of ``lora_diag.plots.FIGURES``.

    Raises:
        UsageError: There are no results, an argument is invalid or contradicts another one, a file
            may not be replaced, or the requested figure cannot be drawn.
        InputError: A results file cannot be read, or a figure cannot be written.
        NothingComparedError: No figure can be drawn from these records.

    Example:
        >>> results = lora_diag.spectrum(
        ...     "sample_checkpoints/base", "sample_checkpoints/full_ft"
        ... )  # doctest: +SKIP
        >>> plot(results, output="energy.pdf", figure="energy")  # doctest: +SKIP
    """
    options = fill_options(PlotOptions, options)
    figure, layers, overwrite = options["figure"], options["layers"], options["overwrite"]
    if not results:
        raise UsageError("no results: give at least one results file")
    path = Path(output)
    folder_exists = os.path.isdir(path)  # noqa: PTH112  (unlike Path.is_dir(), False also for names that no file can have)
    single = path.suffix.lower().removeprefix(".") in FORMATS and not folder_exists
    file_format = _choose_format(path, single, options["format"])
    _check_output(path, file_format if single else None, folder_exists, overwrite)
    if single and figure == "all":
        raise UsageError(path, "one file cannot hold all figures", "give a folder, or one $figure")
    if single and figure is None and options["field"] is not None:
        figure = next(spec.name for spec in FIGURES if "field" in spec.options)
    specs = FIGURES if figure in {None, "all"} else (figure_named(str(figure)),)
    _check_used("field", options["field"], "field", specs)
    _check_used("show_rank", options["show_rank"], "rank", specs)
    runs = _read_runs(results, layers)
    files: tuple[str, ...] = ()
    if not any(isinstance(source, Results) for source in results):
        files = tuple(map(str, results))
    figure_options: FigureOptions = {
        "labels": options["label"],
        "width": options["width"],
        "by": options["by"],
        "field": options["field"],
        "rank": options["show_rank"],
        "files": files,
        "plain": options["plain"],
    }
    drawn_figures: list[Drawn] = []
    pages: dict[Path, tuple[Page, PageStyle]] = {}
    for spec in specs:
        target = path if single else path / f"{spec.name}.{file_format}"
        shown = Drawn(spec.name, spec.shows, None, made_by=spec.made_by)
        try:
            page = _make_page(spec.name, runs, figure_options)
        except UndrawableError as error:
            if figure not in {None, "all"}:
                hint = ""
                if spec.made_by and error.missing == "records":
                    hint = f"; measure them with {spec.made_by}"
                raise UsageError(Given("figure", spec.name), f"{error}{hint}") from error
            drawn_figures.append(replace(shown, reason=str(error), missing=error.missing))
            continue
        if target in pages:
            problem = "one file cannot hold several figures"
            reason = f"{path}: {problem}; choose one with --figure, or give a folder"
            drawn_figures.append(replace(shown, reason=reason))
            continue
        if folder_exists:  # checked for all files before the first is drawn
            check_output(target, KINDS[file_format], overwrite)
        pages[target] = page
        drawn_figures.append(replace(shown, path=target))
    if not pages:
        raise _make_nothing_drawn_error(drawn_figures, runs)
    for target, page in pages.items():
        content = encode_figure(_draw(*page), file_format, options["width"])
        write_whole(target, content, KINDS[file_format], overwrite)
    return tuple(drawn_figures)


def _check_used(option: str, value: object, used: str, specs: Sequence[FigureSpec]) -> None:
    """Check that an option that is given is used by one of the figures.

    Raises:
        UsageError: It is not.
    """
    if value is None or any(used in spec.options for spec in specs):
        return
    users = " or ".join(spec.name for spec in FIGURES if used in spec.options)
    problem = f"not used by {specs[0].name}"
    raise UsageError(Given(option, value), problem, f"use it with {users}")


def _make_nothing_drawn_error(
    drawn_figures: Sequence[Drawn], runs: Sequence[Results[Any]]
) -> NothingComparedError:
    """Return the error that no figure can be drawn, with the reasons that other values would
    remove.
    """
    helpful = [shown for shown in drawn_figures if shown.missing != "records"]
    reasons = "; ".join(f"{shown.name}: {shown.reason}" for shown in helpful)
    others = (
        f"no figure draws results of {_list_commands(runs)}; show them with loradiag inspect "
        "or loradiag report"
    )
    return NothingComparedError(f"no figure can be drawn: {reasons or others}")


def _read_runs(
    results: Sequence[Results[Any] | Path | str], layers: str | None
) -> list[Results[Any]]:
    """Return results, limited to the layers whose name contains a match.

    Raises:
        UsageError: ``layers`` is no regular expression.
        NothingComparedError: No record is left.
    """
    runs = [source if isinstance(source, Results) else read_results(source) for source in results]
    if layers is not None:
        try:
            runs = [run.filter(layers) for run in runs]
        except re.error as error:
            raise UsageError(
                Given("layers", layers), f"not a valid regular expression ({error})", "correct it"
            ) from error
    if not any(map(drawable_records, runs)):
        reason = f"no name matches {layers}"
        if layers is None:
            reason = (
                f"results of loradiag {_list_commands(runs)} have no records of layers; show them "
                "with loradiag inspect"
            )
        raise NothingComparedError(f"no layer left to draw: {reason}")
    return runs


def _list_commands(runs: Sequence[Results[Any]]) -> str:
    return ", ".join(dict.fromkeys(run.run.command for run in runs))


def _choose_format(path: Path, single: bool, requested: str | None) -> str:
    """Return the format of the files.

    Raises:
        UsageError: The format is not supported, or contradicts the file's suffix.
    """
    suffix = path.suffix.lower().removeprefix(".")
    if requested is not None and requested not in FORMATS:
        raise UsageError(Given("format", requested), "unknown", f"use {', '.join(FORMATS)}")
    if single:
        if requested not in {None, suffix}:
            raise UsageError(
                path, f"the suffix .{suffix} contradicts $format {requested}", "give one of them"
            )
        return suffix
    # A folder's name may contain a dot, but the suffix of another image format is a mistake.
    mistakes = {"jpg", "jpeg", "eps", "ps", "gif", "tif", "tiff", "webp", "html", "jsonl"}
    if suffix in mistakes and not path.is_dir():
        raise UsageError(f"{path}: unsupported format; use .{', .'.join(FORMATS)}")
    return requested or "png"


def _check_output(
    path: Path, file_format: str | None, folder_exists: bool, overwrite: bool
) -> None:
    """Check, before drawing, that figures can be written; their folder may be missing, but not its
    parents.

    Args:
        path: A file of this format, or a folder, or a link to one.
        file_format: Format of the file; None for a folder.
        folder_exists: Whether the path is an existing folder.
        overwrite: Replace a file that loradiag did not write.

    Raises:
        UsageError: The path is a link to a file or not of the expected kind, or its file may not be
            replaced.
        InputError: The location is not writable.
    """
    if file_format is not None:
        check_output(path, KINDS[file_format], overwrite)
        return
    check_folder_of(path / "figure" if folder_exists else path)
    if os.path.lexists(path) and not folder_exists:
        raise UsageError(
            f"{path}: not a folder; give a folder, or a name that ends in .png, .svg or .pdf"
        )


def drawn_table(
    figures: Sequence[Drawn],
    width: int = 80,
    color: bool = False,
    next_command: str | None = None,
    verbose: bool = False,
) -> str:
    """Return a table of the figures drawn, the next command, and if ``verbose`` the reasons for
    those not drawn.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from lora_diag.rendering.statements import make_statement, summary_of
    from lora_diag.rendering.text import safe, to_text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="dim")
    for figure in figures:
        if figure.path is not None:
            table.add_row(figure.name, Text(safe(str(figure.path))), figure.shows)
    reasons = []
    for figure in figures:
        if figure.path is None:
            made_by = f"; {figure.made_by}" if figure.made_by and figure.missing else ""
            reasons.append(f"{figure.name}: {safe(figure.reason)}{made_by}")
    statements = [make_statement("not_drawn", "Not drawn", *reasons)] if verbose and reasons else []
    return to_text(Group(table, "", summary_of(statements, next_command)), width, color)
