"""``loradiag residual``."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import exit_unmeasured
from lora_diag.diagnostics.residual import ResidualOptions


@options.spread
def residual(
    base: options.Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The full fine-tune.")],
    adapters: options.Adapters = None,
    *,
    arguments: ResidualOptions,
    shown: options.Rows,
) -> None:
    """Distance of adapters to a full fine-tune, layer by layer.

    Example: loradiag residual base/ full_ft/ lora_r8/ lora_r64/ -o residual.jsonl
    """
    # deferred: imports torch
    from lora_diag.diagnostics.residual.measure import residual as measure

    with shown.callbacks() as callbacks:
        results = measure(base, tuned, adapters or [], **arguments, **callbacks)
    shown.show(
        results, shlex.join(["loradiag", "spectrum", str(base), str(tuned)]) + "   (which rank the update needs)"
    )
    exit_unmeasured(results.unmeasured, "the layer was left out")
