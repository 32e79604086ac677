"""Declaration and options of ``overlap``: whether gradients stay in the subspaces of an update."""

from collections.abc import Sequence
from typing import Annotated

from lora_diag.feature import BASE_ARGUMENT, GRADIENTS_ARGUMENT, Argument, Command, Feature, Figure
from lora_diag.running.options import RANKS, SHOW_RANK, MethodOptions


class OverlapOptions(MethodOptions, total=False):
    """Options of ``overlap``."""

    ranks: Annotated[Sequence[int], RANKS]
    show_rank: Annotated[int | None, SHOW_RANK]


FEATURE = Feature(
    __name__,
    "overlap",
    "Understand",
    commands=(
        Command(
            help="Overlap of gradients with the subspaces of an update.",
            examples=("overlap base/ full_ft/ gradients/ --ranks 8,16 -o overlap.jsonl",),
            arguments=(
                BASE_ARGUMENT,
                Argument("tuned", "Checkpoint after a pilot run, or an adapter."),
                GRADIENTS_ARGUMENT,
            ),
            options=(OverlapOptions,),
            suggest=".show:suggest_next",
        ),
    ),
    records=(".record:Overlap",),
    functions=(
        ".measure:overlap",
        ".measure:subspaces",
        ".recorder:GradientRecorder",
    ),
    table=".show:overlap_table",
    statements=".show:lines",
    questions=(
        ("inside", "Do the gradients stay in the subspaces?"),
        ("reach", "Do the gradients stay in the subspaces?"),
    ),
    figures=(
        Figure(
            "overlap",
            "κ and tangent overlap over the steps, with baselines",
            options=("rank",),
            made_by="loradiag overlap BASE TUNED GRADIENTS -o overlap.jsonl",
        ),
    ),
)
