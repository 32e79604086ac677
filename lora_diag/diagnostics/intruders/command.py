"""``loradiag intruders``."""

from __future__ import annotations

import shlex
from pathlib import Path

from lora_diag.cli import options
from lora_diag.cli.output import exit_unmeasured
from lora_diag.diagnostics.intruders.options import IntruderOptions


@options.spread
def intruders(
    base: options.Base,
    tuned: options.Tuned,
    *,
    given: IntruderOptions,
    shown: options.Rows,
) -> None:
    """Intruder dimensions: large directions that BASE lacks.

    Example: loradiag intruders base/ lora_r8/ -o intruders.jsonl
    """
    # torch comes with it: not before it is needed
    from lora_diag.diagnostics.intruders.run import intruders as measure

    with shown.callbacks() as callbacks:
        results = measure(base, tuned, **given, **callbacks)
    then = _next(base, tuned, given["output"]) if results.layers else None
    shown.show(results, then)
    exit_unmeasured(results.unmeasured, "the layer was left out")


def _next(base: str, tuned: str, output: Path | str | None) -> str:
    if output is None:
        words = shlex.join(["loradiag", "intruders", str(base), str(tuned), "--per", "layer"])
        return f"{words}   (where they are; -o FILE keeps the records for loradiag gate)"
    # Not gate init: where no layer has an intruder, or one has little else, there is no limit to take from them.
    words = shlex.join(["loradiag", "inspect", str(output), "--per", "layer"])
    return f'{words}   (where they are; loradiag gate takes a rule such as require = "intruders <= 2")'
