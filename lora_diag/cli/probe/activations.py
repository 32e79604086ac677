"""``loradiag probe activations``: the inputs of the layers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import result, terminal
from lora_diag.cli.probe import shared


def activations(
    base: shared.Base,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Text or JSONL of the kind the model will see.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="New safetensors file.")],
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    length: shared.Length = None,
    batch: shared.Batch = 8,
    max_sequences: shared.MaxSequences = None,
    tokenizer: shared.Tokenizer = "auto",
    dtype: shared.Dtype = "float32",
    device: shared.Device = "auto",
    per: options.PerRow = options.Per.type,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Which inputs do the layers get on your text? C = E[xx^T] of each, which residual --activations measures in.

    Example: loradiag probe activations base/ --data text.txt -o activations.safetensors
    """
    # torch comes with it: not before it is needed
    from lora_diag.api.probe_activations import probe_activations
    from lora_diag.reports.activations import activations_table

    with shared.progress(quiet) as on_progress:
        recorded = probe_activations(
            base,
            data,
            output,
            layers=layers,
            exclude=exclude,
            length=length,
            batch=batch,
            max_sequences=max_sequences,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            on_progress=on_progress,
            on_note=shared.noted(quiet),
        )
    if json:
        result(recorded.model_dump_json())
    elif not quiet:
        then = f"loradiag residual {shlex.quote(str(base))} TUNED ADAPTER --activations {shlex.quote(str(output))}"
        result(activations_table(recorded, *terminal(), per=per, then=then))
