"""Declaration and options of ``portability``: the ΔW that each serving program applies."""

from collections.abc import Sequence
from typing import Annotated

from lora_diag.feature import Feature, Figure, Section
from lora_diag.running.options import INPUTS, Option, RunOptions

FEATURE = Feature(
    __name__,
    "portability",
    command=".command:portability",
    records=(".record:Portability",),
    functions=(".measure:portability", ".measure:make_portable"),
    statements=".show:portability_lines",
    grids=".show:portability_grids",
    section=Section("Portability", order=45),
    figures=(
        Figure(
            "portability",
            "error ε of each weight of an adapter in each serving program",
            panels=(".figures:portability",),
            made_by="loradiag portability ADAPTER -o portability.jsonl",
            by_color=False,
        ),
    ),
    questions=(("portable", "Do serving programs apply the intended update?"),),
)


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
