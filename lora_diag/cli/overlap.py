"""``loradiag overlap``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import again, as_lines, progress_bar, result, tell_unmeasured, terminal
from lora_diag.errors import UNREADABLE


def overlap(
    base: options.Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Checkpoint after a pilot run, or an adapter.")],
    gradients: Annotated[
        list[str], typer.Argument(metavar="GRADIENTS", help="Folders or files with the gradients of a step each.")
    ],
    ranks: Annotated[str, typer.Option(metavar="R,R,...", help="Ranks r of the subspaces.")] = "4,8,16,32,64",
    rank: Annotated[int | None, typer.Option(metavar="R", help="Rank that the table shows; one of --ranks.")] = None,
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    allow_unmatched: options.AllowUnmatched = False,
    method: options.Method = "auto",
    device: options.Device = "auto",
    seed: options.Seed = 0,
    workers: options.Workers = None,
    memory: options.Memory = None,
    engine: options.On = options.Engine.local,
    ray_address: options.RayAddress = None,
    gpus_per_task: options.GpusPerTask = 0.0,
    per: options.PerRow = options.Per.type,
    output: options.Output = None,
    json: options.Json = False,
    resume: options.Resume = False,
    verify: options.Verify = False,
    quiet: options.Quiet = False,
) -> None:
    """Is training still inside the adapter's reach? Overlap of gradients with the subspaces of an update.

    Example: loradiag overlap base/ full_ft/ gradients/ --ranks 8,16 -o overlap.jsonl
    """
    options.check_resume(resume, output)
    asked = options.parse_ranks(ranks)
    # torch comes with it: not before it is needed
    from lora_diag.api.overlap import overlap as measure
    from lora_diag.reports.overlap import overlap_table

    with progress_bar(quiet) as on_progress:
        results = measure(
            base,
            tuned,
            gradients,
            ranks=asked if rank is None else [*asked, rank],
            layers=layers,
            exclude=exclude,
            allow_unmatched=allow_unmatched,
            method=method,
            device=device,
            seed=seed,
            workers=workers,
            memory=memory,
            engine=options.cluster(engine, ray_address, gpus_per_task),
            output=output,
            resume=resume,
            verify=verify,
            on_progress=on_progress,
            on_record=as_lines(json),
        )
    if not json and not quiet:
        result(overlap_table(results, *terminal(), per=per, rank=rank, then=_next(output, per)))
    if tell_unmeasured(results.unmeasured, "left out"):
        raise typer.Exit(UNREADABLE)


def _next(output: Path | None, per: str) -> str:
    """Return the command that a user would run next, as a shell takes it."""
    if per == "type":
        return f"{again('--per', 'layer')}   (layer by layer)"
    if output is None:
        return f"{again('-o', 'overlap.jsonl')}   (keeps these numbers)"
    return f"loradiag inspect {shlex.quote(str(output))}   (this table without measuring again)"
