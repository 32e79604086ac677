"""``loradiag probe intrinsic``: in how few random directions training gets nearly as far."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli import probe_options as shared
from lora_diag.cli.output import progress_bar, result, terminal


@options.spread
def intrinsic(
    base: shared.Base,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Text or JSONL to train on.")],
    *,
    held_out: shared.HeldOut,
    dims: Annotated[str, typer.Option(metavar="D,D,...", help="Dimensions d.")] = "10,30,100,300,1000,3000,10000",
    method: Annotated[str, typer.Option(metavar="plain|said", help="said: and one scale a layer.")] = "plain",
    share: Annotated[float, typer.Option(metavar="X", help="Share of full fine-tuning's gain to reach.")] = 0.9,
    ranks: Annotated[str, typer.Option(metavar="R,R,...", help="LoRAs beside it; '' for none.")] = "1,2,4,8",
    lr: Annotated[
        str, typer.Option(metavar="X,X,...", help="Rates of the subspaces, as full fine-tuning would move.")
    ] = "1e-3,3e-3,1e-2",
    full_lr: Annotated[str, typer.Option(metavar="X,X,...", help="Of full fine-tuning.")] = "1e-4,3e-4,1e-3",
    lora_lr: Annotated[str, typer.Option(metavar="X,X,...", help="Of LoRA.")] = "1e-3,3e-3,1e-2",
    widen: shared.Widen = 2,
    steps: shared.Steps = 100,
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each size at its best rate.")] = 2,
    seed: shared.Seed = 0,
    run: shared.Run,
    written: options.Written,
) -> None:
    """In how few random directions does training get as far? The intrinsic dimension, beside the smallest LoRA.

    Example: loradiag probe intrinsic base/ --data train.txt --eval held_out.txt --dims 100,1000,10000 -o dims.jsonl
    """
    sizes = options.parse_ranks(dims, "--dims")
    beside = options.parse_ranks(ranks) if ranks else []
    such = "1e-4,1e-3"
    paces, full_rates = options.parse_numbers(lr, "--lr", such), options.parse_numbers(full_lr, "--full-lr", such)
    lora_rates = options.parse_numbers(lora_lr, "--lora-lr", such)
    # torch comes with it: not before it is needed
    from lora_diag.probes.intrinsic.run import probe_intrinsic
    from lora_diag.probes.intrinsic.summary import intrinsic_table

    with progress_bar(written.quiet) as on_progress:
        results = probe_intrinsic(
            base,
            data=data,
            **held_out.arguments(),
            dims=sizes,
            method=method,
            share=share,
            ranks=beside,
            paces=paces,
            full_rates=full_rates,
            lora_rates=lora_rates,
            widen=widen,
            steps=steps,
            seeds=seeds,
            seed=seed,
            **vars(run),
            **written.arguments(),
            on_progress=on_progress,
            on_note=shared.noted(written.quiet),
        )
    if written.table:
        then = f"loradiag plan {shlex.quote(str(base))}   (what each rank costs in parameters and memory)"
        result(intrinsic_table(results, *terminal(), then=shared.next_step(written.output, then)))
