"""Options of ``recover``."""

from typing import Annotated

from lora_diag.running.options import ENERGY, EXECUTION, OUTPUT, PARAMS, RANK, FolderOptions, Option


class RecoverOptions(FolderOptions, total=False):
    """Options of ``recover``."""

    rank: Annotated[int | None, RANK]
    energy: Annotated[float | None, ENERGY]
    params: Annotated[str | int | None, PARAMS]
    time: Annotated[
        str | None,
        Option(None, "Time limit, e.g. 2h or 90min; default: none.", "TIME", panel=EXECUTION),
    ]
    full: Annotated[
        bool,
        Option(
            False,
            "Write a float32 checkpoint: BASE plus the estimated update.",
            flags=("--checkpoint",),
            panel=OUTPUT,
        ),
    ]
    leave_out_refused: Annotated[
        bool,
        Option(False, "Write no factors of refused layers; default: the SVD of TUNED − BASE.", panel=OUTPUT),
    ]
    nearest: Annotated[
        bool,
        Option(False, "Write the estimate nearest to the update; default: scaled to its norm.", panel=OUTPUT),
    ]
    base_name: Annotated[
        str | None, Option(None, "Name of BASE in config and model card; default: its path.", "NAME", panel=OUTPUT)
    ]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]
