"""``report``: combine the results of several runs in a page, a text or a table; and its options."""

from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import RESULTS_ARGUMENT, Command, Feature
from lora_diag.running.options import OUTPUT, Option


class ReportOptions(TypedDict, total=False):
    """Options of ``report``."""

    output: Annotated[
        Path | str | None,
        Option(None, "Report to write; default: report.html.", "FILE", "-o", OUTPUT),
    ]
    format: Annotated[
        str | None,
        Option(
            None, "Format; default: by the output's suffix.", "html|md|csv|parquet", panel=OUTPUT
        ),
    ]
    values: Annotated[
        bool, Option(False, "One row per entry of a list (csv, parquet).", panel=OUTPUT)
    ]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]


class TrackerOptions(TypedDict, total=False):
    """Options of the command: a tracker that gets the report instead of a file."""

    to: Annotated[
        str | None,
        Option(
            None,
            "Tracker to send the report to; default: none.",
            "wandb|mlflow|trackio|tensorboard|hub",
            panel=OUTPUT,
        ),
    ]
    project: Annotated[
        str | None,
        Option(
            None,
            "Project, experiment, log folder or model id; default: the tracker's.",
            "NAME",
            panel=OUTPUT,
        ),
    ]


FEATURE = Feature(
    __name__,
    "report",
    "Show",
    commands=(
        Command(
            help="Combine any results in one page.",
            run=".trackers:run_report",
            examples=("report spectrum.jsonl residual.jsonl -o report.html",),
            arguments=(RESULTS_ARGUMENT,),
            options=(ReportOptions, TrackerOptions),
            shows=("quiet",),
            call=True,
        ),
    ),
    functions=(".run:report",),
)
