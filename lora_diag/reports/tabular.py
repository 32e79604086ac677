"""Records → a tidy table: one row per record, or per entry of their lists (``records/frames.py``).

The first column, ``results``, is the file of the row.
"""

from __future__ import annotations

import csv
import io
from typing import Any

from lora_diag.errors import InputError, safe
from lora_diag.records.frames import Columns, record_columns, unify_types, value_columns
from lora_diag.records.names import short_names
from lora_diag.reports.evidence import Evidence

# Prefixes of cells that spreadsheets interpret as formulas (OWASP, "CSV injection").
_FORMULA = ("=", "+", "-", "@")


def to_csv(evidence: Evidence, values: bool = False) -> str:
    """Return all records except ``run`` and ``end`` as CSV (RFC 4180), with unrounded numbers.

    Text that a spreadsheet would interpret as a formula is prefixed with ``'``; control characters are escaped.

    Args:
        evidence: The runs.
        values: Return the entries of the records' lists, such as singular values, instead of the records.
    """
    columns = _make_columns(evidence, values)
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(map(_make_cell, columns))
    writer.writerows([_make_cell(value) for value in row] for row in zip(*columns.values(), strict=True))
    return buffer.getvalue()


def to_parquet(evidence: Evidence, values: bool = False) -> bytes:
    """Return the same rows as Parquet.

    Raises:
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError("--format parquet: needs pyarrow; install it with pip install pyarrow, or use csv") from error
    buffer = io.BytesIO()
    table = pa.table(unify_types(_make_columns(evidence, values)))
    # The key by which lora_diag.files recognizes the table.
    pq.write_table(table.replace_schema_metadata({b"loradiag": b"report"}), buffer)
    return buffer.getvalue()


def _make_columns(evidence: Evidence, values: bool) -> Columns:
    records = [
        (record, {"results": source.name})
        for source in evidence.sources
        for record in (*source.results.layers, *source.results.whole, *source.results.left_out)
    ]
    paths = (run_input.path for source in evidence.sources for run_input in source.results.run.inputs)
    make = value_columns if values else record_columns
    return make(records, short_names(paths)) or {"results": []}


def _make_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = safe(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
