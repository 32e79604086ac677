"""``loradiag probe fisher``: which layers' tails the loss needs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lora_diag.cli import options
from lora_diag.cli import probe_options as shared
from lora_diag.cli.output import progress_bar, result, terminal


@options.spread
def fisher(
    base: shared.Base,
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The model after, or an adapter.")],
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Text or JSONL whose loss is differentiated.")],
    eval_: shared.OneEval = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Truncate each layer alone, too, to hold F against; --eval implies it."),
    ] = False,
    ranks: Annotated[str, typer.Option(metavar="R,R,...", help="Ranks to tell, and to measure.")] = "4,8,16,32,64",
    labels: shared.Labels = "data",
    seed: shared.LabelSeed = 0,
    *,
    selected: options.Selected,
    run: shared.Run,
    per: options.PerRow = options.Per.type,
    written: options.Written,
) -> None:
    """Which layers' tails does the loss need? E<grad, ΔW - ΔW_r>^2 of each, exact, in one pass; beside weight energy.

    Example: loradiag probe fisher base/ full_ft/ --data text.txt --eval held_out.txt --ranks 8,16 -o fisher.jsonl
    """
    asked = options.parse_ranks(ranks)
    # torch comes with it: not before it is needed
    from lora_diag.probes.fisher.run import probe_fisher
    from lora_diag.probes.fisher.summary import fisher_table

    with progress_bar(written.quiet) as on_progress:
        results = probe_fisher(
            base,
            tuned,
            data=data,
            evaluate=eval_ or (),
            measure=measure,
            ranks=asked,
            labels=cast(Any, labels),
            seed=seed,
            **vars(selected),
            **vars(run),
            **written.arguments(),
            on_progress=on_progress,
            on_note=shared.noted(written.quiet),
        )
    if written.table:
        weights = shlex.quote(str(written.output)) if written.output is not None else ""
        then = f"loradiag allocate SPECTRUM.jsonl --params 10M --weights {weights}   (ranks where the loss needs them)"
        result(fisher_table(results, *terminal(), per=per, then=shared.next_step(written.output, then)))
