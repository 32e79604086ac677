"""``loradiag residual``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import as_lines, progress_bar, result, tell_unmeasured, terminal
from lora_diag.errors import UNREADABLE

Adapters = Annotated[
    list[str] | None, typer.Argument(metavar="ADAPTER", help="Adapters, or checkpoints with one merged in.")
]
Reference = Annotated[
    str | None, typer.Option(metavar="TUNED2", help="Another full fine-tune, such as another seed, to judge by.")
]
Activations = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Second moments E[xx^T] of the inputs: distances in the data, too.")
]


def residual(
    base: options.Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The full fine-tune.")],
    adapters: Adapters = None,
    reference: Reference = None,
    activations: Activations = None,
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    allow_unmatched: options.AllowUnmatched = False,
    method: options.Method = "auto",
    tol: options.Tol = 1e-4,
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
    """What did the adapter miss? Its distance to a full fine-tune, and what rank alone would cost.

    Example: loradiag residual base/ full_ft/ lora_r8/ lora_r64/ -o residual.jsonl
    """
    options.check_resume(resume, output)
    # torch comes with it: not before it is needed
    from lora_diag.api.residual import residual as measure
    from lora_diag.reports.residual import residual_table

    with progress_bar(quiet) as on_progress:
        results = measure(
            base,
            tuned,
            adapters or [],
            reference=reference,
            activations=activations,
            layers=layers,
            exclude=exclude,
            allow_unmatched=allow_unmatched,
            method=method,
            tol=tol,
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
        then = shlex.join(["loradiag", "spectrum", str(base), str(tuned)]) + "   (which rank the update needs)"
        result(residual_table(results, *terminal(), per=per, then=then))
    if tell_unmeasured(results.unmeasured, "the layer was left out"):
        raise typer.Exit(UNREADABLE)
