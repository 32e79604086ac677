"""``loradiag probe sweep``: the sufficient rank, by training at each."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from lora_diag.cli import options
from lora_diag.cli.output import next_step, rerun_command
from lora_diag.probes.sweep import SweepOptions

if TYPE_CHECKING:
    from lora_diag.records import Results


@options.spread
def sweep(
    base: options.Base,
    *,
    arguments: SweepOptions,
    shown: options.Shown,
) -> None:
    """Loss of LoRA at each rank, learning rates tuned.

    Example: loradiag probe sweep base/ --data train.txt --eval held_out.txt --steps 200 -o sweep.jsonl
    """
    # deferred: imports torch
    from lora_diag.probes.sweep.measure import probe_sweep

    with shown.callbacks(notes=True) as callbacks:
        results = probe_sweep(base, **arguments, **callbacks)
    shown.show(results, next_step(arguments["output"], _suggest_next(results, base)))


def _suggest_next(results: Results[Any], base: str) -> str:
    """Return the command that a user would run next: more seeds where they would decide, else the cost of the rank."""
    from lora_diag.probes.sweep.show import main_verdict

    verdict = main_verdict(results)
    if verdict is not None and verdict.more_seeds is not None:
        return f"{rerun_command('--repeats', str(verdict.more_seeds), '--resume')}   (adds seeds to these)"
    chosen = None if verdict is None else verdict.chosen
    command = f"loradiag plan {shlex.quote(str(base))}"
    if chosen is None:
        return f"{command}   (what each rank costs in parameters and memory)"
    return f"{command} --ranks {chosen.rank}   (what it costs; train it at learning rate {chosen.lr:g})"
