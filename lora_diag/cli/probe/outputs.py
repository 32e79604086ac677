"""``loradiag probe outputs``: whether adapters say what the fine-tune says."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import as_lines, result, terminal
from lora_diag.cli.probe import shared


def outputs(
    base: shared.Base,
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The full fine-tune.")],
    adapters: Annotated[
        list[Path] | None, typer.Argument(metavar="ADAPTER", help="Adapters, or checkpoints with one merged in.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="TUNED2", help="Another full fine-tune, such as another seed, to judge by.")
    ] = None,
    eval_: shared.Eval = None,
    shifted: shared.Shifted = None,
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
    """Do the adapters say what the fine-tune says? Held-out losses first, then logits, KL and agreement.

    Example: loradiag probe outputs base/ full_ft/ lora_r8/ lora_r64/ --eval held_out.txt -o outputs.jsonl
    """
    options.check_resume(resume, output)
    # torch comes with it: not before it is needed
    from lora_diag.api.probe_outputs import probe_outputs
    from lora_diag.reports.probe_outputs import outputs_table

    with shared.progress(quiet) as on_progress:
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
            on_note=shared.noted(quiet),
        )
    if not json and not quiet:
        others = list(map(str, adapters or []))
        then = shlex.join(["loradiag", "residual", str(base), str(tuned), *others]) + "   (where in the weights)"
        result(outputs_table(results, *terminal(), then=shared.next_step(output, then)))
