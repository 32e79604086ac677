"""Declaration and options of ``overlap``: whether gradients stay in the subspaces of an update."""

from collections.abc import Sequence
from typing import Annotated

from lora_diag.feature import Feature, Figure
from lora_diag.running.options import RANKS, MethodOptions

FEATURE = Feature(
    __name__,
    "overlap",
    command=".command:overlap",
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
            panels=(".figures:overlap",),
            options=("rank",),
            made_by="loradiag overlap BASE TUNED GRADIENTS -o overlap.jsonl",
        ),
    ),
)


class OverlapOptions(MethodOptions, total=False):
    """Options of ``overlap``."""

    ranks: Annotated[Sequence[int], RANKS]
