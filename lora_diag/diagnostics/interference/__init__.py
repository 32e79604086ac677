"""Declaration and options of ``interference``: angles, sums and merges of several updates of one base."""

from collections.abc import Sequence
from typing import Annotated

from lora_diag.feature import Feature, Figure, Section
from lora_diag.running.options import INPUTS, RANKS, LayerOptions, Option

FEATURE = Feature(
    __name__,
    "interference",
    command=".command:interference",
    records=(
        ".record:Interference",
        ".record:Union",
    ),
    functions=(".measure:interference",),
    statements=".show:interference_lines",
    grids=".show:interference_grids",
    section=Section(
        "Several updates",
    ),
    figures=(
        Figure(
            "angles",
            "principal angles between updates, compared with chance",
            needs="interference",
            panels=(".figures:angles",),
            options=("rank",),
            made_by="loradiag interference BASE TUNED TUNED -o interference.jsonl",
            by_color=False,
        ),
        Figure(
            "union",
            "rank of the sum of updates, compared with the sum of ranks",
            page=".figures:make_union_page",
            panels=(".figures:union",),
            made_by="loradiag interference BASE TUNED TUNED -o interference.jsonl",
            by_color=False,
        ),
    ),
    questions=(
        ("interfere", "Do the updates interfere?"),
        ("rank_needed", "Which rank do all updates together need?"),
    ),
)


class InterferenceOptions(LayerOptions, total=False):
    """Options of ``interference``."""

    weights: Annotated[
        Sequence[float] | None,
        Option(None, "Weight of each update in the sum; default: all 1.", "W,W,...", panel=INPUTS),
    ]
    ranks: Annotated[Sequence[int], RANKS]
    density: Annotated[float, Option(0.2, "Fraction of entries that TIES keeps; 0: no TIES or sign conflicts.", "D")]
