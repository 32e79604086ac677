"""``loradiag probe curvature``: how the loss bends, and what the loss bound is worth."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli import probe_options as shared
from lora_diag.cli.output import progress_bar, result, terminal


@options.spread
def curvature(
    base: shared.Base,
    tuned: Annotated[
        Path | None, typer.Argument(metavar="TUNED", help="The model after, or an adapter; without it, at BASE.")
    ] = None,
    eval_: shared.OneEval = None,
    ranks: Annotated[str, typer.Option(metavar="R,R,...", help="Ranks to truncate to.")] = "0,1,2,4,8,16,32,64",
    along: Annotated[str, typer.Option(metavar="T,T,...", help="Shares of the way to the truncated update.")] = "0.1,1",
    top: Annotated[int, typer.Option(metavar="K", help="Largest eigenvalues.")] = 5,
    probes: Annotated[int, typer.Option(metavar="N", help="Random vectors of the trace.")] = 10,
    ggn: Annotated[bool, typer.Option("--ggn", help="Gauss-Newton matrix instead of the Hessian.")] = False,
    per: Annotated[str, typer.Option(metavar="all|layer", help="Eigenvalues jointly, or of every layer, too.")] = "all",
    *,
    selected: options.Selected,
    seed: Annotated[int, typer.Option(metavar="N", help="Of Lanczos' start and of the trace.")] = 0,
    run: shared.Run,
    written: options.Written,
) -> None:
    """How does the loss bend, and does curvature foretell what truncating costs? Beside the loss bound, measured.

    Example: loradiag probe curvature base/ full_ft/ --eval held_out.txt --max-sequences 16 --length 128
    """
    asked, way = options.parse_ranks(ranks), options.parse_numbers(along, "--along", "0.1,1")
    # torch comes with it: not before it is needed
    from lora_diag.probes.curvature.run import probe_curvature
    from lora_diag.probes.curvature.summary import curvature_table

    with progress_bar(written.quiet) as on_progress:
        results = probe_curvature(
            base,
            tuned,
            evaluate=eval_ or (),
            ranks=asked,
            along=way,
            top=top,
            probes=probes,
            ggn=ggn,
            per=per,
            **vars(selected),
            seed=seed,
            **vars(run),
            **written.arguments(),
            on_progress=on_progress,
            on_note=shared.noted(written.quiet),
        )
    if written.table:
        text = str(eval_[0]) if eval_ else ""
        then = shlex.join(["loradiag", "probe", "truncation", str(base), str(tuned), "--eval", text])
        why = "   (the gap at every rank, on more text)"
        if tuned is None:
            then = shlex.join(["loradiag", "probe", "sweep", str(base), "--data", "TEXT", "--eval", text])
            why = "   (which rank training needs)"
        rows = "layer" if per == "layer" else "type"
        result(curvature_table(results, *terminal(), per=rows, then=shared.next_step(written.output, then + why)))
