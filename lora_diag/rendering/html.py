"""Tables and statements as HTML for notebooks, and model cards.

Names are escaped; nothing is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.style import Style
from rich.text import Text

from lora_diag.errors import InputError, UsageError
from lora_diag.files import CARD
from lora_diag.rendering.statements import Statement
from lora_diag.rendering.tables import Grid
from lora_diag.rendering.text import safe

# Maximum number of rows of a table; further rows are counted.
_MAX_ROWS = 40


def statement_html(statement: Statement) -> str:
    """Return a statement as a row: its label, its lead, and its details, which a reader opens."""
    text = _escape(statement.lead)
    if statement.details:
        details = "<br>".join(map(_escape, statement.details))
        text = f"<details><summary>{text}</summary>{details}</details>"
    label = _escape(statement.label)
    return (
        f'<tr><td style="text-align:left"><b>{label}</b></td><td '
        f'style="text-align:left">{text}</td></tr>'
    )


def grid_html(grid: Grid) -> str:
    """Return the first rows of a table, shaded as in a terminal, and the number of further ones."""
    titles = (grid.title, *(column.title for column in grid.columns))
    head = "".join(f"<th>{_escape(title)}</th>" for title in titles)
    cells = (column.cells[:_MAX_ROWS] for column in grid.columns)
    rows = zip(grid.names[:_MAX_ROWS], *cells, strict=True)
    body = "".join(f"<tr>{''.join(map(_make_cell, row))}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    if grid.caption:
        table = f"<p><b>{_escape(grid.caption)}</b></p>{table}"
    if len(grid.names) > _MAX_ROWS:
        table += f"<p>and {len(grid.names) - _MAX_ROWS} more rows</p>"
    return table


def _make_cell(cell: str | Text) -> str:
    """Return a cell, shaded as in a terminal."""
    css = ""
    if isinstance(cell, Text) and cell.style:
        css = Style.parse(str(cell.style)).get_html_style()
    attribute = f' style="{css}"' if css else ""
    return f"<td{attribute}>{_escape(str(cell))}</td>"


def _escape(text: str) -> str:
    """Return text that is safe in a page."""
    return escape(safe(text))


def escape_markdown(text: str) -> str:
    r"""Return safe text for inside a line of Markdown, where no markup, HTML, mention, issue or
    link has an effect.

    >>> escape_markdown("<b>|@me #1 https://x *y*")
    '&#60;b&#62;&#124;&#64;me &#35;1 https&#58;//x &#42;y&#42;'
    >>> escape_markdown("self_attn.q_proj _x_")
    'self_attn.q_proj &#95;x&#95;'
    """
    markup = r"[\\`*{}\[\]<>#|~&@!^$]|:(?=//)|(?<!\w)_|_(?!\w)|(?<=www)\."
    return re.sub(markup, lambda match: f"&#{ord(match[0])};", safe(text)).strip()


def code_span(text: str) -> str:
    """Return text from a file as a code span of Markdown, with apostrophes in place of
    backticks.
    """
    return f"`{safe(text).replace('`', chr(39))}`"


def model_card(
    title: str,
    base_name: str,
    body: Sequence[str],
    numbers: str,
    version: str,
    command: str,
    library: str = "",
    lora: bool = True,
) -> str:
    """Return the ``README.md`` of a folder that loradiag wrote: metadata, title, body, and the
    command that made it.

    Args:
        title: Title in Markdown.
        base_name: The base model.
        body: Paragraphs, lists and tables, each without blank lines around it.
        numbers: Results file in the folder.
        version: Version of loradiag.
        command: The command.
        library: The library that loads the folder, for the metadata; may be empty.
        lora: Whether it is a LoRA adapter.
    """
    quoted = safe(base_name).replace("'", "''")
    head = ["---", f"base_model: '{quoted}'"]
    if library:
        head.append(f"library_name: {library}")
    head.append("tags:")
    if lora:
        head.append("- lora")
    head += ["- loradiag", "---"]
    made = f"Made by loradiag {version}; `{numbers}` has the numbers of every weight:"
    return "\n\n".join(["\n".join(head), f"# {title}", *body, made, f"    {safe(command)}"]) + "\n"


def with_section(card: str, name: str, section: str) -> str:
    """Return a card with a section in place of an earlier one of that name, or at its end.

    Front matter and line ends stay. A section that lost its end stays, too: text after it may be
    the user's.

    Args:
        card: The existing card.
        name: Name of the section in its markers, such as ``gate``.
        section: The new text.

    Example:
        >>> card = with_section("# Model", "gate", "passed")
        >>> (
        ...     card == with_section(card, "gate", "passed"),
        ...     "passed" in with_section(card, "gate", "failed"),
        ... )
        (True, False)
    """
    begin, end = f"<!-- loradiag {name}: begin -->", f"<!-- loradiag {name}: end -->"
    newline = "\r\n" if "\r\n" in card else "\n"
    block = f"{begin}\n{section.strip()}\n{end}".replace("\n", newline)
    match = re.search(f"{begin}((?!{begin}).)*?{end}", card, re.DOTALL)
    if match is not None:
        return f"{card[: match.start()]}{block}{card[match.end() :]}"
    before = f"{card.rstrip()}{newline * 2}" if card.strip() else ""
    return f"{before}{block}{newline}"


def read_card(path: Path) -> str:
    """Return the text of a model card with its line ends unchanged; empty if it does not exist.

    Raises:
        UsageError: Its name does not end in .md or .markdown, or it is not Markdown in UTF-8.
        InputError: It cannot be read.
    """
    try:
        exists = path.exists()
        is_markdown = path.suffix.lower() in {".md", ".markdown"}
        if not is_markdown or (exists and not CARD.is_at(path)):
            raise UsageError(
                f"{path}: is not Markdown; give a Markdown file whose name ends in .md"
            )
        return path.read_bytes().decode("utf-8") if exists else ""
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text ({error}); convert it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
