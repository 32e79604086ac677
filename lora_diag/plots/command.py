"""``loradiag plot``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_diag.catalog import figures
from lora_diag.cli import options
from lora_diag.cli.output import quiet_matplotlib, result, terminal

if TYPE_CHECKING:
    from lora_diag.plots.run import Drawn


# Derived from the features, those of installed packages among them.
_NAMES = ["all", *(figure.name for _, figure in figures())]
_FIGURES = f"One of {', '.join(_NAMES)}; default all into a folder, the first that can be drawn into a file."


class Width(StrEnum):
    """The page that a figure is for."""

    column = "column"
    slide = "slide"


class Format(StrEnum):
    """What figures in a folder are written as."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


def plot(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS", help="Results files of any commands.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE|FOLDER", help="One .png, .svg or .pdf, or a folder for all."),
    ] = Path("figures"),
    figure: Annotated[
        str | None,
        typer.Option(metavar="FIGURE", help=_FIGURES, autocompletion=lambda: _NAMES),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="What each of RESULTS is called, in their order.")
    ] = None,
    field: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Of the heat map: any number, such as energy.16 or fro.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="R", help="Of overlap, angles, alone: one of several measured.")
    ] = None,
    per: Annotated[
        options.Per, typer.Option(help="One line or bar a layer, or all layers of a module type together.")
    ] = options.Per.layer,
    width: Annotated[Width, typer.Option(help="A paper's column (3.3 in) or a slide (10 in).")] = Width.slide,
    format: Annotated[Format | None, typer.Option(help="Of the files in a folder.  [default: png]")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Leave out title and notes, for a paper's caption.")] = False,
    layers: options.Layers = None,
    quiet: options.Quiet = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Figures for a paper or a slide: energy curves, spectra, heat maps, residuals, overlap, allocation, losses.

    Example: loradiag plot a.jsonl b.jsonl --label "full" --label "LoRA" --figure energy -o energy.pdf
    """
    from lora_diag.plots.run import plot as draw

    quiet_matplotlib()
    drawn = draw(
        *results,
        output=output,
        figure=figure,
        labels=label or (),
        field=field,
        rank=rank,
        per=per.value,
        width=width.value,
        format=format.value if format else None,
        layers=layers,
        plain=plain,
        overwrite=overwrite,
    )
    if not quiet:
        result(_table(drawn, f"{shlex.join(['loradiag', 'report', *map(str, results)])}   (all of it on one page)"))


def _table(drawn: Sequence[Drawn], then: str) -> str:
    """Say what was drawn, and what was not and why."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from lora_diag.rendering.statements import say, summary_of
    from lora_diag.rendering.text import safe, to_text

    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    made.add_column(overflow="fold", style="dim")
    for one in drawn:
        if one.path is not None:
            made.add_row(one.name, Text(safe(str(one.path))), one.shows)
    not_drawn = [one for one in drawn if one.path is None]
    reasons: dict[str, list[str]] = {}
    for one in not_drawn:
        if one.missing != "records":
            why = f"{one.reason}: {one.made_by}" if one.made_by and one.missing else one.reason
            reasons.setdefault(why, []).append(one.name)
    lines = [f"{', '.join(names)}: {safe(why)}" for why, names in reasons.items()]
    # Of so many figures the records are missing that a reason for each would hide what was drawn.
    absent = [one.name for one in not_drawn if one.missing == "records"]
    if absent:
        lines.append(f"no records for {', '.join(absent)}; --figure NAME tells the command that writes them")
    statements = [say("not_drawn", "Not drawn", *lines)] if lines else []
    return to_text(Group(made, "", summary_of(statements, then)), *terminal())
