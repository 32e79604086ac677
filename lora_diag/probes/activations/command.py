"""``loradiag probe activations``: second moments of the layers' inputs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from lora_diag.cli import options
from lora_diag.cli.output import check_outputs, line, result, terminal
from lora_diag.files import SECOND_MOMENTS
from lora_diag.probes.activations import ActivationsOptions
from lora_diag.running.options import DATA, OUTPUT, REQUIRED, Option

_OUTPUT = Option(REQUIRED, "Safetensors file to write.", "FILE", ("--output", "-o"), OUTPUT)


@options.spread
def activations(
    base: options.Base,
    data: Annotated[Path, options.typer_option("data", DATA)],
    output: Annotated[Path, options.typer_option("output", _OUTPUT)],
    *,
    arguments: ActivationsOptions,
    shown: options.Rows,
) -> None:
    """Second moments of layer inputs, for --activations.

    Example: loradiag probe activations base/ --data text.txt -o activations.safetensors
    """
    check_outputs([data], [(output, SECOND_MOMENTS)], arguments["overwrite"])
    # deferred: imports torch
    from lora_diag.probes.activations.measure import probe_activations
    from lora_diag.probes.activations.show import activations_table

    with shown.callbacks(notes=True) as callbacks:
        callbacks.pop("on_record")  # moments are written to the file
        recorded = probe_activations(base, data, output, **arguments, **callbacks)
    if shown.json:
        line(recorded.model_dump_json())
    elif not shown.quiet:
        kfac = " --kfac" if arguments["output_gradients"] else ""
        hint = f"loradiag spectrum BASE TUNED --activations {shlex.quote(str(output))}{kfac}"
        result(activations_table(recorded, *terminal(), per=shown.per, next_command=hint))
