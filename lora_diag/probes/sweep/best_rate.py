"""The best learning rate of a sweep, for the commands that suggest the next training."""

from __future__ import annotations

from pathlib import Path

from lora_diag.catalog import read_results
from lora_diag.errors import UsageError
from lora_diag.probes.sweep.verdict import swept_of
from lora_diag.running.fingerprint import legible


def swept_rate(path: Path | str) -> str:
    """Return the best learning rate of a sweep's chosen rank, with its origin as text.

    Args:
        path: Results of ``probe sweep``.

    Raises:
        UsageError: No rank has a gain, or there is no verdict.
        InputError: The file cannot be read.
    """
    name, results = legible(path), read_results(path)
    swept = swept_of(results)
    chosen = None if swept is None else swept.verdict.chosen
    if chosen is None:
        raise UsageError(f"--sweep {name}: names no learning rate; give results of probe sweep in which a rank gains")
    settings = results.run.settings
    kind, steps = settings.get("kind", "LoRA, alpha = 2r"), settings.get("steps")
    steps_text = f", {steps} steps" if steps else ""
    return f"{chosen.lr:g}, the best at r={chosen.rank} in {name} (fresh factors, {kind}{steps_text})"
