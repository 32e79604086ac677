"""``loradiag probe outputs``: whether adapters give the same outputs as the fine-tune."""

from __future__ import annotations

import shlex

from lora_diag.cli import options
from lora_diag.cli.output import next_step
from lora_diag.probes.outputs.options import OutputsOptions


@options.spread
def outputs(
    base: options.Base,
    tuned: options.Tuned,
    adapters: options.Adapters = None,
    *,
    arguments: OutputsOptions,
    shown: options.Shown,
) -> None:
    """Losses and outputs of adapters and a full fine-tune.

    Example: loradiag probe outputs base/ full_ft/ lora_r8/ lora_r64/ --eval held_out.txt -o outputs.jsonl
    """
    # deferred: imports torch
    from lora_diag.probes.outputs.run import probe_outputs

    with shown.callbacks(notes=True) as callbacks:
        results = probe_outputs(base, tuned, adapters or (), **arguments, **callbacks)
    others = list(map(str, adapters or []))
    hint = shlex.join(["loradiag", "residual", str(base), str(tuned), *others]) + "   (where in the weights)"
    shown.show(results, next_step(arguments["output"], hint))
