"""``loradiag extract``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lora_diag.cli import options
from lora_diag.cli.output import progress_bar, result, tell_unmeasured, terminal
from lora_diag.errors import UNREADABLE, UsageError

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
BaseName = Annotated[
    str | None, typer.Option(metavar="NAME", help="BASE's name for config and card; default its path.")
]
Sweep = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Results of probe sweep; the card names their best learning rate.")
]


@dataclass(frozen=True)
class Folder(options.Written):
    """Where the adapter goes."""

    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="ADAPTER", help="Adapter folder to write.")
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an extracted adapter that is there.")] = False

    def __post_init__(self) -> None:
        if self.output is None:
            raise UsageError("extract: name the adapter folder to write with -o")
        super().__post_init__()

    def check(self, output: Path) -> None:
        """Refuse a folder that could not be written."""
        from lora_diag.decisions.extract.folder import OutputFolder

        OutputFolder(output, (), self.overwrite, self.resume)


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
    base_name: BaseName = None,
    sweep: Sweep = None,
    *,
    compared: options.Compared,
    tol: options.Tol = 1e-4,
    computed: options.Computed,
    per: options.PerRow = options.Per.type,
    written: Folder,
) -> None:
    """Write that adapter: the best one of given ranks for ΔW, in PEFT's format, with its error as it was written.

    Example: loradiag extract base/ full_ft/ --rank 16 -o adapter/
    """
    # torch comes with it: not before it is needed
    from lora_diag.decisions.extract.run import extract as write
    from lora_diag.decisions.extract.summary import extraction_table

    with progress_bar(written.quiet) as on_progress:
        results = write(
            base,
            tuned,
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
            base_name=base_name,
            sweep=sweep,
            tol=tol,
            **vars(compared),
            **computed.arguments(),
            **written.arguments(),
            on_progress=on_progress,
        )
    if written.table:
        then = shlex.join(["loradiag", "residual", str(base), str(tuned), str(written.output)])
        then += "   (this adapter held against TUNED)"
        result(extraction_table(results, *terminal(), per=per, then=then, folder=str(written.output)))
    if tell_unmeasured(results.unmeasured, "the layer is not in the adapter"):
        raise typer.Exit(UNREADABLE)
