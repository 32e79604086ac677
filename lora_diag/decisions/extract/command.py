"""``loradiag extract``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from lora_diag.cli import options
from lora_diag.cli.output import exit_unmeasured, result, terminal
from lora_diag.decisions.extract import ExtractOptions
from lora_diag.errors import UsageError
from lora_diag.running.options import OUTPUT, Option

_OUTPUT = Option(None, "Adapter folder to write.", "ADAPTER", ("--output", "-o"), OUTPUT)


@options.spread
def extract(
    base: options.Base,
    tuned: options.Tuned,
    *,
    output: Annotated[Path | None, options.typer_option("output", _OUTPUT)] = None,
    arguments: ExtractOptions,
    shown: options.Rows,
) -> None:
    """Write the best adapter of given ranks for an update.

    Example: loradiag extract base/ full_ft/ --rank 16 -o adapter/
    """
    from lora_diag.decisions.extract.folder import check_output_folder

    if output is None:
        raise UsageError("extract: no output folder; give it and ranks, such as --rank 16 -o adapter/")
    check_output_folder(output, arguments["overwrite"], arguments["resume"])
    # deferred: imports torch
    from lora_diag.decisions.extract.run import extract as write
    from lora_diag.decisions.extract.show import extraction_table

    with shown.callbacks() as callbacks:
        results = write(base, tuned, output, **arguments, **callbacks)
    if shown.table:
        hint = shlex.join(["loradiag", "residual", str(base), str(tuned), str(output)])
        hint += "   (this adapter compared with TUNED)"
        result(extraction_table(results, *terminal(), per=shown.per, next_command=hint, folder=str(output)))
    exit_unmeasured(results.unmeasured, "the layer is not in the adapter")
