"""``report``: combine the results of several runs in a page, a text or a table; and its options."""

from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import Feature
from lora_diag.running.options import OUTPUT, Option

FEATURE = Feature(__name__, "report", command=".command:report", functions=(".run:report",))


class ReportOptions(TypedDict, total=False):
    """Options of ``report``."""

    output: Annotated[
        Path | str | None, Option(None, "Report to write; default: report.html.", "FILE", ("--output", "-o"), OUTPUT)
    ]
    format: Annotated[
        str | None, Option(None, "Format; default: by the output's suffix.", "html|md|csv|parquet", panel=OUTPUT)
    ]
    values: Annotated[bool, Option(False, "One row per entry of a list (csv, parquet).", panel=OUTPUT)]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]
