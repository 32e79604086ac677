"""``loradiag spectrum``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import again, progress_bar, result, tell_unmeasured, terminal
from lora_diag.errors import UNREADABLE, UsageError

Activations = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Second moments by probe activations: energy is then output change on that text."
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="Many adapters in one pass, such as 'runs/**'; - reads a list from standard input."
    ),
]

RANKS, TOL = "4,8,16,32,64", 1e-4


@options.spread
def spectrum(
    base: Annotated[str | None, typer.Argument(metavar="BASE", help="Checkpoint before, or an adapter alone.")] = None,
    tuned: options.Tuned = None,
    gradients: Annotated[
        list[str] | None,
        typer.Option(metavar="GRADIENTS...", help="Measure gradients instead, those of all steps together."),
    ] = None,
    adapters: Adapters = None,
    activations: Activations = None,
    kfac: Annotated[
        bool, typer.Option("--kfac", help="With --activations: weigh by the gradients of the outputs, too.")
    ] = False,
    ranks: Annotated[
        str, typer.Option(metavar="R,R,...", help="Ranks r at which C(r) and the errors are given.")
    ] = RANKS,
    top: Annotated[int | None, typer.Option(metavar="K", help="Keep only the K largest singular values.")] = None,
    *,
    compared: options.Compared,
    tol: options.Tol = TOL,
    computed: options.Computed,
    per: options.PerRow = options.Per.type,
    written: options.Written,
) -> None:
    """Is the update low-rank, layer by layer? Singular values of ΔW = W_tuned - W_base.

    Example: loradiag spectrum base/ full_ft/ --ranks 8,16,64 -o results.jsonl

    Example: loradiag spectrum base/ full_ft/ --activations activations.safetensors

    Example: loradiag spectrum base/ --gradients gradients/

    Example: loradiag spectrum --adapters 'adapters/**' -o fleet.jsonl
    """
    if adapters:
        if tuned is not None or gradients:
            raise UsageError("--adapters: measures adapters, with BASE alone beside them, or nothing")
        exact = "the factors of an adapter give all of its singular values, exactly"
        for option, given, why in (
            ("--activations", activations is not None or kfac, "it measures one update at a time"),
            ("--memory", computed.memory is not None, "a worker holds one layer of an adapter; --workers bounds it"),
            ("--ranks", ranks != RANKS, "a fleet's records hold no C(r)"),
            ("--top", top is not None, exact),
            ("--tol", tol != TOL, exact),
            ("--method", computed.method != "auto", exact),
        ):
            if given:
                raise UsageError(f"{option}: not with --adapters: {why}; leave it out")
        _fleet(base, adapters, compared, computed, per, written)
        return
    # torch comes with it: not before it is needed
    from lora_diag.diagnostics.spectrum.run import spectrum as measure
    from lora_diag.diagnostics.spectrum.table import spectrum_table

    with progress_bar(written.quiet) as on_progress:
        results = measure(
            base,
            tuned,
            gradients=gradients or (),
            activations=activations,
            kfac=kfac,
            ranks=options.parse_ranks(ranks),
            top=top,
            tol=tol,
            **vars(compared),
            **computed.arguments(),
            **written.arguments(),
            on_progress=on_progress,
        )
    if written.table:
        then = _next(written.output) if results.layers else None  # where there is nothing, its way out is said last
        result(spectrum_table(results, *terminal(), per=per, then=then))
    if tell_unmeasured(results.unmeasured, "the layer was left out"):
        raise typer.Exit(UNREADABLE)


def _fleet(
    base: str | None,
    adapters: list[str],
    compared: options.Compared,
    computed: options.Computed,
    per: options.Per,
    written: options.Written,
) -> None:
    """Measure many adapters in one pass."""
    from lora_diag.diagnostics.fleet.run import fleet, unreadable
    from lora_diag.diagnostics.fleet.summary import fleet_table

    listed = [line.rstrip("\n") for line in sys.stdin if line.strip()] if "-" in adapters else []
    with progress_bar(written.quiet) as on_progress:
        results = fleet(
            [*(word for word in adapters if word != "-"), *listed],
            base=base,
            layers=compared.layers,
            exclude=compared.exclude,
            device=computed.device,
            workers=computed.workers,
            engine=computed.cluster(),
            **written.arguments(),
            on_progress=on_progress,
        )
    if written.table:
        result(fleet_table(results, *terminal(), per=per, then=_next(written.output)))
    if tell_unmeasured(unreadable(results), "the adapter was left out"):
        raise typer.Exit(UNREADABLE)


def _next(output: Path | None) -> str:
    """Return the command that a user would run next, as a shell takes it."""
    if output is None:
        return f"{again('-o', 'results.jsonl')}   (keeps these numbers)"
    words = ["loradiag", "inspect", str(output), "--per", "layer"]
    return f"{shlex.join(words)}   (this table layer by layer, without measuring again)"
