"""``loradiag plot``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lora_diag.cli import options
from lora_diag.cli.output import result, silence_matplotlib, terminal
from lora_diag.plots.options import PlotOptions
from lora_diag.running.options import OUTPUT, Option

if TYPE_CHECKING:
    from lora_diag.plots.run import Drawn


_OUTPUT = Option(
    "", "One .png, .svg or .pdf file, or a folder for all figures.", "FILE|FOLDER", ("--output", "-o"), OUTPUT
)


@options.spread
def plot(
    results: options.ResultsFiles,
    *,
    output: Annotated[Path, options.typer_option("output", _OUTPUT)] = Path("figures"),
    arguments: PlotOptions,
    shown: options.Shown,
) -> None:
    """Draw figures of results for a paper or a slide.

    Example: loradiag plot a.jsonl b.jsonl --label "full" --label "LoRA" --figure energy -o energy.pdf
    """
    from lora_diag.plots.run import plot as draw

    silence_matplotlib()
    figures = draw(*results, output=output, **arguments)
    if shown.table:
        result(
            _make_table(
                figures, f"{shlex.join(['loradiag', 'report', *map(str, results)])}   (all results on one page)"
            )
        )


def _make_table(figures: Sequence[Drawn], hint: str) -> str:
    """Return a table of the figures drawn, the reasons for those not drawn, and a hint, as lines of text."""
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
    not_drawn = [figure for figure in figures if figure.path is None]
    names_by_reason: dict[str, list[str]] = {}
    for figure in not_drawn:
        if figure.missing != "records":
            reason = f"{figure.reason}: {figure.made_by}" if figure.made_by and figure.missing else figure.reason
            names_by_reason.setdefault(reason, []).append(figure.name)
    reason_lines = [f"{', '.join(names)}: {safe(reason)}" for reason, names in names_by_reason.items()]
    # Most figures have no records; a reason for each would bury the figures that were drawn.
    without_records = [figure.name for figure in not_drawn if figure.missing == "records"]
    if without_records:
        reason_lines.append(
            f"no records for {', '.join(without_records)}; --figure NAME names the command that writes them"
        )
    statements = [make_statement("not_drawn", "Not drawn", *reason_lines)] if reason_lines else []
    return to_text(Group(table, "", summary_of(statements, hint)), *terminal())
