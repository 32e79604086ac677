"""``report``: combine the results of several runs in a page, a text or a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

from lora_diag.catalog import read_results
from lora_diag.errors import UsageError
from lora_diag.files import CSV, MARKDOWN, PAGE, PARQUET, Kind, check_output, write_whole
from lora_diag.records import Results
from lora_diag.records.run import timestamp
from lora_diag.reports import ReportOptions
from lora_diag.reports.evidence import Evidence, Source, format_minute
from lora_diag.running.options import fill_options, show_options

SUFFIXES = {".html": "html", ".htm": "html", ".md": "md", ".markdown": "md", ".csv": "csv", ".parquet": "parquet"}


@show_options
def report(
    *results: Path | str | Results[Any],
    **options: Unpack[ReportOptions],
) -> str | bytes:
    """Return a report on any mix of results.

    Opens no checkpoint and computes no singular value.

    Args:
        results: Results files, or results in memory.
        output: File to write; an earlier report is replaced.
        format: ``html``, ``md``, ``csv`` or ``parquet``; default by the suffix of ``output``, else ``html``.
        overwrite: Replace an existing ``output`` even if loradiag did not write it or it was edited since.
        values: For ``csv`` and ``parquet``: one row per entry of lists, such as singular values.
        **options: ``ReportOptions``.

    Returns:
        The report: bytes for ``parquet``, else text.

    Raises:
        UsageError: There are no results, the format is unknown, or ``output`` exists and may not be replaced.
        InputError: A file cannot be read or written, or a package that the format needs is not installed.

    Example:
        >>> import lora_diag
        >>> base, tuned = "sample_checkpoints/base", "sample_checkpoints/full_ft"
        >>> results = lora_diag.spectrum(base, tuned, layers="o_proj")
        >>> print(report(results, format="md").splitlines()[0])
        # sample_checkpoints/full_ft compared with sample_checkpoints/base
    """
    arguments = fill_options(ReportOptions, options)
    output, format, overwrite, values = (arguments[name] for name in ("output", "format", "overwrite", "values"))
    if not results:
        raise UsageError("no results: give at least one results file")
    output_format = format_of(output, format)
    render, kind = _RENDERERS[output_format]
    if values and output_format not in _TABLES:
        raise UsageError(f"--values: not available with --format {output_format}; use {' or '.join(_TABLES)}")
    if output is not None:
        _refuse_inputs(Path(output), [item for item in results if not isinstance(item, Results)])
        check_output(Path(output), kind, overwrite)
    evidence = Evidence(tuple(map(_make_source, results)))
    rendered = render(evidence, values) if output_format in _TABLES else render(evidence)
    if output is not None:
        content = rendered if isinstance(rendered, bytes) else rendered.encode("utf-8", "backslashreplace")
        write_whole(Path(output), content, kind, overwrite)
    return rendered


def _render_html(evidence: Evidence) -> str:
    from lora_diag.reports.html import html_report, images_of

    return html_report(evidence, images_of(evidence), format_minute(timestamp()))


def _render_markdown(evidence: Evidence) -> str:
    from lora_diag.reports.markdown import markdown_report

    return markdown_report(evidence)


def _render_csv(evidence: Evidence, values: bool) -> str:
    from lora_diag.reports.tabular import to_csv

    return to_csv(evidence, values)


def _render_parquet(evidence: Evidence, values: bool) -> bytes:
    from lora_diag.reports.tabular import to_parquet

    return to_parquet(evidence, values)


_RENDERERS: dict[str, tuple[Callable[..., str | bytes], Kind]] = {
    "html": (_render_html, PAGE),
    "md": (_render_markdown, MARKDOWN),
    "csv": (_render_csv, CSV),
    "parquet": (_render_parquet, PARQUET),
}
FORMATS = tuple(_RENDERERS)
_TABLES = ("csv", "parquet")


def format_of(output: Path | str | None, format: str | None) -> str:
    """Return the format of a report: as given, else by the suffix of its file.

    Raises:
        UsageError: The format is not known.
    """
    suffix = Path(output).suffix.lower() if output is not None else ".html"
    chosen = format or SUFFIXES.get(suffix)
    if chosen is None:
        raise UsageError(f"{output}: unknown suffix; choose the format with --format: {', '.join(FORMATS)}")
    if chosen not in FORMATS:
        raise UsageError(f"--format {chosen}: unknown; use one of {', '.join(FORMATS)}")
    return chosen


def _make_source(item: Path | str | Results[Any]) -> Source:
    if isinstance(item, Results):
        return Source(f"{item.run.command}.jsonl", item)
    return Source(str(Path(item)), read_results(Path(item)))


def _refuse_inputs(output: Path, inputs: Sequence[Path | str]) -> None:
    """Refuse to overwrite an input with the report.

    Raises:
        UsageError: The output is one of the inputs.
    """
    for path in inputs:
        if os.path.realpath(path) == os.path.realpath(output):
            raise UsageError(f"{output}: is one of the results files; choose another name for the report")
