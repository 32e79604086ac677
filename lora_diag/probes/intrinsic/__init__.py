"""``probe intrinsic`` (registration, options): number of trained parameters that reach a fraction of the full gain."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Required

from lora_diag.feature import Feature, Figure, Section
from lora_diag.running.options import DATA, FULL_RATES, RANKS, RATES, REPEATS, STEPS, Option, Shifted, TrainOptions

FEATURE = Feature(
    __name__,
    "probe intrinsic",
    command=".command:intrinsic",
    records=(".record:Intrinsic",),
    functions=(".measure:probe_intrinsic",),
    statements=".show:intrinsic_lines",
    grids=".show:intrinsic_grids",
    section=Section("Intrinsic dimension", order=15, losses=True),
    questions=(("on", "How many directions does training need?"),),
    figures=(
        Figure(
            "intrinsic",
            "fraction of full fine-tuning's gain by trained parameters",
            panels=(".figures:intrinsic",),
            made_by="loradiag probe intrinsic BASE --data FILE --eval FILE -o intrinsic.jsonl",
        ),
    ),
)


class IntrinsicOptions(Shifted, TrainOptions, total=False):
    """Options of ``probe intrinsic``."""

    data: Required[Annotated[Path | str, DATA]]
    dims: Annotated[Sequence[int], Option((10, 30, 100, 300, 1000, 3000, 10000), "Dimensions d.", "D,D,...")]
    projection: Annotated[
        str,
        Option(
            "did",
            "Random projection: direct (DID), or with a scale for each layer (SAID).",
            "did|said",
            setting="method",
        ),
    ]
    share: Annotated[float, Option(0.9, "Fraction of full fine-tuning's gain to reach.", "X")]
    ranks: Annotated[Sequence[int], RANKS.by((1, 2, 4, 8))]
    paces: Annotated[Sequence[float], RATES.by((1e-3, 3e-3, 1e-2))]
    full_rates: Annotated[Sequence[float], FULL_RATES.by((1e-4, 3e-4, 1e-3))]
    lora_rates: Annotated[
        Sequence[float], Option((1e-3, 3e-3, 1e-2), "Peak learning rates of LoRA.", "X,X,...", ("--lora-lr",))
    ]
    steps: Annotated[int, STEPS]
    repeats: Annotated[int, REPEATS]
