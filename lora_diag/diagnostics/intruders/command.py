"""``loradiag intruders``."""

from __future__ import annotations

import shlex
from pathlib import Path

from lora_diag.cli import options
from lora_diag.cli.output import exit_unmeasured
from lora_diag.diagnostics.intruders import IntruderOptions


@options.spread
def intruders(
    base: options.Base,
    tuned: options.Tuned,
    *,
    arguments: IntruderOptions,
    shown: options.Rows,
) -> None:
    """Intruder dimensions: large directions unlike any of BASE.

    Example: loradiag intruders base/ lora_r8/ -o intruders.jsonl
    """
    # deferred: imports torch
    from lora_diag.diagnostics.intruders.measure import intruders as measure

    with shown.callbacks() as callbacks:
        results = measure(base, tuned, **arguments, **callbacks)
    hint = _suggest_next(base, tuned, arguments["output"]) if results.layers else None
    shown.show(results, hint)
    exit_unmeasured(results.unmeasured, "the layer was left out")


def _suggest_next(base: str, tuned: str, output: Path | str | None) -> str:
    if output is None:
        command = shlex.join(["loradiag", "intruders", str(base), str(tuned), "--per", "layer"])
        return f"{command}   (each layer; -o FILE keeps the records for loradiag gate)"
    # Not gate init: without intruders, or with little else, the records give no limit.
    command = shlex.join(["loradiag", "inspect", str(output), "--per", "layer"])
    return f'{command}   (each layer; loradiag gate takes a rule such as require = "intruders <= 2")'
