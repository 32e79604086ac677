"""``loradiag nuclear``."""

from lora_diag.cli import options
from lora_diag.running.options import LayerOptions


@options.spread
def nuclear(
    base: options.Base,
    tuned: options.Tuned,
    *,
    arguments: LayerOptions,
    shown: options.Rows,
) -> None:
    """Nuclear norm of every update, and its share by depth."""
    from loradiag_nuclear.run import nuclear as measure

    with shown.callbacks() as callbacks:
        results = measure(base, tuned, **arguments, **callbacks)
    shown.show(results)
