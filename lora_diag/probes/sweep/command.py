"""``loradiag probe sweep``: which rank is enough, by training at each."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_diag.cli import options
from lora_diag.cli import probe_options as shared
from lora_diag.cli.output import again, progress_bar, result, terminal

if TYPE_CHECKING:
    from lora_diag.records import Results


@options.spread
def sweep(
    base: shared.Base,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Text or JSONL to train on.")],
    *,
    held_out: shared.HeldOut,
    ranks: Annotated[str, typer.Option(metavar="R,R,...", help="Ranks to train at.")] = "4,8,16,32,64",
    lr: Annotated[str, typer.Option(metavar="X,X,...", help="Peak learning rates.")] = "1e-4,3e-4,1e-3,3e-3",
    full: Annotated[bool, typer.Option("--full", help="A reference line: full fine-tuning.")] = False,
    full_lr: Annotated[
        str, typer.Option(metavar="X,X,...", help="Peak learning rates of --full.")
    ] = "1e-5,3e-5,1e-4,3e-4",
    bitfit: Annotated[bool, typer.Option("--bitfit", help="A reference line: biases and norms alone.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Train DoRA.")] = False,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / √r, alpha = 16.")] = False,
    quantized: Annotated[
        str | None, typer.Option(metavar="nf4|int8", help="Round the frozen weights as QLoRA stores them.")
    ] = None,
    widen: shared.Widen = 2,
    steps: shared.Steps = 100,
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each rank at its best rate.")] = 2,
    seed: shared.Seed = 0,
    tolerance: Annotated[float, typer.Option(metavar="X", help="Share of the gain a smaller rank may lose.")] = 0.02,
    target: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Modules to adapt; default all linear layers but the head.")
    ] = None,
    run: shared.Run,
    written: options.Written,
) -> None:
    """Which rank is enough? LoRA trained at each, on the same batches, the learning rate tuned for each rank.

    Example: loradiag probe sweep base/ --data train.txt --eval held_out.txt --steps 200 -o sweep.jsonl
    """
    asked, rates = options.parse_ranks(ranks), options.parse_numbers(lr, "--lr", "1e-4,1e-3")
    full_rates = options.parse_numbers(full_lr, "--full-lr", "1e-5,1e-4")
    # torch comes with it: not before it is needed
    from lora_diag.probes.sweep.run import probe_sweep
    from lora_diag.probes.sweep.summary import sweep_table

    with progress_bar(written.quiet) as on_progress:
        results = probe_sweep(
            base,
            data=data,
            **held_out.arguments(),
            ranks=asked,
            rates=rates,
            full=full,
            full_rates=full_rates,
            bitfit=bitfit,
            dora=dora,
            rslora=rslora,
            quantized=quantized,
            widen=widen,
            steps=steps,
            seeds=seeds,
            seed=seed,
            tolerance=tolerance,
            targets=target.split(",") if target else (),
            **vars(run),
            **written.arguments(),
            on_progress=on_progress,
            on_note=shared.noted(written.quiet),
        )
    if written.table:
        result(sweep_table(results, *terminal(), then=shared.next_step(written.output, _next(results, base))))


def _next(results: Results[Any], base: Path) -> str:
    """Return the command that a user would run next: more seeds where they would tell, else what the rank costs."""
    from lora_diag.probes.sweep.summary import main_verdict

    verdict = main_verdict(results)
    if verdict is not None and verdict.more_seeds is not None:
        return f"{again('--seeds', str(verdict.more_seeds), '--resume')}   (adds seeds to these)"
    chosen = None if verdict is None else verdict.chosen
    command = f"loradiag plan {shlex.quote(str(base))}"
    if chosen is None:
        return f"{command}   (what each rank costs in parameters and memory)"
    return f"{command} --ranks {chosen.rank}   (what it costs; train it at learning rate {chosen.lr:g})"
