"""``loradiag doctor``."""

from __future__ import annotations

from json import dumps
from typing import Annotated

import typer

from lora_diag.cli.options import flag
from lora_diag.cli.output import line, result, terminal
from lora_diag.errors import DONE, UNREADABLE
from lora_diag.running.options import OUTPUT


def doctor(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT", help="Checkpoints or adapters to open, local or remote (headers only)."),
    ] = None,
    json: Annotated[bool, flag("json", "Print the checks as JSON.", OUTPUT)] = False,
) -> None:
    """Versions, extras, devices, memory, and how to close gaps.

    Example: loradiag doctor s3://models/base
    """
    from lora_diag.environment.check import checks
    from lora_diag.rendering.statements import summary_of
    from lora_diag.rendering.text import to_text

    found = checks(inputs or ())
    if json:
        rows = [{"key": each.key, "level": each.level, "lines": each.lines} for each in found]
        line(dumps(rows, ensure_ascii=False))
    else:
        result(to_text(summary_of(found), *terminal()))
    raise typer.Exit(UNREADABLE if any(each.level == "failure" for each in found) else DONE)
