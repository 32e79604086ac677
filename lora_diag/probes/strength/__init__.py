"""``probe strength``, registration and options: held-out loss at W_0 + t·ΔW, of the whole update or
of its parts.
"""

from collections.abc import Sequence
from typing import Annotated

from lora_diag.feature import (
    BASE_ARGUMENT,
    SAVE_PROBE,
    TUNED_ARGUMENT,
    Command,
    Feature,
    Figure,
    Section,
)
from lora_diag.running.options import MissingAlpha, Option, ProbeOptions, Shifted

SCALES = Option(
    None, "Strengths t; default: 0.25,0.5,...,1.5, or 0 with --by.", "T,T,...", between=(-10, 10)
)


class StrengthOptions(Shifted, ProbeOptions, MissingAlpha, total=False):
    """Options of ``probe strength``."""

    scales: Annotated[Sequence[float] | None, SCALES]
    by: Annotated[
        str, Option("all", "Vary t of all of the update, or of each part alone.", "all|block|type")
    ]


FEATURE = Feature(
    __name__,
    "probe strength",
    "Understand",
    commands=(
        Command(
            help="Loss at each strength t of the update, W + t·ΔW.",
            question="How strong should the update act?",
            examples=(
                "probe strength base/ adapter/ --eval held_out.txt --shifted other.txt -o "
                "strength.jsonl",
            ),
            arguments=(BASE_ARGUMENT, TUNED_ARGUMENT),
            options=(StrengthOptions,),
            shows=("json", "quiet", "verbose"),
            suggest=".show:suggest_next",
            hints=(SAVE_PROBE,),
        ),
    ),
    records=(".record:Strength", ".record:StrengthChoice"),
    functions=(".measure:probe_strength",),
    statements=".show:strength_lines",
    grids=".show:strength_grids",
    section=Section("Strength of the update", order=13),
    questions=(("strength", "How strong should the update act?"),),
    figures=(
        Figure(
            "strength",
            "gain on the task against loss on other texts, by strength of the update",
            made_by="loradiag probe strength BASE TUNED --eval FILE --shifted FILE -o "
            "strength.jsonl",
        ),
    ),
)
