"""``recover``: the update that 16-bit storage rounded away, from the rounding cells of the files;
and its options.
"""

from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import BASE_ARGUMENT, Argument, Command, Feature, Figure, Section
from lora_diag.running.options import (
    CHECKPOINT,
    ENERGY,
    EXECUTION,
    OUTPUT,
    PARAMS,
    RANK,
    FolderOptions,
    Option,
)


class RecoverOptions(FolderOptions, total=False):
    """Options of ``recover``."""

    rank: Annotated[int | None, RANK]
    energy: Annotated[float | None, ENERGY]
    params: Annotated[str | int | None, PARAMS]
    time: Annotated[
        str | None,
        Option(None, "Time limit, e.g. 2h or 90min; default: none.", "TIME", panel=EXECUTION),
    ]
    checkpoint: Annotated[bool, CHECKPOINT]
    leave_out_refused: Annotated[
        bool,
        Option(
            False,
            "Write no factors of refused layers; default: the SVD of TUNED − BASE.",
            panel=OUTPUT,
        ),
    ]
    nearest: Annotated[
        bool,
        Option(
            False,
            "Write the estimate nearest to the update; default: scaled to its norm.",
            panel=OUTPUT,
        ),
    ]
    base_name: Annotated[
        str | None,
        Option(
            None, "Name of BASE in config and model card; default: its path.", "NAME", panel=OUTPUT
        ),
    ]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]


class RecoverOutput(TypedDict, total=False):
    """The output of the command."""

    output: Annotated[
        Path | None,
        Option(
            None,
            "Folder to write, or results file for records only.",
            "OUT",
            "-o",
            OUTPUT,
        ),
    ]


FEATURE = Feature(
    __name__,
    "recover",
    "Understand",
    commands=(
        Command(
            help="Estimate the update that 16-bit storage rounded away.",
            question="What was the update before bf16 storage rounded it away?",
            notes="A part of the update along the weight itself (weight decay, a rescaled layer) "
            "is not seen.",
            examples=(
                "recover base/ tuned_bf16/ -o recovery.jsonl",
                "recover base/ tuned_bf16/ --rank 16 -o adapter/",
                "recover base/ tuned_bf16/ --checkpoint -o recovered/",
            ),
            arguments=(BASE_ARGUMENT, Argument("tuned", "Fine-tuned checkpoint.")),
            options=(RecoverOutput, RecoverOptions),
            suggest=".show:suggest_next",
            exit_code=".show:exit_code",
        ),
    ),
    records=(".record:Recovery",),
    functions=(".measure:recover",),
    statements=".show:recovery_lines",
    section=Section("Update below the rounding of the files"),
    questions=(("hidden", "What does the rounding of the files hide?"),),
    figures=(
        Figure(
            "recovery",
            "C(r) of the files and of the update before rounding, with intervals",
            made_by="loradiag recover BASE TUNED -o recovery.jsonl",
        ),
    ),
)
