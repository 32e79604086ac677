"""Display of results in a notebook: the tables and the summary of their command, as HTML."""

from __future__ import annotations

from html import escape
from typing import Any

from lora_diag.catalog import feature_of
from lora_diag.records import Results
from lora_diag.rendering.html import grid_html, statement_html
from lora_diag.rendering.statements import Statement

# Characters of a line where a command has a table for terminals and no section of a report.
_WIDTH = 100


def html_of(results: Results[Any]) -> str:
    """Return results as HTML. Names are escaped, and nothing is loaded from elsewhere."""
    feature = feature_of(results.run.command)
    if feature is None or not feature.statements or (feature.table and not feature.section):
        text = feature.load(feature.table)(results, _WIDTH) if feature and feature.table else repr(results)
        return f"<pre>{escape(text)}</pre>"
    tables = "".join(grid_html(grid) for grid in feature.tables(results, "type"))
    statements: list[Statement] = feature.load(feature.statements)(results)
    first = sorted(statements, key=lambda statement: statement.key != "unfinished")
    return f"<div>{tables}<table><tbody>{''.join(map(statement_html, first))}</tbody></table></div>"
