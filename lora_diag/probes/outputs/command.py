"""``loradiag probe outputs``: whether adapters say what the fine-tune says."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli import probe_options as shared
from lora_diag.cli.output import progress_bar, result, terminal


@options.spread
def outputs(
    base: shared.Base,
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The full fine-tune.")],
    adapters: Annotated[
        list[Path] | None, typer.Argument(metavar="ADAPTER", help="Adapters, or checkpoints with one merged in.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(metavar="TUNED2", help="Another full fine-tune, such as another seed, to judge by.")
    ] = None,
    *,
    held_out: shared.HeldOut,
    run: shared.Run,
    written: options.Written,
) -> None:
    """Do the adapters say what the fine-tune says? Held-out losses first, then logits, KL and agreement.

    Example: loradiag probe outputs base/ full_ft/ lora_r8/ lora_r64/ --eval held_out.txt -o outputs.jsonl
    """
    # torch comes with it: not before it is needed
    from lora_diag.probes.outputs.run import probe_outputs
    from lora_diag.probes.outputs.summary import outputs_table

    with progress_bar(written.quiet) as on_progress:
        results = probe_outputs(
            base,
            tuned,
            adapters or (),
            reference=reference,
            **held_out.arguments(),
            **vars(run),
            **written.arguments(),
            on_progress=on_progress,
            on_note=shared.noted(written.quiet),
        )
    if written.table:
        others = list(map(str, adapters or []))
        then = shlex.join(["loradiag", "residual", str(base), str(tuned), *others]) + "   (where in the weights)"
        result(outputs_table(results, *terminal(), then=shared.next_step(written.output, then)))
