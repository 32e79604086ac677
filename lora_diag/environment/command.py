"""``loradiag doctor``."""

from __future__ import annotations

from json import dumps
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import line, result, terminal
from lora_diag.errors import DONE, UNREADABLE


@options.spread
def doctor(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT", help="Checkpoints or adapters to open, local or remote (headers only)."),
    ] = None,
    *,
    json: options.Json = False,
) -> None:
    """Versions, extras, devices and memory, with a fix per gap.

    Example: loradiag doctor s3://models/base
    """
    from lora_diag.environment.check import checks
    from lora_diag.rendering.statements import limit_lines, summary_of
    from lora_diag.rendering.text import to_text

    findings = checks(inputs or ())
    if json:
        for finding in findings:
            line(dumps({"key": finding.key, "level": finding.level, "lines": finding.lines}, ensure_ascii=False))
    else:
        with limit_lines(None):
            result(to_text(summary_of(findings), *terminal()))
    raise typer.Exit(UNREADABLE if any(finding.level == "failure" for finding in findings) else DONE)
