"""``loradiag verify-merge``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import again, as_lines, progress_bar, result, tell_unmeasured, terminal
from lora_diag.errors import DONE, GATE_FAILED, INCONCLUSIVE, UNREADABLE

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter that was merged.")]
Merged = Annotated[str, typer.Argument(metavar="MERGED", help="What the merge wrote.")]


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
    verify: options.Verify = False,
    quiet: options.Quiet = False,
) -> None:
    """Did the merge do what the adapter says? Every entry of MERGED against W + ΔW; exit code 1 if not.

    Example: loradiag verify-merge base/ lora_r16/ merged/
    """
    options.check_resume(resume, output)
    # torch comes with it: not before it is needed
    from lora_diag.api.verify_merge import verify_merge as measure
    from lora_diag.reports.merge import merge_table
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
            verify=verify,
            on_progress=on_progress,
            on_record=as_lines(json),
        )
    found = outcome(results)
    if not json and not quiet:
        result(merge_table(results, *terminal(), per=per, then=_next(output, per, found == "correct")))
    unread = tell_unmeasured(results.non_finite, "the layer was not checked")
    code = {"correct": UNREADABLE if unread else DONE, "failed": GATE_FAILED, "inconclusive": INCONCLUSIVE}[found]
    if code != DONE:
        raise typer.Exit(code)


def _next(output: Path | None, per: options.Per, correct: bool) -> str:
    """Return the command that a user would run next, as a shell takes it."""
    if output is not None:
        words = ["loradiag", "inspect", str(output), "--per", "layer"]
        return f"{shlex.join(words)}   (layer by layer, without reading the weights again)"
    layers = per is options.Per.type and not correct
    more, why = (["--per", "layer"], "layer by layer") if layers else (["-o", "merge.jsonl"], "keeps these numbers")
    return f"{again(*more)}   ({why})"
