"""``report``: combine the results of several runs in a page, a text or a table.

A table has one row per record, or per entry of their lists (``records/frames.py``); its first
column, ``results``, is the file of the row.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any, Unpack

from lora_diag.catalog import read_results
from lora_diag.errors import Given, InputError, UsageError, require, safe
from lora_diag.feature import load
from lora_diag.files import CSV, MARKDOWN, PAGE, PARQUET, Kind, check_output, write_whole
from lora_diag.records import Results
from lora_diag.records.frames import Columns, record_columns, unify_types, value_columns
from lora_diag.records.names import short_names
from lora_diag.reports import ReportOptions
from lora_diag.reports.evidence import Evidence, Source
from lora_diag.running.options import fill_options, show_options

SUFFIXES = {
    ".html": "html",
    ".htm": "html",
    ".md": "md",
    ".markdown": "md",
    ".csv": "csv",
    ".parquet": "parquet",
}

# Format -> what renders it, and the kind of its file.
_RENDERERS: dict[str, tuple[str, Kind]] = {
    "html": ("lora_diag.reports.html:render_page", PAGE),
    "md": ("lora_diag.reports.markdown:markdown_report", MARKDOWN),
    "csv": ("lora_diag.reports.run:to_csv", CSV),
    "parquet": ("lora_diag.reports.run:to_parquet", PARQUET),
}
_TABLES = ("csv", "parquet")

# Prefixes of cells that spreadsheets interpret as formulas (OWASP, "CSV injection").
_FORMULA = ("=", "+", "-", "@")


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
        format: ``html``, ``md``, ``csv`` or ``parquet``; default by the suffix of ``output``, else
            ``html``.
        overwrite: Replace an existing ``output`` even if loradiag did not write it or it was edited
            since.
        values: For ``csv`` and ``parquet``: one row per entry of lists, such as singular values.
        **options: ``ReportOptions``.

    Returns:
        The report: bytes for ``parquet``, else text.

    Raises:
        UsageError: There are no results, the format is unknown or has no ``values``, or ``output``
            is one of the results files, or exists and may not be replaced.
        InputError: A file cannot be read or written, or a package that the format needs is not
            installed.

    Example:
        >>> import lora_diag
        >>> base, tuned = "sample_checkpoints/base", "sample_checkpoints/full_ft"
        >>> results = lora_diag.spectrum(base, tuned, layers="o_proj")
        >>> print(report(results, format="md").splitlines()[0])
        # full_ft compared with base
    """
    options = fill_options(ReportOptions, options)
    output, values, overwrite = options["output"], options["values"], options["overwrite"]
    if not results:
        raise UsageError("no results: give at least one results file")
    output_format = format_of(output, options["format"])
    renderer, kind = _RENDERERS[output_format]
    if values and output_format not in _TABLES:
        raise UsageError(
            Given("values"),
            f"not available with $format {output_format}",
            f"use {' or '.join(_TABLES)}",
        )
    if output is not None:
        files = [item for item in results if not isinstance(item, Results)]
        if os.path.realpath(output) in map(os.path.realpath, files):
            raise UsageError(
                f"{output}: is one of the results files; choose another name for the report"
            )
        check_output(Path(output), kind, overwrite)
    evidence = Evidence(tuple(map(_read_source, results)))
    render = load(renderer)
    rendered: str | bytes
    if output_format in _TABLES:
        rendered = render(evidence, values)
    else:
        rendered = render(evidence)
    if output is not None:
        content = rendered
        if isinstance(content, str):
            content = content.encode("utf-8", "backslashreplace")
        write_whole(Path(output), content, kind, overwrite)
    return rendered


def _read_source(item: Path | str | Results[Any]) -> Source:
    """Return a results file, or results in memory named by their command, as a source."""
    if isinstance(item, Results):
        return Source(f"{item.run.command}.jsonl", item)
    return Source(str(Path(item)), read_results(item))


def format_of(output: Path | str | None, format: str | None) -> str:
    """Return the format of a report: as given, else by the suffix of its file; ``html`` without a
    file.

    Raises:
        UsageError: The format is not known.
    """
    suffix = Path(output).suffix.lower() if output is not None else ".html"
    chosen = format or SUFFIXES.get(suffix)
    if chosen is None:
        raise UsageError(
            output, "unknown suffix", f"choose the format with $format: {', '.join(_RENDERERS)}"
        )
    if chosen not in _RENDERERS:
        raise UsageError(Given("format", chosen), "unknown", f"use one of {', '.join(_RENDERERS)}")
    return chosen


def to_csv(evidence: Evidence, values: bool = False) -> str:
    """Return all records except ``run`` and ``end`` as CSV (RFC 4180), with unrounded numbers.

    Text that a spreadsheet would interpret as a formula is prefixed with ``'``; control characters
    are escaped.

    Args:
        evidence: The runs.
        values: Return the entries of the records' lists, such as singular values, instead of the
            records.
    """
    columns = _make_columns(evidence, values)
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    for row in (columns, *zip(*columns.values(), strict=True)):
        writer.writerow(map(_make_cell, row))
    return buffer.getvalue()


def to_parquet(evidence: Evidence, values: bool = False) -> bytes:
    """Return the rows of ``to_csv`` as a Parquet file, with types and nulls."""
    with require(Given("format", "parquet"), "arrow", kind=InputError):
        import pyarrow as pa
        import pyarrow.parquet as pq
    buffer = io.BytesIO()
    table = pa.table(unify_types(_make_columns(evidence, values)))
    # The key by which lora_diag.files recognizes the table.
    pq.write_table(table.replace_schema_metadata({b"loradiag": b"report"}), buffer)
    return buffer.getvalue()


def _make_columns(evidence: Evidence, values: bool) -> Columns:
    records = []
    paths: list[str] = []
    for source in evidence.sources:
        results, origin = source.results, {"results": source.name}
        records += [
            (record, origin) for record in (*results.layers, *results.whole, *results.left_out)
        ]
        paths += source.paths()
    make = value_columns if values else record_columns
    return make(records, short_names(paths)) or {"results": []}


def _make_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = safe(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
