"""One layer's ΔW → its record, and the function ``lora_diag.nuclear``."""

from pathlib import Path
from typing import Unpack

from lora_diag.deltas import Delta
from lora_diag.layers.change import load_change
from lora_diag.layers.task import LayerSettings, not_finite
from lora_diag.linalg.devices import resolve_device
from lora_diag.records import LeftOut, Results
from lora_diag.running.layers import LayerRun
from lora_diag.running.options import LayerOptions, show_options
from loradiag_nuclear.record import Nuclear


def measure(delta: Delta, settings: LayerSettings) -> tuple[Nuclear | LeftOut]:
    """Return the record of one layer."""
    change = load_change(delta, resolve_device(settings.device))
    if change.non_finite is not None:
        return (not_finite(delta, change),)
    found = change.decompose(settings.method, tol=settings.tol, seed=settings.seed)
    nuclear, largest = float(found.s.sum()), found.fro * min(delta.shape) ** 0.5
    values = {
        "fro": found.fro,
        "nuclear": nuclear,
        "flatness": nuclear / largest if largest else None,
        "peak": max(float(block.abs().max()) for block in change.blocks(delta.shape)),
    }
    return (Nuclear(layer=delta.layer, shape=delta.shape, **values),)


@show_options
def nuclear(
    base: Path | str, tuned: Path | str, **options: Unpack[LayerOptions]
) -> Results[Nuclear]:
    """Measure the nuclear norm of every update.

    Args:
        base: The checkpoint before.
        tuned: The checkpoint after, or an adapter.
        **options: ``LayerOptions``.
    """
    return LayerRun("nuclear", options, LayerOptions).pair(base, tuned, measure)
