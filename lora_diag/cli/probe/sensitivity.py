"""``loradiag probe sensitivity``: which layers are worth adapting, by adapting each alone."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import as_lines, result, terminal
from lora_diag.cli.probe import shared


def sensitivity(
    base: shared.Base,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Text or JSONL to train on.")],
    eval_: shared.Eval = None,
    shifted: shared.Shifted = None,
    rank: Annotated[int, typer.Option(metavar="R", help="Rank to train at.")] = 8,
    delta: Annotated[
        int | None, typer.Option(metavar="D", help="Train at R + D, too, for the marginal gain g(R → R + D).")
    ] = None,
    per: Annotated[str, typer.Option(metavar="layer|block|type", help="What is adapted alone.")] = "layer",
    lr: Annotated[str, typer.Option(metavar="X,X,...", help="Peak learning rates; each takes its best.")] = "1e-3,1e-2",
    steps: Annotated[int, typer.Option(metavar="N", help="Updates of a run.")] = 50,
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each at its best rate.")] = 1,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the data's order, and the first of the seeds.")] = 0,
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    length: shared.Length = None,
    batch: shared.Batch = 8,
    max_sequences: shared.MaxSequences = None,
    tokenizer: shared.Tokenizer = "auto",
    dtype: shared.Dtype = "float32",
    device: shared.Device = "auto",
    output: options.Output = None,
    json: options.Json = False,
    resume: options.Resume = False,
    quiet: options.Quiet = False,
) -> None:
    """Which layers gain most? A LoRA trained on each alone, beside what one gradient pass would have said.

    Example: loradiag probe sensitivity base/ --data train.txt --eval held_out.txt -o sensitivity.jsonl
    """
    options.check_resume(resume, output)
    rates = options.parse_numbers(lr, "--lr", "1e-3,1e-2")
    # torch comes with it: not before it is needed
    from lora_diag.api.probe_sensitivity import probe_sensitivity
    from lora_diag.reports.probe_sensitivity import sensitivity_table

    with shared.progress(quiet) as on_progress:
        results = probe_sensitivity(
            base,
            data=data,
            evaluate=eval_ or (),
            shifted=shifted or (),
            rank=rank,
            delta=delta,
            per=per,
            rates=rates,
            steps=steps,
            seeds=seeds,
            seed=seed,
            layers=layers,
            exclude=exclude,
            length=length,
            batch=batch,
            max_sequences=max_sequences,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            output=output,
            resume=resume,
            on_progress=on_progress,
            on_record=as_lines(json),
            on_note=shared.noted(quiet),
        )
    if not json and not quiet:
        weights = shlex.quote(str(output)) if output is not None else ""
        then = f"loradiag allocate SPECTRUM.jsonl --params 10M --weights {weights}   (ranks where the loss gains)"
        result(sensitivity_table(results, *terminal(), then=shared.next_step(output, then)))
