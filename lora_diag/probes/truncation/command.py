"""``loradiag probe truncation``: what each rank of an update keeps of the loss."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli import probe_options as shared
from lora_diag.cli.output import progress_bar, result, terminal


@options.spread
def truncation(
    base: shared.Base,
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The model after, or an adapter.")],
    *,
    held_out: shared.HeldOut,
    ranks: Annotated[str, typer.Option(metavar="R,R,...", help="Ranks; 0 is BASE there.")] = "0,1,2,4,8,16,32,64",
    per: Annotated[str, typer.Option(metavar="all|layer|type", help="Truncate all together, or each alone.")] = "all",
    rest: Annotated[
        str, typer.Option(metavar="tuned|base", help="What norms, biases, embeddings and head are as.")
    ] = "tuned",
    layers: Annotated[str | None, typer.Option(metavar="REGEX", help="Truncate only weights that match.")] = None,
    exclude: Annotated[str | None, typer.Option(metavar="REGEX", help="Truncate no weights that match.")] = None,
    run: shared.Run,
    written: options.Written,
) -> None:
    """What does each rank of the update keep of the loss? W_0 + the best rank-r part of ΔW, measured; no training.

    Example: loradiag probe truncation base/ full_ft/ --eval held_out.txt --ranks 0,4,16,64 -o truncation.jsonl
    """
    asked = options.parse_ranks(ranks)
    # torch comes with it: not before it is needed
    from lora_diag.probes.truncation.run import probe_truncation
    from lora_diag.probes.truncation.summary import truncation_table

    with progress_bar(written.quiet) as on_progress:
        results = probe_truncation(
            base,
            tuned,
            **held_out.arguments(),
            ranks=asked,
            per=per,
            rest=rest,
            layers=layers,
            exclude=exclude,
            **vars(run),
            **written.arguments(),
            on_progress=on_progress,
            on_note=shared.noted(written.quiet),
        )
    if written.table:
        then = shlex.join(["loradiag", "spectrum", str(base), str(tuned)]) + "   (C(r) layer by layer, no model run)"
        result(truncation_table(results, *terminal(), then=shared.next_step(written.output, then)))
