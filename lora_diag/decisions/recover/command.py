"""``loradiag recover``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import result, tell_unmeasured, terminal
from lora_diag.errors import INCONCLUSIVE, UNREADABLE
from lora_diag.running.options import FolderOptions

Rank = Annotated[int | None, typer.Option(metavar="R", help="Write an adapter of this rank.")]
Energy = Annotated[
    float | None, typer.Option(metavar="SHARE", help="Write an adapter that carries this share of each update's Σσ².")
]
Full = Annotated[bool, typer.Option("--full", help="Write a float32 checkpoint: BASE plus the estimated update.")]
Keep = Annotated[
    bool, typer.Option("--keep-refused", help="Write the files' truncated SVD for layers without an estimate.")
]
BaseName = Annotated[
    str | None, typer.Option(metavar="NAME", help="BASE's name for config and card; default its path.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="OUT", help="Folder to write; without a rank or --full: results file."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote there.")]


@options.spread
def recover(
    base: options.Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Checkpoint after, stored in 16 or 8 bits.")],
    rank: Rank = None,
    energy: Energy = None,
    full: Full = False,
    keep_refused: Keep = False,
    base_name: BaseName = None,
    *,
    given: FolderOptions,
    output: Output = None,
    overwrite: Overwrite = False,
    shown: options.Rows,
) -> None:
    """Estimate the update that 16-bit storage rounded away: its size, its ranks, an adapter, a better checkpoint.

    Example: loradiag recover base/ tuned_bf16/ -o recovery.jsonl

    Example: loradiag recover base/ tuned_bf16/ --rank 16 -o adapter/

    Example: loradiag recover base/ tuned_bf16/ --full -o recovered/
    """
    # torch comes with it: not before it is needed
    from lora_diag.decisions.recover.run import recover as estimate
    from lora_diag.decisions.recover.summary import recovery_table

    with shown.callbacks() as callbacks:
        results = estimate(
            base,
            tuned,
            output,
            rank=rank,
            energy=energy,
            full=full,
            keep_refused=keep_refused,
            base_name=base_name,
            overwrite=overwrite,
            **given,
            **callbacks,
        )
    found = any(record.status != "refused" for record in results)
    writes = rank is not None or energy is not None or full
    if shown.table:
        then = None
        if found and not writes:
            words = ["loradiag", "recover", str(base), str(tuned), "--full", "-o", "recovered/"]
            then = f"{shlex.join(words)}   (the better checkpoint; or --rank R for an adapter)"
        elif found and not full:
            words = ["loradiag", "residual", str(base), str(tuned), str(output)]
            then = f"{shlex.join(words)}   (distance to the files' difference, rounding included)"
        folder = str(output) if writes else None
        result(recovery_table(results, *terminal(), per=shown.per, then=then, folder=folder))
    if tell_unmeasured(results.unmeasured, "the layer was left out"):
        raise typer.Exit(UNREADABLE)
    if not found:
        raise typer.Exit(INCONCLUSIVE)
