"""Tables and statements as HTML, for notebooks. Names are escaped, and nothing is loaded from elsewhere."""

from __future__ import annotations

from html import escape

from rich.style import Style
from rich.text import Text

from lora_diag.rendering.columns import Grid
from lora_diag.rendering.statements import Statement
from lora_diag.rendering.text import safe

# Maximum number of rows of a table; further rows are counted.
_ROWS = 40


def statement_html(statement: Statement) -> str:
    """Return a statement as a row: its label, its lead, and its details, which a reader opens."""
    lead, details = _to_plain_text(statement.lead), "".join(f"<br>{_to_plain_text(line)}" for line in statement.details)
    text = f"<details><summary>{lead}</summary>{details[4:]}</details>" if details else lead
    label = _to_plain_text(statement.label)
    return f'<tr><td style="text-align:left"><b>{label}</b></td><td style="text-align:left">{text}</td></tr>'


def grid_html(grid: Grid) -> str:
    """Return a table, with the shades that cells have in a terminal."""
    head = "".join(
        f"<th>{_to_plain_text(title)}</th>" for title in (grid.title, *(column.title for column in grid.columns))
    )
    rows = zip(grid.names, *(column.cells for column in grid.columns), strict=True)
    body = "".join(f"<tr>{''.join(map(_make_cell, row))}</tr>" for row, _ in zip(rows, range(_ROWS), strict=False))
    note = f"<p>and {len(grid.names) - _ROWS} more rows</p>" if len(grid.names) > _ROWS else ""
    caption = f"<p><b>{_to_plain_text(grid.caption)}</b></p>" if grid.caption else ""
    return f"{caption}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _make_cell(cell: str | Text) -> str:
    """Return a cell, shaded as in a terminal."""
    style = Style.parse(str(cell.style)) if isinstance(cell, Text) and cell.style else Style.null()
    css = style.get_html_style()
    return f'<td style="{css}">{_to_plain_text(str(cell))}</td>' if css else f"<td>{_to_plain_text(str(cell))}</td>"


def _to_plain_text(text: str) -> str:
    return escape(safe(text))
