"""``loradiag probe sensitivity``: gain of adapting each layer alone."""

from __future__ import annotations

import shlex

from lora_diag.cli import options
from lora_diag.cli.output import next_step
from lora_diag.probes.sensitivity import SensitivityOptions


@options.spread
def sensitivity(
    base: options.Base,
    *,
    arguments: SensitivityOptions,
    shown: options.Shown,
) -> None:
    """Loss gain of a LoRA on each layer alone.

    Example: loradiag probe sensitivity base/ --data train.txt --eval held_out.txt -o sensitivity.jsonl
    """
    # deferred: imports torch
    from lora_diag.probes.sensitivity.measure import probe_sensitivity

    with shown.callbacks(notes=True) as callbacks:
        results = probe_sensitivity(base, **arguments, **callbacks)
    weights_file = shlex.quote(str(arguments["output"])) if arguments["output"] is not None else ""
    hint = (
        f"loradiag allocate SPECTRUM.jsonl --params 10M --layer-weights {weights_file}   (ranks where the loss gains)"
    )
    shown.show(results, next_step(arguments["output"], hint))
