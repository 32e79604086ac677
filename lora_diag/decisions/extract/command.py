"""``loradiag extract``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lora_diag.cli import options
from lora_diag.cli.output import result, tell_unmeasured, terminal
from lora_diag.errors import UNREADABLE, UsageError
from lora_diag.running.options import FolderOptions

Rank = Annotated[int | None, typer.Option(metavar="R", help="The same rank for every layer.")]
Energy = Annotated[float | None, typer.Option(metavar="SHARE", help="Smallest rank that keeps this share of Σσ².")]
Params = Annotated[
    str | None, typer.Option(metavar="N", help="Parameters in all, such as 10M, spent as allocate does.")
]
RanksFrom = Annotated[
    Path | None, typer.Option(metavar="ALLOCATION", help="Ranks by allocate: results or adapter_config.json.")
]
Signal = Annotated[bool, typer.Option("--signal", help="As many ranks as stand above the files' rounding noise.")]
Activations = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Second moments by probe activations: factors best in output on that text."),
]
KFac = Annotated[bool, typer.Option("--kfac", help="With --activations: best by K-FAC, with the gradients in it.")]
Split = Annotated[str, typer.Option(metavar="both|b", help="√Σ into both factors, or all of Σ into B.")]
Dtype = Annotated[str, typer.Option(metavar="float32|bfloat16|float16", help="How factors are stored.")]
Rest = Annotated[str, typer.Option(metavar="list|save", help="What no factor carries: list it, or store it in full.")]
Portable = Annotated[
    bool, typer.Option("--portable", help="One rank for all, zeros where it is lower: every program scales it alike.")
]
BaseName = Annotated[
    str | None, typer.Option(metavar="NAME", help="BASE's name for config and card; default its path.")
]
Sweep = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Results of probe sweep; the card names their best learning rate.")
]


Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="ADAPTER", help="Adapter folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an extracted adapter that is there.")]


@options.spread
def extract(
    base: options.Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Checkpoint after, or an adapter to compress.")],
    rank: Rank = None,
    energy: Energy = None,
    params: Params = None,
    ranks: RanksFrom = None,
    signal: Signal = False,
    activations: Activations = None,
    kfac: KFac = False,
    split: Split = "both",
    dtype: Dtype = "float32",
    rest: Rest = "list",
    portable: Portable = False,
    base_name: BaseName = None,
    sweep: Sweep = None,
    *,
    given: FolderOptions,
    output: Output = None,
    overwrite: Overwrite = False,
    shown: options.Rows,
) -> None:
    """Write that adapter: the best one of given ranks for ΔW, in PEFT's format, with its error as it was written.

    Example: loradiag extract base/ full_ft/ --rank 16 -o adapter/
    """
    from lora_diag.decisions.extract.folder import OutputFolder

    if output is None:
        raise UsageError("extract: name the adapter folder to write with -o")
    OutputFolder(output, (), overwrite, given["resume"])
    # torch comes with it: not before it is needed
    from lora_diag.decisions.extract.run import extract as write
    from lora_diag.decisions.extract.summary import extraction_table

    with shown.callbacks() as callbacks:
        results = write(
            base,
            tuned,
            output,
            rank=rank,
            energy=energy,
            params=params,
            ranks=ranks,
            signal=signal,
            activations=activations,
            kfac=kfac,
            split=cast(Any, split),
            dtype=dtype,
            rest=cast(Any, rest),
            portable=portable,
            base_name=base_name,
            sweep=sweep,
            overwrite=overwrite,
            **given,
            **callbacks,
        )
    if shown.table:
        then = shlex.join(["loradiag", "residual", str(base), str(tuned), str(output)])
        then += "   (this adapter held against TUNED)"
        result(extraction_table(results, *terminal(), per=shown.per, then=then, folder=str(output)))
    if tell_unmeasured(results.unmeasured, "the layer is not in the adapter"):
        raise typer.Exit(UNREADABLE)
