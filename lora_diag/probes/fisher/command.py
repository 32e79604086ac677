"""``loradiag probe fisher``: cost of truncating each layer, from Fisher information."""

from __future__ import annotations

import shlex

from lora_diag.cli import options
from lora_diag.cli.output import next_step
from lora_diag.probes.fisher import FisherOptions


@options.spread
def fisher(
    base: options.Base,
    tuned: options.Tuned,
    *,
    arguments: FisherOptions,
    shown: options.Rows,
) -> None:
    """Loss change from truncation, by Fisher information.

    Example: loradiag probe fisher base/ full_ft/ --data text.txt --eval held_out.txt --ranks 8,16 -o fisher.jsonl
    """
    # deferred: imports torch
    from lora_diag.probes.fisher.measure import probe_fisher

    with shown.callbacks(notes=True) as callbacks:
        results = probe_fisher(base, tuned, **arguments, **callbacks)
    weights_file = shlex.quote(str(arguments["output"])) if arguments["output"] is not None else ""
    hint = f"loradiag allocate SPECTRUM.jsonl --params 10M --layer-weights {weights_file}   (ranks by the loss)"
    shown.show(results, next_step(arguments["output"], hint))
