"""``loradiag allocate``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import again, check_outputs, line, result, terminal
from lora_diag.errors import UsageError

if TYPE_CHECKING:
    from lora_diag.decisions.allocate.record import Allocation
    from lora_diag.records import Results


def allocate(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Results file of spectrum.")],
    params: Annotated[str | None, typer.Option(metavar="N", help="Budget: trainable parameters, such as 10M.")] = None,
    total_rank: Annotated[int | None, typer.Option(metavar="R", help="Budget: ranks in all.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Budget: adapter + gradients + optimizer, such as 2GB."),
    ] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="SHARE", help="No budget: smallest ranks that keep this share, such as 0.9.")
    ] = None,
    match: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="Budget: as many parameters as this adapter.")
    ] = None,
    policies: Annotated[bool, typer.Option("--policies", help="No allocation: the ranks of several rules.")] = False,
    min_rank: Annotated[int, typer.Option(metavar="R", help="Smallest rank of a layer with any signal.")] = 0,
    max_rank: Annotated[int | None, typer.Option(metavar="R", help="Largest rank of a layer.")] = None,
    ranks_from: Annotated[
        str | None, typer.Option(metavar="R,R,...", help="The only ranks a layer may have, such as 8,16,32,64.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="Only layers whose name contains a match; default: no embeddings, head, routers."
        ),
    ] = None,
    exclude: Annotated[str | None, typer.Option(metavar="REGEX", help="No layers whose name contains a match.")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON of layer and factor, or results of probe sensitivity or fisher."),
    ] = None,
    relative: Annotated[bool, typer.Option("--relative", help="Count every layer's energy as 1.")] = False,
    method: Annotated[
        str,
        typer.Option(
            metavar="optimal|heuristic", help="The most energy, or r ∝ s·√(d_in + d_out) with s the sensitivity."
        ),
    ] = "optimal",
    optimizer: Annotated[str, typer.Option(metavar="adamw|adamw8bit|sgd|sgd_momentum", help="For --memory.")] = "adamw",
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="Of adapter and gradients, for --memory.")
    ] = "float32",
    scaling: Annotated[float, typer.Option(metavar="S", help="lora_alpha / r that the PEFT config keeps.")] = 2.0,
    rslora: Annotated[bool, typer.Option("--rslora", help="PEFT config: scaling lora_alpha / √r.")] = False,
    check: Annotated[
        Path | None,
        typer.Option(metavar="BASE", help="PEFT config: build this model without weights and compare every rank."),
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Results of probe sweep; Next names their best learning rate.")
    ] = None,
    allow_unfinished: Annotated[
        bool, typer.Option("--allow-unfinished", help="Take an interrupted spectrum run for what it holds.")
    ] = False,
    per: options.PerRow = options.Per.type,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="PEFT config (.json) or records (.jsonl).")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Where should rank go? Ranks that keep the most energy within a budget, and how far from the best they are.

    Example: loradiag allocate results.jsonl --params 10M -o adapter_config.json
    """
    from lora_diag.decisions.allocate.run import allocate as choose
    from lora_diag.decisions.allocate.run import kind_of_allocation, rank_table, write_allocation
    from lora_diag.records import lines_of

    if policies:
        if output is not None:
            raise UsageError("--policies: shows ranks and writes none; give a budget for -o")
        chosen = (
            params,
            total_rank,
            memory,
            energy,
            match,
            max_rank,
            ranks_from,
            target,
            exclude,
            weights,
            check,
            sweep,
        )
        if any(one is not None for one in chosen) or min_rank or relative or method != "optimal":
            raise UsageError("--policies: shows what several rules give every layer; leave out budgets and limits")
        from lora_diag.decisions.allocate.policies_table import policies_table

        found = rank_table(results, allow_unfinished)
        for row in found if json else ():
            line(row.model_dump_json())
        if not json:
            result(policies_table(found, *terminal(), per=per))
        return
    if check is not None and output is None:
        raise UsageError("--check: there is no config to check; write one with -o adapter_config.json")
    if output is not None:
        check_outputs([results, weights], [(output, kind_of_allocation(output, check))], overwrite)
    rate = ""
    if sweep is not None:
        from lora_diag.probes.sweep.best_rate import swept_rate

        rate = f"\nlearning rate {swept_rate(sweep)}"
    allocation = choose(
        results,
        params=params,
        total_rank=total_rank,
        memory=memory,
        energy=energy,
        match=match,
        min_rank=min_rank,
        max_rank=max_rank,
        ranks_from=options.parse_ranks(ranks_from, "--ranks-from") if ranks_from is not None else None,
        target=target,
        exclude=exclude,
        weights=weights,
        relative=relative,
        method=method,
        optimizer=optimizer,
        dtype=dtype,
        allow_unfinished=allow_unfinished,
    )
    if output is not None:
        write_allocation(allocation, output, scaling, rslora, check, overwrite)
    if json:
        for text in lines_of(allocation.records()):
            line(text)
    elif not quiet:
        from lora_diag.decisions.allocate.summary import allocation_table

        result(allocation_table(allocation, *terminal(), per=per, then=f"{_next(allocation, output, check)}{rate}"))


def _next(allocation: Results[Allocation], output: Path | None, check: Path | None) -> str:
    """Return the command that a user would run next, as a shell takes it."""
    if output is None:
        return f"{again('-o', 'adapter_config.json')}   (for training with PEFT; .jsonl for loradiag extract)"
    if output.name == "adapter_config.json":
        config = f"peft.LoraConfig.from_pretrained({str(output.parent)!r}) is the config to train with"
        base = next((side.path for side in allocation.run.inputs if side.role == "base"), None)
        unchecked = f"; PEFT skips names that the model in memory lacks, so once: {again('--check', base or 'BASE')}"
        return config if check is not None else config + unchecked
    if output.suffix == ".json":
        return "rename it to adapter_config.json: PEFT reads no other name"
    paths = [side.path for side in allocation.run.inputs if side.role in {"base", "tuned", "adapter"}]
    weighed = [side.path for side in allocation.run.inputs if side.role == "activations"]
    metric = [word for path in weighed for word in ("--activations", path)]
    metric += ["--kfac"] if allocation.run.settings.get("metric") == "kfac" else []
    return shlex.join(["loradiag", "extract", *paths, "--ranks", str(output), *metric, "-o", "adapter"])
