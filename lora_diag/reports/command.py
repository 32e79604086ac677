"""``loradiag report``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, cast

from lora_diag.cli import options
from lora_diag.cli.output import message, result, silence_matplotlib
from lora_diag.errors import UsageError
from lora_diag.reports import ReportOptions
from lora_diag.reports.trackers import TRACKERS, track
from lora_diag.running.options import OUTPUT, Option, fill_options, plain

# Default name of an HTML page; other text formats go to standard output.
PAGE = Path("report.html")


@options.spread
def report(
    results: options.ResultsFiles,
    *,
    arguments: ReportOptions,
    to: Annotated[
        str | None,
        options.typer_option(
            "to", Option(None, "Tracker to send the report to; default: none.", "|".join(TRACKERS), panel=OUTPUT)
        ),
    ] = None,
    project: Annotated[
        str | None,
        options.typer_option(
            "project",
            Option(None, "Project, experiment, log folder or model id; default: the tracker's.", "NAME", panel=OUTPUT),
        ),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Combine any results in one page.

    Example: loradiag report spectrum.jsonl residual.jsonl -o report.html
    """
    from lora_diag.reports.run import format_of
    from lora_diag.reports.run import report as make

    if project is not None and to is None:
        raise UsageError("--project: names a project of a tracker; add --to")
    if to is not None:
        defaults = fill_options(ReportOptions, {})
        if any(plain(value) != plain(defaults[name]) for name, value in arguments.items()):
            raise UsageError("--to: sends the report instead of writing a file; leave out -o and its options")
        silence_matplotlib()
        location = track(results, to, project)
        if not quiet:
            message(f"{to}: {location}")
        return
    output, format = cast(Path | None, arguments["output"]), arguments["format"]
    if output is None and format == "parquet":
        raise UsageError("--format parquet: needs a file; give one with -o")
    if output is None and format in {None, "html"}:
        output = PAGE
    silence_matplotlib()
    arguments["output"] = output
    rendered = make(*results, **arguments)
    if output is None and isinstance(rendered, str):
        result(rendered.rstrip("\n"))
    elif output is not None and not quiet:
        usage = ", opens in any browser without a network connection" if format_of(output, format) == "html" else ""
        message(f"{shlex.quote(str(output))}: {_file_size(output)}{usage}")


def _file_size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
