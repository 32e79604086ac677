"""``loradiag report``."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import message, quiet_matplotlib, result
from lora_diag.errors import UsageError


class Format(StrEnum):
    """What a report is written as."""

    html = "html"
    md = "md"
    csv = "csv"
    parquet = "parquet"


# Where a page goes that nobody named; the other text formats go to standard output then.
PAGE = Path("report.html")


def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS", help="Results files of any commands.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where it goes; default report.html.")
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option("--format", help="By the suffix of FILE if not given; md and csv go to standard output."),
    ] = None,
    values: Annotated[
        bool, typer.Option("--values", help="Entries of lists, such as singular values, as rows; csv and parquet.")
    ] = False,
    quiet: options.Quiet = False,
    overwrite: options.Overwrite = False,
) -> None:
    """One self-contained page on any mix of results: what they say, what to do next, every layer.

    Example: loradiag report spectrum.jsonl residual.jsonl -o report.html
    """
    from lora_diag.reports.run import report as make

    if output is None and format is Format.parquet:
        raise UsageError("--format parquet: give a file with -o")
    if output is None and format in {None, Format.html}:
        output = PAGE
    quiet_matplotlib()
    made = make(*results, output=output, format=format.value if format else None, overwrite=overwrite, values=values)
    if output is None and isinstance(made, str):
        result(made.rstrip("\n"))
    elif output is not None and not quiet:
        message(f"{shlex.quote(str(output))}: {_size(output)}{_how(output, made)}")


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def _how(output: Path, made: str | bytes) -> str:
    page = isinstance(made, str) and made.startswith("<!doctype html>")
    return ", opens in any browser without a network" if page else ""
