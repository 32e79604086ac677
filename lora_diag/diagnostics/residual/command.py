"""``loradiag residual``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import result, tell_unmeasured, terminal
from lora_diag.errors import UNREADABLE
from lora_diag.running.options import LayerOptions

Adapters = Annotated[
    list[str] | None, typer.Argument(metavar="ADAPTER", help="Adapters, or checkpoints with one merged in.")
]
Reference = Annotated[
    str | None, typer.Option(metavar="TUNED2", help="Another full fine-tune, such as another seed, to judge by.")
]
Activations = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Second moments E[xx^T] of the inputs: distances in the data, too.")
]


@options.spread
def residual(
    base: options.Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The full fine-tune.")],
    adapters: Adapters = None,
    reference: Reference = None,
    activations: Activations = None,
    *,
    given: LayerOptions,
    shown: options.Rows,
) -> None:
    """What did the adapter miss? Its distance to a full fine-tune, and what rank alone would cost.

    Example: loradiag residual base/ full_ft/ lora_r8/ lora_r64/ -o residual.jsonl
    """
    # torch comes with it: not before it is needed
    from lora_diag.diagnostics.residual.run import residual as measure
    from lora_diag.diagnostics.residual.summary import residual_table

    with shown.callbacks() as callbacks:
        results = measure(
            base,
            tuned,
            adapters or [],
            reference=reference,
            activations=activations,
            **given,
            **callbacks,
        )
    if shown.table:
        then = shlex.join(["loradiag", "spectrum", str(base), str(tuned)]) + "   (which rank the update needs)"
        result(residual_table(results, *terminal(), per=shown.per, then=then))
    if tell_unmeasured(results.unmeasured, "the layer was left out"):
        raise typer.Exit(UNREADABLE)
