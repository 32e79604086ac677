"""``loradiag verify-merge``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import report_unmeasured, rerun_command
from lora_diag.errors import DONE, GATE_FAILED, INCONCLUSIVE, UNREADABLE
from lora_diag.running.options import RunOptions

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter that was merged.")]
Merged = Annotated[str, typer.Argument(metavar="MERGED", help="Merged checkpoint.")]


@options.spread
def verify_merge(
    base: options.Base,
    adapter: Adapter,
    merged: Merged,
    *,
    arguments: RunOptions,
    shown: options.Rows,
) -> None:
    """Compare a merged checkpoint with BASE plus the adapter.

    Exit codes: 0 if every entry of MERGED is W + ΔW up to rounding, 1 if not, 5 inconclusive.

    Example: loradiag verify-merge base/ lora_r16/ merged/
    """
    # deferred: imports torch
    from lora_diag.diagnostics.verify_merge.measure import verify_merge as measure
    from lora_diag.diagnostics.verify_merge.record import outcome

    with shown.callbacks() as callbacks:
        results = measure(base, adapter, merged, **arguments, **callbacks)
    status = outcome(results)
    hint = _suggest_next(arguments["output"], shown.per, status == "correct")
    shown.show(results, hint)
    has_unmeasured = report_unmeasured(results.unmeasured, "the layer was not checked")
    code = {"correct": UNREADABLE if has_unmeasured else DONE, "failed": GATE_FAILED, "inconclusive": INCONCLUSIVE}[
        status
    ]
    if code != DONE:
        raise typer.Exit(code)


def _suggest_next(output: Path | str | None, per: options.Per, correct: bool) -> str:
    """Return the command that a user would run next, as a shell takes it."""
    if output is not None:
        command = ["loradiag", "inspect", str(output), "--per", "layer"]
        return f"{shlex.join(command)}   (layer by layer, without reading the weights again)"
    layers = per is options.Per.type and not correct
    arguments, why = (
        (["--per", "layer"], "layer by layer") if layers else (["-o", "merge.jsonl"], "saves these results")
    )
    return f"{rerun_command(*arguments)}   ({why})"
