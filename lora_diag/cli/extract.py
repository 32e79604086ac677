"""``loradiag extract``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lora_diag.cli import options
from lora_diag.cli.output import as_lines, progress_bar, result, tell_unmeasured, terminal
from lora_diag.errors import UNREADABLE, UsageError

Folder = Annotated[Path | None, typer.Option("--output", "-o", metavar="ADAPTER", help="Adapter folder to write.")]
Rank = Annotated[int | None, typer.Option(metavar="R", help="The same rank for every layer.")]
Energy = Annotated[float | None, typer.Option(metavar="SHARE", help="Smallest rank that keeps this share of Σσ².")]
Params = Annotated[
    str | None, typer.Option(metavar="N", help="Parameters in all, such as 10M, spent as allocate does.")
]
RanksFrom = Annotated[
    Path | None, typer.Option(metavar="ALLOCATION", help="Ranks by allocate: results or adapter_config.json.")
]
Signal = Annotated[bool, typer.Option("--signal", help="As many ranks as stand above the files' rounding noise.")]
Activations = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Second moments by probe activations: factors best in output on that text."),
]
KFac = Annotated[bool, typer.Option("--kfac", help="With --activations: best by K-FAC, with the gradients in it.")]
Split = Annotated[str, typer.Option(metavar="both|b", help="√Σ into both factors, or all of Σ into B.")]
Dtype = Annotated[str, typer.Option(metavar="float32|bfloat16|float16", help="How factors are stored.")]
Rest = Annotated[str, typer.Option(metavar="list|save", help="What no factor carries: list it, or store it in full.")]
BaseName = Annotated[
    str | None, typer.Option(metavar="NAME", help="BASE's name for config and card; default its path.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an extracted adapter that is there.")]


def extract(
    base: options.Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Checkpoint after, or an adapter to compress.")],
    output: Folder = None,
    rank: Rank = None,
    energy: Energy = None,
    params: Params = None,
    ranks: RanksFrom = None,
    signal: Signal = False,
    activations: Activations = None,
    kfac: KFac = False,
    split: Split = "both",
    dtype: Dtype = "float32",
    rest: Rest = "list",
    base_name: BaseName = None,
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
    overwrite: Overwrite = False,
    json: options.Json = False,
    resume: options.Resume = False,
    verify: options.Verify = False,
    quiet: options.Quiet = False,
) -> None:
    """Write that adapter: the best one of given ranks for ΔW, in PEFT's format, with its error as it was written.

    Example: loradiag extract base/ full_ft/ --rank 16 -o adapter/
    """
    if output is None:
        raise UsageError("extract: name the adapter folder to write with -o")
    # torch comes with it: not before it is needed
    from lora_diag.api.extract import extract as write
    from lora_diag.reports.extraction import extraction_table

    with progress_bar(quiet) as on_progress:
        results = write(
            base,
            tuned,
            output,
            rank=rank,
            energy=energy,
            params=params,
            ranks=ranks,
            signal=signal,
            activations=activations,
            kfac=kfac,
            split=cast(Any, split),
            dtype=dtype,
            rest=cast(Any, rest),
            base_name=base_name,
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
            overwrite=overwrite,
            resume=resume,
            verify=verify,
            on_progress=on_progress,
            on_record=as_lines(json),
        )
    if not json and not quiet:
        then = shlex.join(["loradiag", "residual", str(base), str(tuned), str(output)])
        then += "   (this adapter held against TUNED)"
        result(extraction_table(results, *terminal(), per=per, then=then, folder=str(output)))
    if tell_unmeasured(results.unmeasured, "the layer is not in the adapter"):
        raise typer.Exit(UNREADABLE)
