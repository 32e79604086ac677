"""``loradiag plan``."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import line, result, terminal


def plan(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="A checkpoint (headers are read), or a model's config.json.")
    ],
    ranks: Annotated[str, typer.Option(metavar="R,R,...", help="Ranks whose cost is shown.")] = "4,8,16,64",
    target: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="LoRA on weights whose name contains a match, such as 'q_proj|v_proj'."),
    ] = None,
    exclude: options.Exclude = None,
    params: Annotated[str | None, typer.Option(metavar="N", help="Budget: trainable parameters, such as 10M.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Budget: adapter + gradients + optimizer, such as 2GB.")
    ] = None,
    optimizer: Annotated[str, typer.Option(metavar="adamw|adamw8bit|sgd|sgd_momentum", help="For --memory.")] = "adamw",
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="Of trainable weights and gradients.")
    ] = "float32",
    cost: Annotated[
        bool,
        typer.Option("--cost", help="Also how long spectrum would take here; times the machine for seconds."),
    ] = False,
    top: Annotated[int, typer.Option(metavar="K", help="For --cost: also of the K largest values alone.")] = 64,
    json: options.Json = False,
) -> None:
    """What does LoRA cost on this model? Parameters, memory and FLOPs of each rank, beside full fine-tuning.

    Example: loradiag plan base/ --target 'q_proj|v_proj' --params 10M
    """
    from lora_diag.decisions.plan.run import plan as count
    from lora_diag.decisions.plan.summary import plan_table

    found = count(
        base,
        ranks=options.parse_ranks(ranks),
        target=target,
        exclude=exclude,
        params=params,
        memory=memory,
        optimizer=optimizer,
        dtype=dtype,
        cost=cost,
        top=top,
    )
    if json:
        line(found.model_dump_json())
        return
    budget = ["--params", params] if params else ["--memory", memory] if memory else ["--params", "10M"]
    pilot = shlex.join(["loradiag", "spectrum", str(base), "TUNED", "-o", "results.jsonl"])
    chosen = [word for option in (("--target", target), ("--exclude", exclude)) if option[1] for word in option]
    then = f"{pilot}, then {shlex.join(['loradiag', 'allocate', 'results.jsonl', *budget, *map(str, chosen)])}"
    result(plan_table(found, *terminal(), then=then))
