"""``loradiag nuclear``."""

from lora_diag.cli import options
from lora_diag.cli.output import result, terminal
from lora_diag.running.options import LayerOptions


@options.spread
def nuclear(
    base: options.Base,
    tuned: options.Tuned,
    *,
    given: LayerOptions,
    shown: options.Rows,
) -> None:
    """Nuclear norm of every update, and its share by depth."""
    from lora_diag.rendering.tables import record_table
    from loradiag_nuclear.run import nuclear as measure
    from loradiag_nuclear.summary import statements

    with shown.callbacks() as callbacks:
        results = measure(base, tuned, **given, **callbacks)
    if shown.table:
        result(record_table(results, statements(results), *terminal(), per=shown.per))
