"""``loradiag interference``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import check_outputs, exit_unmeasured
from lora_diag.diagnostics.interference import InterferenceOptions
from lora_diag.files import RESULTS
from lora_diag.running.options import OUTPUT, Option

Inputs = Annotated[
    list[str],
    typer.Argument(metavar="[BASE] TUNED", help="BASE and two or more updates of it; adapters alone need no BASE."),
]
SpectrumFile = Annotated[
    Path | None,
    options.typer_option(
        "spectrum", Option(None, "Also write the spectra of the sums, for allocate.", "FILE", panel=OUTPUT)
    ),
]


@options.spread
def interference(
    inputs: Inputs,
    *,
    arguments: InterferenceOptions,
    spectrum: SpectrumFile = None,
    shown: options.Rows,
) -> None:
    """Overlap of several updates, and the loss of merging them.

    Example: loradiag interference lora_sql/ lora_chat/ lora_code/ -o interference.jsonl --spectrum union.jsonl
    """
    check_outputs([*inputs, arguments["output"]], [(spectrum, RESULTS)], arguments["overwrite"])
    # deferred: imports torch
    from lora_diag.diagnostics.interference.measure import interference as measure
    from lora_diag.diagnostics.interference.measure import split_base, union_spectra

    base, updates = split_base(inputs)
    with shown.callbacks() as callbacks:
        results = measure(updates, base=base, **arguments, **callbacks)
    if spectrum is not None:
        union_spectra(results).write(spectrum, arguments["overwrite"])
    hint = _suggest_next(inputs, spectrum) if results.layers else None
    shown.show(results, hint)
    exit_unmeasured(results.unmeasured, "the layer was left out")


def _suggest_next(inputs: list[str], spectrum: Path | None) -> str:
    if spectrum is not None:
        command = shlex.join(["loradiag", "allocate", str(spectrum), "--energy", "0.9"])
        return f"{command}   (the rank that the sum needs in each layer)"
    command = shlex.join(["loradiag", "interference", *map(str, inputs), "--spectrum", "union.jsonl"])
    return f"{command}   (then allocate union.jsonl: a rank for each layer)"
