"""``loradiag probe truncation``: loss of the update truncated to each rank."""

from __future__ import annotations

import shlex

from lora_diag.cli import options
from lora_diag.cli.output import next_step
from lora_diag.probes.truncation import TruncationOptions


@options.spread
def truncation(
    base: options.Base,
    tuned: options.Tuned,
    *,
    arguments: TruncationOptions,
    shown: options.Shown,
) -> None:
    """Loss of the model at each rank of the update.

    Example: loradiag probe truncation base/ full_ft/ --eval held_out.txt --ranks 0,4,16,64 -o truncation.jsonl
    """
    # deferred: imports torch
    from lora_diag.probes.truncation.measure import probe_truncation

    with shown.callbacks(notes=True) as callbacks:
        results = probe_truncation(base, tuned, **arguments, **callbacks)
    hint = shlex.join(["loradiag", "spectrum", str(base), str(tuned)]) + "   (C(r) layer by layer, no model run)"
    shown.show(results, next_step(arguments["output"], hint))
