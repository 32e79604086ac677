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
    drawn = draw(*results, output=output, **arguments)
    if shown.table:
        result(
            _make_table(drawn, f"{shlex.join(['loradiag', 'report', *map(str, results)])}   (all results on one page)")
        )


def _make_table(drawn: Sequence[Drawn], hint: str) -> str:
    """Return a table of the figures drawn, and of those not drawn with the reason."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from lora_diag.rendering.statements import make_statement, summary_of
    from lora_diag.rendering.text import safe, to_text

    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    made.add_column(overflow="fold", style="dim")
    for figure in drawn:
        if figure.path is not None:
            made.add_row(figure.name, Text(safe(str(figure.path))), figure.shows)
    not_drawn = [figure for figure in drawn if figure.path is None]
    reasons: dict[str, list[str]] = {}
    for figure in not_drawn:
        if figure.missing != "records":
            why = f"{figure.reason}: {figure.made_by}" if figure.made_by and figure.missing else figure.reason
            reasons.setdefault(why, []).append(figure.name)
    lines = [f"{', '.join(names)}: {safe(why)}" for why, names in reasons.items()]
    # Most figures have no records; a reason for each would bury the figures that were drawn.
    absent = [figure.name for figure in not_drawn if figure.missing == "records"]
    if absent:
        lines.append(f"no records for {', '.join(absent)}; --figure NAME names the command that writes them")
    statements = [make_statement("not_drawn", "Not drawn", *lines)] if lines else []
    return to_text(Group(made, "", summary_of(statements, hint)), *terminal())
