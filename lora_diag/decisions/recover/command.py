"""``loradiag recover``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import exit_unmeasured, result, terminal
from lora_diag.decisions.recover import RecoverOptions
from lora_diag.errors import INCONCLUSIVE
from lora_diag.running.options import OUTPUT, Option

_OUTPUT = Option(
    None,
    "Folder to write, or results file for records only.",
    "OUT",
    ("--output", "-o"),
    OUTPUT,
)


@options.spread
def recover(
    base: options.Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Fine-tuned checkpoint.")],
    *,
    output: Annotated[Path | None, options.typer_option("output", _OUTPUT)] = None,
    arguments: RecoverOptions,
    shown: options.Rows,
) -> None:
    """Estimate the update that 16-bit storage rounded away.

    A part of the update along the weight itself (weight decay, a rescaled layer) is not seen.

    Example: loradiag recover base/ tuned_bf16/ -o recovery.jsonl

    Example: loradiag recover base/ tuned_bf16/ --rank 16 -o adapter/

    Example: loradiag recover base/ tuned_bf16/ --checkpoint -o recovered/
    """
    full = arguments["full"]
    writes = full or any(arguments[name] is not None for name in ("rank", "energy", "params"))
    if not writes:
        options.check_output(output, arguments["resume"], arguments["overwrite"])
    # deferred: imports torch
    from lora_diag.decisions.recover.measure import recover as estimate
    from lora_diag.decisions.recover.show import is_lost, recovery_table

    with shown.callbacks() as callbacks:
        results = estimate(base, tuned, output, **arguments, **callbacks)
    any_measured = any(record.status != "refused" for record in results)
    lost = is_lost(results)
    if shown.table:
        hint = None
        any_estimated = any(record.status in ("recovered", "size_only") for record in results)
        if not writes and (lost or (any_measured and not any_estimated)):
            command = ["loradiag", "extract", str(base), str(tuned), "--rank", "16", "-o", "adapter/"]
            hint = f"{shlex.join(command)}   (the best adapter of the files' difference)"
        elif not writes and any_measured:
            command = ["loradiag", "recover", str(base), str(tuned), "--checkpoint", "-o", "recovered/"]
            hint = f"{shlex.join(command)}   (the better checkpoint; or --rank R for an adapter)"
        elif any_measured and not full:
            command = ["loradiag", "residual", str(base), str(tuned), str(output)]
            hint = f"{shlex.join(command)}   (distance to the files' difference, rounding included)"
        folder = str(output) if writes else None
        result(recovery_table(results, *terminal(), per=shown.per, next_command=hint, folder=folder))
    exit_unmeasured(results.unmeasured, "the layer was left out")
    if lost or not any_measured:
        raise typer.Exit(INCONCLUSIVE)
