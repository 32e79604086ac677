"""``loradiag probe activations``: the inputs of the layers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lora_diag.cli import options
from lora_diag.cli import probe_options as shared
from lora_diag.cli.output import check_outputs, line, progress_bar, result, terminal
from lora_diag.files import SECOND_MOMENTS


@options.spread
def activations(
    base: shared.Base,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Text or JSONL of the kind the model will see.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="New safetensors file.")],
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Also E[gg^T] of the outputs' gradients, for spectrum --kfac.")
    ] = False,
    labels: shared.Labels = "data",
    seed: shared.LabelSeed = 0,
    *,
    selected: options.Selected,
    run: shared.Run,
    per: options.PerRow = options.Per.type,
    json: options.Json = False,
    quiet: options.Quiet = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Which inputs do the layers get on your text? C = E[xx^T] of each, for the --activations of other commands.

    Example: loradiag probe activations base/ --data text.txt -o activations.safetensors
    """
    check_outputs([data], [(output, SECOND_MOMENTS)], overwrite)
    # torch comes with it: not before it is needed
    from lora_diag.probes.activations.run import probe_activations
    from lora_diag.probes.activations.summary import activations_table

    with progress_bar(quiet) as on_progress:
        recorded = probe_activations(
            base,
            data,
            output,
            gradients=gradients,
            labels=cast(Any, labels),
            seed=seed,
            overwrite=overwrite,
            **vars(selected),
            **vars(run),
            on_progress=on_progress,
            on_note=shared.noted(quiet),
        )
    if json:
        line(recorded.model_dump_json())
    elif not quiet:
        kfac = " --kfac" if gradients else ""
        then = f"loradiag spectrum BASE TUNED --activations {shlex.quote(str(output))}{kfac}"
        result(activations_table(recorded, *terminal(), per=per, then=then))
