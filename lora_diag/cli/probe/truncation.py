"""``loradiag probe truncation``: what each rank of an update keeps of the loss."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import as_lines, result, terminal
from lora_diag.cli.probe import shared


def truncation(
    base: shared.Base,
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The model after, or an adapter.")],
    eval_: shared.Eval = None,
    shifted: shared.Shifted = None,
    ranks: Annotated[str, typer.Option(metavar="R,R,...", help="Ranks; 0 is BASE there.")] = "0,1,2,4,8,16,32,64",
    per: Annotated[str, typer.Option(metavar="all|layer|type", help="Truncate all together, or each alone.")] = "all",
    rest: Annotated[
        str, typer.Option(metavar="tuned|base", help="What norms, biases, embeddings and head are as.")
    ] = "tuned",
    layers: Annotated[str | None, typer.Option(metavar="REGEX", help="Truncate only weights that match.")] = None,
    exclude: Annotated[str | None, typer.Option(metavar="REGEX", help="Truncate no weights that match.")] = None,
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
    """What does each rank of the update keep of the loss? W_0 + the best rank-r part of ΔW, measured; no training.

    Example: loradiag probe truncation base/ full_ft/ --eval held_out.txt --ranks 0,4,16,64 -o truncation.jsonl
    """
    options.check_resume(resume, output)
    asked = options.parse_ranks(ranks)
    # torch comes with it: not before it is needed
    from lora_diag.api.probe import probe_truncation
    from lora_diag.reports.probe import truncation_table

    with shared.progress(quiet) as on_progress:
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
            on_note=shared.noted(quiet),
        )
    if not json and not quiet:
        then = shlex.join(["loradiag", "spectrum", str(base), str(tuned)]) + "   (C(r) layer by layer, no model run)"
        result(truncation_table(results, *terminal(), then=shared.next_step(output, then)))
