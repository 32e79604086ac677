"""``loradiag spectrum`` and ``loradiag gradient-spectrum``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_diag.cli import options
from lora_diag.cli.output import exit_unmeasured, rerun_command
from lora_diag.diagnostics.spectrum import GradientSpectrumOptions, SpectrumOptions
from lora_diag.running.options import BASE


@options.spread
def spectrum(
    base: Annotated[str | None, typer.Argument(metavar="BASE", help="Base checkpoint, or an adapter alone.")] = None,
    tuned: Annotated[str | None, typer.Argument(metavar="TUNED", help="Fine-tuned checkpoint, or an adapter.")] = None,
    *,
    arguments: SpectrumOptions,
    shown: options.Rows,
) -> None:
    """Singular values of an update ΔW, layer by layer.

    Example: loradiag spectrum base/ full_ft/ --ranks 8,16,64 -o results.jsonl

    Example: loradiag spectrum base/ full_ft/ --activations activations.safetensors

    Of gradients: loradiag gradient-spectrum. Of many adapters: loradiag fleet.
    """
    _measure(base, tuned, arguments, shown)


@options.spread
def gradient_spectrum(
    gradients: Annotated[
        list[str],
        typer.Argument(metavar="GRADIENTS", help="Gradient snapshots: a folder of them, or one file per step."),
    ],
    *,
    base: Annotated[str | None, options.typer_option("base", BASE)] = None,
    arguments: GradientSpectrumOptions,
    shown: options.Rows,
) -> None:
    """Spectrum of all gradients, before any update.

    --base only provides the names of the weights.

    Example: loradiag gradient-spectrum gradients/ --base base/ -o results.jsonl
    """
    _measure(base, None, {"gradients": gradients, **arguments}, shown)


def _measure(base: str | None, tuned: str | None, arguments: Mapping[str, Any], shown: options.Rows) -> None:
    # deferred: imports torch
    from lora_diag.diagnostics.spectrum.run import spectrum as measure

    with shown.callbacks() as callbacks:
        results = measure(base, tuned, **arguments, **callbacks)
    # without spectra, the suggested fix is printed last
    shown.show(results, _suggest_next(arguments["output"]) if results.layers else None)
    exit_unmeasured(results.unmeasured, "the layer was left out")


def _suggest_next(output: Path | str | None) -> str:
    """Return the command that a user would run next, as a shell takes it."""
    if output is None:
        return f"{rerun_command('-o', 'results.jsonl')}   (saves these results)"
    command = ["loradiag", "inspect", str(output), "--per", "layer"]
    return f"{shlex.join(command)}   (this table layer by layer, without measuring again)"
