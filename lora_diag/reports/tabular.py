"""Records → a flat table: one row a record, nested fields as dotted columns (``energy.8``, ``resolution.verdict``).

The first column, ``results``, says which file a row is from. Lists stay one cell: JSON in CSV, a list in Parquet.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from lora_diag.errors import InputError
from lora_diag.reports.evidence import Evidence

# A spreadsheet takes a cell for a formula that begins so (OWASP, "CSV injection").
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def to_csv(evidence: Evidence) -> str:
    """Return all records but ``run`` and ``end`` as CSV (RFC 4180); numbers are written unrounded.

    A text that a spreadsheet would run as a formula gets a ``'`` in front.
    """
    rows = list(_rows(evidence))
    buffer = io.StringIO()
    writer = csv.DictWriter(
        buffer, list(dict.fromkeys(name for row in rows for name in row)) or ["results"], restval=""
    )
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def to_parquet(evidence: Evidence) -> bytes:
    """Return the same rows as Parquet.

    Raises:
        InputError: pandas or pyarrow is not installed.
    """
    try:
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            f"--format parquet needs {error.name}: pip install pandas pyarrow; csv needs neither"
        ) from error
    rows = list(_rows(evidence))
    for name in _mixed(rows):
        rows = [{**row, name: str(row[name])} if row.get(name) is not None else row for row in rows]
    buffer = io.BytesIO()
    table = pa.Table.from_pandas(pd.DataFrame(rows), preserve_index=False)
    # The key by which lora_diag.files knows the table again.
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), b"loradiag": b"report"}), buffer)
    return buffer.getvalue()


def _rows(evidence: Evidence) -> Iterator[dict[str, Any]]:
    for source in evidence.sources:
        results = source.results
        for record in (*results.layers, *results.whole, *results.left_out):
            yield {"results": source.name, **_flat(record.model_dump(mode="json"))}


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields as dotted ones.

    >>> _flat({"layer": "q", "energy": {"8": 0.5}})
    {'layer': 'q', 'energy.8': 0.5}
    """
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _mixed(rows: list[dict[str, Any]]) -> list[str]:
    """Return the columns that hold both text and numbers (a verdict's ``measured``), which Parquet cannot."""
    kinds: dict[str, set[bool]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                kinds.setdefault(name, set()).add(isinstance(value, str))
    return [name for name, found in kinds.items() if len(found) > 1]
