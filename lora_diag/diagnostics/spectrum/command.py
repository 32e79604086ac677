"""``loradiag spectrum``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_diag.cli import options
from lora_diag.cli.output import again, result, tell_unmeasured, terminal
from lora_diag.errors import UNREADABLE, UsageError
from lora_diag.running.options import LayerOptions, declared, filled

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

RANKS = "4,8,16,32,64"


@options.spread
def spectrum(
    base: Annotated[str | None, typer.Argument(metavar="BASE", help="Checkpoint before, or an adapter alone.")] = None,
    tuned: Annotated[str | None, typer.Argument(metavar="TUNED", help="Checkpoint after, or an adapter.")] = None,
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
    given: LayerOptions,
    shown: options.Rows,
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
        usual = filled(LayerOptions, {})
        exact = "the factors of an adapter give all of its singular values, exactly"
        for option, there, why in (
            ("--activations", activations is not None or kfac, "it measures one update at a time"),
            ("--memory", given["memory"] is not None, "a worker holds one layer of an adapter; --workers bounds it"),
            ("--ranks", ranks != RANKS, "a fleet's records hold no C(r)"),
            ("--top", top is not None, exact),
            ("--tol", given["tol"] != usual["tol"], exact),
            ("--method", given["method"] != usual["method"], exact),
        ):
            if there:
                raise UsageError(f"{option}: not with --adapters: {why}; leave it out")
        _fleet(base, adapters, given, shown)
        return
    # torch comes with it: not before it is needed
    from lora_diag.diagnostics.spectrum.run import spectrum as measure
    from lora_diag.diagnostics.spectrum.table import spectrum_table

    with shown.callbacks() as callbacks:
        results = measure(
            base,
            tuned,
            gradients=gradients or (),
            activations=activations,
            kfac=kfac,
            ranks=options.parse_ranks(ranks),
            top=top,
            **given,
            **callbacks,
        )
    if shown.table:
        then = _next(given["output"]) if results.layers else None  # where there is nothing, its way out is said last
        result(spectrum_table(results, *terminal(), per=shown.per, then=then))
    if tell_unmeasured(results.unmeasured, "the layer was left out"):
        raise typer.Exit(UNREADABLE)


def _fleet(base: str | None, adapters: list[str], given: LayerOptions, shown: options.Rows) -> None:
    """Measure many adapters in one pass."""
    from lora_diag.diagnostics.fleet.run import FleetOptions, fleet, unreadable
    from lora_diag.diagnostics.fleet.summary import fleet_table

    taken: dict[str, Any] = {name: value for name, value in given.items() if name in declared(FleetOptions)}
    listed = [line.rstrip("\n") for line in sys.stdin if line.strip()] if "-" in adapters else []
    with shown.callbacks() as callbacks:
        results = fleet(
            [*(word for word in adapters if word != "-"), *listed],
            base=base,
            **taken,
            **callbacks,
        )
    if shown.table:
        result(fleet_table(results, *terminal(), per=shown.per, then=_next(given["output"])))
    if tell_unmeasured(unreadable(results), "the adapter was left out"):
        raise typer.Exit(UNREADABLE)


def _next(output: Path | str | None) -> str:
    """Return the command that a user would run next, as a shell takes it."""
    if output is None:
        return f"{again('-o', 'results.jsonl')}   (keeps these numbers)"
    words = ["loradiag", "inspect", str(output), "--per", "layer"]
    return f"{shlex.join(words)}   (this table layer by layer, without measuring again)"
