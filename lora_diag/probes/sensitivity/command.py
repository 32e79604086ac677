"""``loradiag probe sensitivity``: which layers are worth adapting, by adapting each alone."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli import probe_options as shared
from lora_diag.cli.output import progress_bar, result, terminal


@options.spread
def sensitivity(
    base: shared.Base,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Text or JSONL to train on.")],
    *,
    held_out: shared.HeldOut,
    rank: Annotated[int, typer.Option(metavar="R", help="Rank to train at.")] = 8,
    delta: Annotated[
        int | None, typer.Option(metavar="D", help="Train at R + D, too, for the marginal gain g(R → R + D).")
    ] = None,
    per: Annotated[str, typer.Option(metavar="layer|block|type", help="What is adapted alone.")] = "layer",
    lr: Annotated[str, typer.Option(metavar="X,X,...", help="Peak learning rates; each takes its best.")] = "3e-3,1e-2",
    widen: shared.Widen = 2,
    steps: shared.Steps = 50,
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each at its best rate.")] = 1,
    seed: shared.Seed = 0,
    selected: options.Selected,
    run: shared.Run,
    written: options.Written,
) -> None:
    """Which layers gain most? A LoRA trained on each alone, beside what one gradient pass would have said.

    Example: loradiag probe sensitivity base/ --data train.txt --eval held_out.txt -o sensitivity.jsonl
    """
    rates = options.parse_numbers(lr, "--lr", "1e-3,1e-2")
    # torch comes with it: not before it is needed
    from lora_diag.probes.sensitivity.run import probe_sensitivity
    from lora_diag.probes.sensitivity.summary import sensitivity_table

    with progress_bar(written.quiet) as on_progress:
        results = probe_sensitivity(
            base,
            data=data,
            **held_out.arguments(),
            rank=rank,
            delta=delta,
            per=per,
            rates=rates,
            widen=widen,
            steps=steps,
            seeds=seeds,
            seed=seed,
            **vars(selected),
            **vars(run),
            **written.arguments(),
            on_progress=on_progress,
            on_note=shared.noted(written.quiet),
        )
    if written.table:
        weights = shlex.quote(str(written.output)) if written.output is not None else ""
        then = f"loradiag allocate SPECTRUM.jsonl --params 10M --weights {weights}   (ranks where the loss gains)"
        result(sensitivity_table(results, *terminal(), then=shared.next_step(written.output, then)))
