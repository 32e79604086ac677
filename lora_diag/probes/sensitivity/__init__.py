"""``probe sensitivity``, registration and options: loss gain of adapting one layer or module type
alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Required

from lora_diag.feature import BASE_ARGUMENT, SAVE_PROBE, Command, Feature, Figure, Section
from lora_diag.running.options import (
    BY_UNIT,
    DATA,
    LR,
    RANK,
    REPEATS,
    STEPS,
    LayerTrainOptions,
    Option,
    Shifted,
)


class SensitivityOptions(Shifted, LayerTrainOptions, total=False):
    """Options of ``probe sensitivity``."""

    data: Required[Annotated[Path | str, DATA]]
    rank: Annotated[int, RANK.by(8, least=1)]
    delta: Annotated[
        int | None, Option(None, "Also train at rank R + D; default: only at R.", "D", least=1)
    ]
    by: Annotated[
        str, BY_UNIT.by("layer", metavar="layer|block|type", help="Unit that is adapted alone.")
    ]
    lr: Annotated[Sequence[float], LR.by((3e-3, 1e-2))]
    steps: Annotated[int, STEPS.by(50)]
    repeats: Annotated[int, REPEATS.by(1)]


FEATURE = Feature(
    __name__,
    "probe sensitivity",
    "Train",
    commands=(
        Command(
            help="Loss gain of a LoRA on each layer alone.",
            examples=(
                "probe sensitivity base/ --data train.txt --eval held_out.txt -o sensitivity.jsonl",
            ),
            arguments=(BASE_ARGUMENT,),
            options=(SensitivityOptions,),
            shows=("json", "quiet", "verbose"),
            hints=(SAVE_PROBE,),
        ),
    ),
    records=(".record:Sensitivity", ".record:FirstOrder"),
    functions=(".measure:probe_sensitivity",),
    statements=".show:sensitivity_lines",
    grids=".show:sensitivity_grids",
    section=Section("Layers adapted alone", order=13),
    questions=(("on", "Which layers gain most when adapted alone?"),),
    figures=(
        Figure(
            "sensitivity",
            "gain of each layer or module type adapted alone",
            made_by="loradiag probe sensitivity BASE --data FILE --eval FILE -o sensitivity.jsonl",
        ),
    ),
)
