"""Records → GitHub-flavoured Markdown for a pull request or a model card, below 60 KB.

Names from files are code spans or have their markup escaped, so that they create no links, mentions
or formatting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import starmap

from lora_diag.records.names import module_type_of, type_order
from lora_diag.rendering.html import escape_markdown
from lora_diag.rendering.tables import Grid
from lora_diag.rendering.text import crop, plain, safe, safe_lines, short
from lora_diag.rendering.verdicts import verdict_grid
from lora_diag.reports.evidence import Evidence
from lora_diag.reports.fields import fields_of, layers_of
from lora_diag.reports.subject import (
    ReportSubject,
    gate_outcome,
    sections_of,
    subject_of,
)

# GitHub limits comments to 65,536 characters.
MAX_BYTES = 60_000
# Maximum number of rows of a table, of named layers or verdicts, and of characters of a name.
ROWS, NAMED, NAME = 40, 10, 90
# Width of the table of verdicts, in characters.
WIDTH = 400


def markdown_report(evidence: Evidence) -> str:
    """Return the report: answers, next steps, sections of runs, columns by module type, gate,
    inputs.
    """
    subject = subject_of(evidence)
    parts = [f"# {escape_markdown(crop(subject.title, 200))}"]
    parts += [f"> **Unfinished:** {escape_markdown(line)}" for line in subject.unfinished]
    for answer in subject.answers:
        lines = [f"**{answer.question}** {escape_markdown(answer.says)}"]
        lines += [f"- {escape_markdown(line)}" for line in answer.more]
        parts.append("\n".join(lines))
    parts += [
        *_make_advice(subject),
        *_make_sections(evidence),
        *_make_table(evidence),
        *_make_gate(evidence),
        _list_runs(evidence),
    ]
    return safe_lines(_join_fitting(parts))


def _join_fitting(parts: Sequence[str]) -> str:
    """Join the first parts that fit, and state if some do not."""
    kept: list[str] = []
    room = MAX_BYTES - 200
    for part in parts:
        room -= len(part.encode()) + 2
        if room < 0:
            kept.append(
                "*Truncated to stay below 60 KB; `loradiag report --format html` shows everything.*"
            )
            break
        kept.append(part)
    return "\n\n".join(kept) + "\n"


def _format_table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[bool], noun: str = ""
) -> str:
    """Return a table of escaped cells, and the number of rows beyond the limit.

    Args:
        titles: Headings, escaped.
        rows: Rows of as many cells, escaped.
        right: Whether each column is aligned to the right.
        noun: What a row is, after a blank, in the note on further rows; may be empty.
    """
    lines = [f"| {' | '.join(row)} |" for row in rows]
    note = f"\n\n*and {len(lines) - ROWS} more{noun}*" if len(lines) > ROWS else ""
    marks = "|".join("--:" if is_right else "---" for is_right in right)
    return "\n".join([f"| {' | '.join(titles)} |", f"|{marks}|", *lines[:ROWS]]) + note


def _escape_cells(name: str, cells: Iterable[str]) -> list[str]:
    """Return a row of a table: a name as code, then its cells."""
    return [code(name), *(escape_markdown(cell.replace("\n", " ")) for cell in cells)]


def _make_table(evidence: Evidence) -> list[str]:
    """Return the main columns by module type, pooled as declared, with notes; empty without
    columns.
    """
    layers = sorted(layers_of(evidence), key=type_order)
    groups: dict[str, list[int]] = {}
    for position, layer in enumerate(layers):
        groups.setdefault(module_type_of(layer), []).append(position)
    columns = [field for field in fields_of(evidence, layers) if field.main]
    if not columns:
        return []
    heads = [escape_markdown(f"{field.title} {crop(field.group, 30)}".strip()) for field in columns]
    rows = []
    for name, positions in groups.items():
        pooled = [plain(field.together(positions)) for field in columns]
        rows.append(_escape_cells(name, [str(len(positions)), *pooled]))
    table = _format_table(
        ["module type", "n", *heads], rows, [False, *[True] * (len(heads) + 1)], " module types"
    )
    pooling = (
        "Values of a type are pooled as in the command's table, else medians or the most "
        "frequent words."
    )
    return ["## By module type", f"{table}\n\n{pooling}"]


def _make_sections(evidence: Evidence) -> list[str]:
    """Return a part for each section: its summary and its tables."""
    parts = []
    for section in sections_of(evidence):
        parts.append(f"## {escape_markdown(crop(section.title, 200))}")
        items = []
        for statement in section.statements:
            text = escape_markdown("; ".join(statement.lines))
            items.append(f"- **{escape_markdown(statement.label)}** {text}")
        if items:
            parts.append("\n".join(items))
        parts += map(_format_grid, section.grids)
    return parts


def _format_grid(grid: Grid) -> str:
    """Return a table with its caption and explanation."""
    titles = [grid.title, *(escape_markdown(column.title) for column in grid.columns)]
    rows = starmap(_escape_cells, grid.rows())
    right = [False, *(column.justify == "right" for column in grid.columns)]
    parts = [_format_table(titles, rows, right)]
    if grid.caption:
        parts.insert(0, f"**{escape_markdown(grid.caption)}**")
    if grid.about:
        parts.append(escape_markdown(grid.about))
    return "\n\n".join(parts)


def _make_advice(subject: ReportSubject) -> list[str]:
    parts = ["## Next steps"] if subject.advice else []
    for position, step in enumerate(subject.advice, 1):
        about = f" About {', '.join(map(code, step.about))}." if step.about else ""
        names = [code(short(layer)) for layer in step.layers]
        layers = f" Layers: {_list_first(names)}." if names else ""
        lines = (
            f"{position}. **{escape_markdown(step.do)}.** {escape_markdown(step.because)}{about}",
            code(step.command, 1000),
            f"Rule: {step.rule}.{layers}",
        )
        parts.append("\n   ".join(lines))
    return parts


def _make_gate(evidence: Evidence) -> list[str]:
    outcome, verdicts = gate_outcome(evidence)
    if not outcome:
        return []
    parts = ["## Gate", f"{escape_markdown(outcome)}."]
    if verdicts:
        parts.append(_format_grid(verdict_grid(verdicts, WIDTH)))
    return parts


def _list_runs(evidence: Evidence) -> str:
    """Return the section on the measured runs: command, version, inputs and number of records of
    each.
    """
    lines = ["## Measured", ""]
    for source in evidence.sources:
        run = source.results.run
        inputs = [f"{escape_markdown(item.role)} {code(item.path)}" for item in run.inputs]
        state = "" if source.results.end is not None else "; the run did not finish"
        made = f"; started {source.made}" if source.made else ""
        lines.append(
            f"- {code(source.name)}: loradiag {escape_markdown(run.command)} "
            f"{escape_markdown(run.version)}: {_list_first(inputs)}; "
            f"{source.count} records{made}{state}"
        )
    return "\n".join(lines)


def _list_first(words: Sequence[str]) -> str:
    """Return the first ``NAMED`` words, and the number of the others."""
    shown = ", ".join(words[:NAMED])
    return f"{shown} and {len(words) - NAMED} more" if len(words) > NAMED else shown


def code(text: str, limit: int = NAME) -> str:
    r"""Return a code span for any text in a table, truncated to ``limit``, with a fence longer than
    its backticks.

    >>> code("q_proj"), code("a`b|c")
    ('`q_proj`', '``a`b\\|c``')
    """
    shown = crop(safe(text), limit).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    return f"{fence}{pad}{shown}{pad}{fence}"
