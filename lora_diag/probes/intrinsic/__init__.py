"""``probe intrinsic`` (registration, options): number of trained parameters that reach a fraction
of the full gain.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Required

from lora_diag.feature import BASE_ARGUMENT, SAVE_PROBE, Command, Feature, Figure, Hint, Section
from lora_diag.running.options import (
    DATA,
    FULL_LR,
    LR,
    RANKS,
    REPEATS,
    STEPS,
    Option,
    Shifted,
    TrainOptions,
)


class IntrinsicOptions(Shifted, TrainOptions, total=False):
    """Options of ``probe intrinsic``."""

    data: Required[Annotated[Path | str, DATA]]
    dims: Annotated[
        Sequence[int],
        Option((10, 30, 100, 300, 1000, 3000, 10000), "Dimensions d.", "D,D,...", least=1),
    ]
    projection: Annotated[
        str,
        Option(
            "did",
            "Random projection: direct (DID), or with a scale for each layer (SAID).",
            "did|said",
            former="method",
        ),
    ]
    share: Annotated[
        float, Option(0.9, "Fraction of full fine-tuning's gain to reach.", "X", between=(0, 1))
    ]
    ranks: Annotated[Sequence[int], RANKS.by((1, 2, 4, 8))]
    lr: Annotated[Sequence[float], LR.by((1e-3, 3e-3, 1e-2), former="paces")]
    full_lr: Annotated[Sequence[float], FULL_LR.by((1e-4, 3e-4, 1e-3))]
    lora_lr: Annotated[
        Sequence[float],
        LR.by((1e-3, 3e-3, 1e-2), help="Peak learning rates of LoRA.", former="lora_rates"),
    ]
    steps: Annotated[int, STEPS]
    repeats: Annotated[int, REPEATS]


FEATURE = Feature(
    __name__,
    "probe intrinsic",
    "Research",
    commands=(
        Command(
            help="Intrinsic dimension: loss in random subspaces.",
            notes="--lr is a grid of rates of full fine-tuning; the rate of z is scaled to move "
            "the weights as far per "
            "step.",
            examples=(
                "probe intrinsic base/ --data train.txt --eval held_out.txt --dims 100,1000,10000 "
                "-o dims.jsonl",
            ),
            arguments=(BASE_ARGUMENT,),
            options=(IntrinsicOptions,),
            shows=("json", "quiet", "verbose"),
            hints=(
                Hint("plan {base}", "what each rank costs in parameters and memory"),
                SAVE_PROBE,
            ),
        ),
    ),
    records=(".record:Intrinsic",),
    functions=(".measure:probe_intrinsic",),
    statements=".show:intrinsic_lines",
    grids=".show:intrinsic_grids",
    section=Section("Intrinsic dimension", order=15),
    questions=(("on", "How many directions does training need?"),),
    figures=(
        Figure(
            "intrinsic",
            "fraction of full fine-tuning's gain by trained parameters",
            made_by="loradiag probe intrinsic BASE --data FILE --eval FILE -o intrinsic.jsonl",
        ),
    ),
)
