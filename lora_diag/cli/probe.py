"""``loradiag probe``: the diagnostics that run a model."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import again, as_lines, message, result, terminal
from lora_diag.reports.text import safe

Base = Annotated[Path, typer.Argument(metavar="BASE", help="The model before: a folder for transformers, or a Hub id.")]
Eval = Annotated[list[Path] | None, typer.Option("--eval", metavar="FILE", help="Held-out text or JSONL; repeatable.")]
Shifted = Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Text of another kind; repeatable.")]
Length = Annotated[int | None, typer.Option(metavar="N", help="Tokens of a sequence; default 512 or the model's most.")]
Batch = Annotated[int, typer.Option(metavar="N", help="Sequences in a batch.")]
MaxSequences = Annotated[int | None, typer.Option(metavar="N", help="Use the first N sequences of each file.")]
Tokenizer = Annotated[str, typer.Option(metavar="auto|bytes|DIR", help="Of BASE; UTF-8 bytes; or of a folder.")]
Dtype = Annotated[str, typer.Option(metavar="float32|bfloat16|float16", help="Of the weights while they run.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where to run the model.")]


def truncation(
    base: Base,
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The model after, or an adapter.")],
    eval_: Eval = None,
    shifted: Shifted = None,
    ranks: Annotated[str, typer.Option(metavar="R,R,...", help="Ranks; 0 is BASE there.")] = "0,1,2,4,8,16,32,64",
    per: Annotated[str, typer.Option(metavar="all|layer|type", help="Truncate all together, or each alone.")] = "all",
    rest: Annotated[
        str, typer.Option(metavar="tuned|base", help="What norms, biases, embeddings and head are as.")
    ] = "tuned",
    layers: Annotated[str | None, typer.Option(metavar="REGEX", help="Truncate only weights that match.")] = None,
    exclude: Annotated[str | None, typer.Option(metavar="REGEX", help="Truncate no weights that match.")] = None,
    length: Length = None,
    batch: Batch = 8,
    max_sequences: MaxSequences = None,
    tokenizer: Tokenizer = "auto",
    dtype: Dtype = "float32",
    device: Device = "auto",
    output: options.Output = None,
    json: options.Json = False,
    resume: options.Resume = False,
    quiet: options.Quiet = False,
) -> None:
    """What does each rank of the update keep of the loss? W_0 + the best rank-r part of ΔW, measured; no training.

    Example: loradiag probe truncation base/ full_ft/ --eval held_out.txt --ranks 0,4,16,64 -o truncation.jsonl
    """
    options.check_resume(resume, output)
    asked = options.parse_ranks(ranks)
    # torch comes with it: not before it is needed
    from lora_diag.api.probe import probe_truncation
    from lora_diag.reports.probe import truncation_table

    with _progress(quiet) as on_progress:
        results = probe_truncation(
            base,
            tuned,
            evaluate=eval_ or (),
            shifted=shifted or (),
            ranks=asked,
            per=per,
            rest=rest,
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
            on_note=_noted(quiet),
        )
    if not json and not quiet:
        then = shlex.join(["loradiag", "spectrum", str(base), str(tuned)]) + "   (C(r) layer by layer, no model run)"
        result(truncation_table(results, *terminal(), then=_next(output, then)))


def activations(
    base: Base,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Text or JSONL of the kind the model will see.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="New safetensors file.")],
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    length: Length = None,
    batch: Batch = 8,
    max_sequences: MaxSequences = None,
    tokenizer: Tokenizer = "auto",
    dtype: Dtype = "float32",
    device: Device = "auto",
    per: options.PerRow = options.Per.type,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Which inputs do the layers get on your text? C = E[xx^T] of each, which residual --activations measures in.

    Example: loradiag probe activations base/ --data text.txt -o activations.safetensors
    """
    # torch comes with it: not before it is needed
    from lora_diag.api.probe_activations import probe_activations
    from lora_diag.reports.activations import activations_table

    with _progress(quiet) as on_progress:
        recorded = probe_activations(
            base,
            data,
            output,
            layers=layers,
            exclude=exclude,
            length=length,
            batch=batch,
            max_sequences=max_sequences,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            on_progress=on_progress,
            on_note=_noted(quiet),
        )
    if json:
        result(recorded.model_dump_json())
    elif not quiet:
        then = f"loradiag residual {shlex.quote(str(base))} TUNED ADAPTER --activations {shlex.quote(str(output))}"
        result(activations_table(recorded, *terminal(), per=per, then=then))


def outputs(
    base: Base,
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The full fine-tune.")],
    adapters: Annotated[
        list[Path] | None, typer.Argument(metavar="ADAPTER", help="Adapters, or checkpoints with one merged in.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="TUNED2", help="Another full fine-tune, such as another seed, to judge by.")
    ] = None,
    eval_: Eval = None,
    shifted: Shifted = None,
    length: Length = None,
    batch: Batch = 8,
    max_sequences: MaxSequences = None,
    tokenizer: Tokenizer = "auto",
    dtype: Dtype = "float32",
    device: Device = "auto",
    output: options.Output = None,
    json: options.Json = False,
    resume: options.Resume = False,
    quiet: options.Quiet = False,
) -> None:
    """Do the adapters say what the fine-tune says? Held-out losses first, then logits, KL and agreement.

    Example: loradiag probe outputs base/ full_ft/ lora_r8/ lora_r64/ --eval held_out.txt -o outputs.jsonl
    """
    options.check_resume(resume, output)
    # torch comes with it: not before it is needed
    from lora_diag.api.probe_outputs import probe_outputs
    from lora_diag.reports.probe_outputs import outputs_table

    with _progress(quiet) as on_progress:
        results = probe_outputs(
            base,
            tuned,
            adapters or (),
            reference=reference,
            evaluate=eval_ or (),
            shifted=shifted or (),
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
            on_note=_noted(quiet),
        )
    if not json and not quiet:
        others = list(map(str, adapters or []))
        then = shlex.join(["loradiag", "residual", str(base), str(tuned), *others]) + "   (where in the weights)"
        result(outputs_table(results, *terminal(), then=_next(output, then)))


def sweep(
    base: Base,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Text or JSONL to train on.")],
    eval_: Eval = None,
    shifted: Shifted = None,
    ranks: Annotated[str, typer.Option(metavar="R,R,...", help="Ranks to train at.")] = "4,8,16,32,64",
    lr: Annotated[str, typer.Option(metavar="X,X,...", help="Peak learning rates.")] = "1e-4,3e-4,1e-3,3e-3",
    steps: Annotated[int, typer.Option(metavar="N", help="Updates of a run.")] = 100,
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each rank at its best rate.")] = 2,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the data's order, and the first of the seeds.")] = 0,
    tolerance: Annotated[float, typer.Option(metavar="X", help="Share of the gain a smaller rank may lose.")] = 0.02,
    target: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Modules to adapt; default all linear layers but the head.")
    ] = None,
    length: Length = None,
    batch: Batch = 8,
    max_sequences: MaxSequences = None,
    tokenizer: Tokenizer = "auto",
    dtype: Dtype = "float32",
    device: Device = "auto",
    output: options.Output = None,
    json: options.Json = False,
    resume: options.Resume = False,
    quiet: options.Quiet = False,
) -> None:
    """Which rank is enough? LoRA trained at each, on the same batches, the learning rate tuned for each rank.

    Example: loradiag probe sweep base/ --data train.txt --eval held_out.txt --steps 200 -o sweep.jsonl
    """
    options.check_resume(resume, output)
    asked, rates = options.parse_ranks(ranks), options.parse_numbers(lr, "--lr", "1e-4,1e-3")
    # torch comes with it: not before it is needed
    from lora_diag.api.probe_sweep import probe_sweep
    from lora_diag.reports.probe_sweep import sweep_table

    with _progress(quiet) as on_progress:
        results = probe_sweep(
            base,
            data=data,
            evaluate=eval_ or (),
            shifted=shifted or (),
            ranks=asked,
            rates=rates,
            steps=steps,
            seeds=seeds,
            seed=seed,
            tolerance=tolerance,
            targets=target.split(",") if target else (),
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
            on_note=_noted(quiet),
        )
    if not json and not quiet:
        then = f"loradiag plan {shlex.quote(str(base))}   (what each rank costs in parameters and memory)"
        result(sweep_table(results, *terminal(), then=_next(output, then)))


PROBES = (truncation, activations, outputs, sweep)


def _noted(quiet: bool) -> Callable[[str], None] | None:
    return None if quiet else message


def _next(output: Path | None, then: str) -> str:
    """Return the command that a user would run next, as a shell takes it."""
    if output is not None:
        return then
    return f"{again('-o', 'probe.jsonl')}   (keeps these numbers)"


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Give a function that shows how far a run is; nothing where standard error is not a terminal."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.completed}/{task.total}"),
        progress.BarColumn(bar_width=20),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}", markup=False),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda label, done, total: bar.update(task, description=safe(label), completed=done, total=total)
