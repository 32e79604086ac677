"""``loradiag verify-merge``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import message, progress_bar, result, terminal
from lora_diag.errors import DONE, GATE_FAILED, INCONCLUSIVE, UNREADABLE, UsageError

Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter that was merged.")]
Merged = Annotated[Path, typer.Argument(metavar="MERGED", help="What the merge wrote.")]


def verify_merge(
    base: options.Base,
    adapter: Adapter,
    merged: Merged,
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    allow_unmatched: options.AllowUnmatched = False,
    workers: options.Workers = None,
    per: options.PerRow = options.Per.type,
    output: options.Output = None,
    json: options.Json = False,
    resume: options.Resume = False,
    quiet: options.Quiet = False,
) -> None:
    """Did the merge do what the adapter says? Every entry of MERGED against W + ΔW; exit code 1 if not.

    Example: loradiag verify-merge base/ lora_r16/ merged/
    """
    if resume and output is None:
        raise UsageError("--resume: give the results file of the interrupted run with -o")
    # torch comes with it: not before it is needed
    from lora_diag.api.verify_merge import verify_merge as measure
    from lora_diag.reports.merge import merge_table
    from lora_diag.results import to_line
    from lora_diag.results.merge import outcome

    with progress_bar(quiet) as on_progress:
        results = measure(
            base,
            adapter,
            merged,
            layers=layers,
            exclude=exclude,
            allow_unmatched=allow_unmatched,
            workers=workers,
            output=output,
            resume=resume,
            on_progress=on_progress,
            on_record=(lambda record: result(to_line(record))) if json else None,
        )
    found = outcome(results)
    if not json and not quiet:
        result(merge_table(results, *terminal(), per=per, then=_next(output, per, found == "correct")))
    unread = [item for item in results.left_out if item.reason == "non_finite"]
    for item in unread:
        message(f"error: {item.layer}: {item.detail}; the layer was not checked")
    code = {"correct": UNREADABLE if unread else DONE, "failed": GATE_FAILED, "inconclusive": INCONCLUSIVE}[found]
    if code != DONE:
        raise typer.Exit(code)


def _next(output: Path | None, per: options.Per, correct: bool) -> str:
    """Return the command that a user would run next, as a shell takes it."""
    if output is not None:
        again = ["loradiag", "inspect", str(output), "--per", "layer"]
        return f"{shlex.join(again)}   (layer by layer, without reading the weights again)"
    layers = per is options.Per.type and not correct
    more, why = (["--per", "layer"], "layer by layer") if layers else (["-o", "merge.jsonl"], "keeps these numbers")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    return f"{shlex.join(['loradiag', *words[:end], *more, *words[end:]])}   ({why})"
