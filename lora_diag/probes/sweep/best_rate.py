"""The learning rate that a sweep found best, for those who write what is trained next."""

from __future__ import annotations

from pathlib import Path

from lora_diag.catalog import read_results
from lora_diag.errors import UsageError
from lora_diag.probes.sweep.verdict import swept_of
from lora_diag.running.fingerprint import legible


def swept_rate(path: Path | str) -> str:
    """Return the best learning rate of a sweep's chosen rank, with what it was measured for.

    Args:
        path: Results of ``probe sweep``.

    Raises:
        UsageError: No rank of it gains, or it has no verdict.
        InputError: It cannot be read.
    """
    name, results = legible(path), read_results(path)
    found = swept_of(results)
    chosen = None if found is None else found.verdict.chosen
    if chosen is None:
        raise UsageError(f"--sweep {name}: names no learning rate; give results of probe sweep in which a rank gains")
    settings = results.run.settings
    kind, steps = settings.get("kind", "LoRA, alpha = 2r"), settings.get("steps")
    many = f", {steps} steps" if steps else ""
    return f"{chosen.lr:g}, the best at r={chosen.rank} in {name} (fresh factors, {kind}{many})"
