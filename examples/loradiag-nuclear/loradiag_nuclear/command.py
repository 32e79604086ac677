"""``loradiag nuclear``."""

from typing import Annotated

import typer

from lora_diag.cli import options
from lora_diag.cli.output import progress_bar, result, terminal


@options.spread
def nuclear(
    base: options.Base,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Checkpoint after, or an adapter.")],
    *,
    compared: options.Compared,
    computed: options.Computed,
    per: options.PerRow = options.Per.type,
    written: options.Written,
) -> None:
    """Nuclear norm of every update, and its share by depth."""
    from lora_diag.rendering.tables import record_table
    from loradiag_nuclear.run import nuclear as measure
    from loradiag_nuclear.summary import statements

    with progress_bar(written.quiet) as shown:
        given = {**vars(compared), **computed.arguments(), **written.arguments()}
        results = measure(base, tuned, on_progress=shown, **given)
    if written.table:
        result(record_table(results, statements(results), *terminal(), per=per))
