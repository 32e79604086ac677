"""Options of ``portability``."""

from collections.abc import Sequence
from typing import Annotated

from lora_diag.running.options import INPUTS, Option, RunOptions


class PortabilityOptions(RunOptions, total=False):
    """Options of ``portability``."""

    consumers: Annotated[
        Sequence[str],
        Option(
            (),
            "Programs, e.g. vllm or vllm==0.31; default: those for the format.",
            "NAME,...",
            panel=INPUTS,
        ),
    ]
    require: Annotated[
        Sequence[str], Option((), "Exit with 1 unless these programs apply the intended ΔW; default: none.", "NAME,...")
    ]
    intended: Annotated[
        str | None, Option(None, "Program whose ΔW is intended; default: PEFT or the format's rule.", "NAME")
    ]
    max_lora_rank: Annotated[int | None, Option(None, "Largest rank that servers accept; default: any.", "R")]
