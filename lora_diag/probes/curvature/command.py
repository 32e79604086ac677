"""``loradiag probe curvature``: curvature of the loss, and tightness of the loss bound."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import next_step
from lora_diag.probes.curvature import CurvatureOptions


@options.spread
def curvature(
    base: options.Base,
    tuned: Annotated[str | None, typer.Argument(metavar="TUNED", help="Fine-tuned checkpoint, or an adapter.")] = None,
    *,
    arguments: CurvatureOptions,
    shown: options.Shown,
) -> None:
    """Curvature of the loss (Hessian, GGN), and a loss bound.

    Example: loradiag probe curvature base/ full_ft/ --max-sequences 16 --eval held_out.txt
    """
    # deferred: imports torch
    from lora_diag.probes.curvature.measure import probe_curvature

    with shown.callbacks(notes=True) as callbacks:
        results = probe_curvature(base, tuned, **arguments, **callbacks)
    evaluation_file = str(arguments["evaluate"][0])
    hint = shlex.join(["loradiag", "probe", "truncation", str(base), str(tuned), "--eval", evaluation_file])
    explanation = "   (the gap at every rank, on more text)"
    if tuned is None:
        hint = shlex.join(["loradiag", "probe", "sweep", str(base), "--data", "TEXT", "--eval", evaluation_file])
        explanation = "   (which rank training needs)"
    rows = "layer" if arguments["granularity"] == "layer" else "type"
    shown.show(results, next_step(arguments["output"], hint + explanation), rows)
