"""Records → GitHub-flavoured Markdown for a pull request or a model card, below 60 KB.

Names from files are code spans or have their markup escaped, so that they create no links, mentions
or formatting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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
    parts = [
        f"# {escape_markdown(crop(subject.title, 200))}",
        *(f"> **Unfinished:** {escape_markdown(line)}" for line in subject.unfinished),
        *(
            f"**{answer.question}** {escape_markdown(answer.says)}" + _list_items(answer.more)
            for answer in subject.answers
        ),
        *_make_advice(subject),
        *_make_sections(evidence),
        *_make_table(evidence),
        *_make_gate(evidence),
        _list_runs(evidence),
    ]
    return safe_lines(_join_fitting([part for part in parts if part]))


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


def _list_items(lines: Sequence[str]) -> str:
    return "".join(f"\n- {escape_markdown(line)}" for line in lines)


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
    rows = [
        [
            code(name),
            str(len(positions)),
            *(escape_markdown(plain(field.together(positions))) for field in columns),
        ]
        for name, positions in groups.items()
    ]
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
        statements = "\n".join(
            f"- **{escape_markdown(statement.label)}** "
            f"{escape_markdown('; '.join(statement.lines))}"
            for statement in section.statements
        )
        parts += [
            f"## {escape_markdown(crop(section.title, 200))}",
            *([statements] if statements else []),
        ]
        parts += map(_format_grid, section.grids)
    return parts


def _format_grid(grid: Grid) -> str:
    """Return a table with its caption and explanation."""
    titles = [grid.title, *(escape_markdown(column.title) for column in grid.columns)]
    rows = (
        [code(name), *(escape_markdown(cell.replace("\n", " ")) for cell in cells)]
        for name, cells in grid.rows()
    )
    right = [False, *(column.justify == "right" for column in grid.columns)]
    caption = f"**{escape_markdown(grid.caption)}**\n\n" if grid.caption else ""
    about = f"\n\n{escape_markdown(grid.about)}" if grid.about else ""
    return caption + _format_table(titles, rows, right) + about


def _make_advice(subject: ReportSubject) -> list[str]:
    parts = ["## Next steps"] if subject.advice else []
    for position, step in enumerate(subject.advice, 1):
        about = f" About {', '.join(map(code, step.about))}." if step.about else ""
        layers = f" Layers: {_list_layers(step.layers)}." if step.layers else ""
        parts.append(
            f"{position}. **{escape_markdown(step.do)}.** {escape_markdown(step.because)}{about}\n "
            "  "
            f"{code(step.command, 1000)}\n   Rule: {step.rule}.{layers}"
        )
    return parts


def _make_gate(evidence: Evidence) -> list[str]:
    outcome, verdicts = gate_outcome(evidence)
    table = [_format_grid(verdict_grid(verdicts, WIDTH))] if verdicts else []
    return ["## Gate", f"{escape_markdown(outcome)}.", *table] if outcome else []


def _list_runs(evidence: Evidence) -> str:
    """Return the section on the measured runs: command, version, inputs and number of records of
    each.
    """
    lines = ["## Measured", ""]
    for source in evidence.sources:
        run = source.results.run
        inputs = ", ".join(
            f"{escape_markdown(item.role)} {code(item.path)}" for item in run.inputs[:NAMED]
        )
        inputs += f" and {len(run.inputs) - NAMED} more" if len(run.inputs) > NAMED else ""
        state = "" if source.results.end is not None else "; the run did not finish"
        made = f"; started {source.made}" if source.made else ""
        lines.append(
            f"- {code(source.name)}: loradiag {escape_markdown(run.command)} "
            f"{escape_markdown(run.version)}: {inputs}; "
            f"{len(source.results) or len(source.results.whole)} records{made}{state}"
        )
    return "\n".join(lines)


def _list_layers(layers: Sequence[str]) -> str:
    shown = ", ".join(code(short(layer)) for layer in layers[:NAMED])
    return f"{shown} and {len(layers) - NAMED} more" if len(layers) > NAMED else shown


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
