"""``loradiag probe intrinsic``: in how few random directions training gets nearly as far."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import as_lines, result, terminal
from lora_diag.cli.probe import shared


def intrinsic(
    base: shared.Base,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Text or JSONL to train on.")],
    eval_: shared.Eval = None,
    shifted: shared.Shifted = None,
    dims: Annotated[str, typer.Option(metavar="D,D,...", help="Dimensions d.")] = "10,30,100,300,1000,3000,10000",
    method: Annotated[str, typer.Option(metavar="plain|said", help="said: and one scale a layer.")] = "plain",
    share: Annotated[float, typer.Option(metavar="X", help="Share of full fine-tuning's gain to reach.")] = 0.9,
    ranks: Annotated[str, typer.Option(metavar="R,R,...", help="LoRAs beside it; '' for none.")] = "1,2,4,8",
    lr: Annotated[
        str, typer.Option(metavar="X,X,...", help="Rates of the subspaces, as full fine-tuning would move.")
    ] = "1e-3,3e-3,1e-2",
    full_lr: Annotated[str, typer.Option(metavar="X,X,...", help="Of full fine-tuning.")] = "1e-4,3e-4,1e-3",
    lora_lr: Annotated[str, typer.Option(metavar="X,X,...", help="Of LoRA.")] = "1e-3,3e-3,1e-2",
    steps: Annotated[int, typer.Option(metavar="N", help="Updates of a run.")] = 100,
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each size at its best rate.")] = 2,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the data's order, and the first of the seeds.")] = 0,
    length: shared.Length = None,
    batch: shared.Batch = 8,
    max_sequences: shared.MaxSequences = None,
    tokenizer: shared.Tokenizer = "auto",
    device: shared.Device = "auto",
    output: options.Output = None,
    json: options.Json = False,
    resume: options.Resume = False,
    quiet: options.Quiet = False,
) -> None:
    """In how few random directions does training get as far? The intrinsic dimension, beside the smallest LoRA.

    Example: loradiag probe intrinsic base/ --data train.txt --eval held_out.txt --dims 100,1000,10000 -o dims.jsonl
    """
    options.check_resume(resume, output)
    sizes = options.parse_ranks(dims, "--dims")
    beside = options.parse_ranks(ranks) if ranks else []
    such = "1e-4,1e-3"
    paces, full_rates = options.parse_numbers(lr, "--lr", such), options.parse_numbers(full_lr, "--full-lr", such)
    lora_rates = options.parse_numbers(lora_lr, "--lora-lr", such)
    # torch comes with it: not before it is needed
    from lora_diag.api.probe_intrinsic import probe_intrinsic
    from lora_diag.reports.probe_intrinsic import intrinsic_table

    with shared.progress(quiet) as on_progress:
        results = probe_intrinsic(
            base,
            data=data,
            evaluate=eval_ or (),
            shifted=shifted or (),
            dims=sizes,
            method=method,
            share=share,
            ranks=beside,
            paces=paces,
            full_rates=full_rates,
            lora_rates=lora_rates,
            steps=steps,
            seeds=seeds,
            seed=seed,
            length=length,
            batch=batch,
            max_sequences=max_sequences,
            tokenizer=tokenizer,
            device=device,
            output=output,
            resume=resume,
            on_progress=on_progress,
            on_record=as_lines(json),
            on_note=shared.noted(quiet),
        )
    if not json and not quiet:
        then = f"loradiag plan {shlex.quote(str(base))}   (what each rank costs in parameters and memory)"
        result(intrinsic_table(results, *terminal(), then=shared.next_step(output, then)))
