"""``loradiag plan-merge``."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import exit_unmeasured, rerun_command
from lora_diag.decisions.plan_merge import PlanMergeOptions

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter to merge.")]


@options.spread
def plan_merge(
    base: options.Base,
    adapter: Adapter,
    *,
    arguments: PlanMergeOptions,
    shown: options.Rows,
) -> None:
    """How much of ΔW survives a merge into a storage format.

    Example: loradiag plan-merge base/ lora_r16/ --to mxfp4
    """
    # deferred: imports torch
    from lora_diag.decisions.plan_merge.measure import plan_merge as measure

    with shown.callbacks() as callbacks:
        results = measure(base, adapter, **arguments, **callbacks)
    hint = f"{rerun_command('--per', 'layer')}   (layer by layer)"
    if arguments["output"] is not None:
        command = shlex.join(["loradiag", "inspect", str(arguments["output"]), "--per", "layer"])
        hint = f'{command}   (layer by layer; loradiag gate takes a rule such as require = "error <= 0.5")'
    shown.show(results, hint)
    exit_unmeasured(results.unmeasured, "the layer was left out")
