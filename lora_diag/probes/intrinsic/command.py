"""``loradiag probe intrinsic``: the number of random directions that reach a fraction of the gain."""

from __future__ import annotations

import shlex

from lora_diag.cli import options
from lora_diag.cli.output import next_step
from lora_diag.probes.intrinsic import IntrinsicOptions


@options.spread
def intrinsic(
    base: options.Base,
    *,
    arguments: IntrinsicOptions,
    shown: options.Shown,
) -> None:
    """Intrinsic dimension: loss in random subspaces.

    --lr is a grid of rates of full fine-tuning; the rate of z is scaled to move the weights as far per step.

    Example: loradiag probe intrinsic base/ --data train.txt --eval held_out.txt --dims 100,1000,10000 -o dims.jsonl
    """
    # deferred: imports torch
    from lora_diag.probes.intrinsic.measure import probe_intrinsic

    with shown.callbacks(notes=True) as callbacks:
        results = probe_intrinsic(base, **arguments, **callbacks)
    hint = f"loradiag plan {shlex.quote(str(base))}   (what each rank costs in parameters and memory)"
    shown.show(results, next_step(arguments["output"], hint))
