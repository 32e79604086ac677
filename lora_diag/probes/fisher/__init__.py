"""``probe fisher``, registration and options: Fisher information of the part that a truncation
discards.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Required

from lora_diag.feature import (
    BASE_ARGUMENT,
    SAVE_PROBE,
    TUNED_ARGUMENT,
    Command,
    Feature,
    Figure,
    Hint,
    Section,
)
from lora_diag.running.options import (
    DATA,
    LABELS,
    RANKS,
    SEED,
    HeldOut,
    Labels,
    LayerProbeOptions,
    MissingAlpha,
    Option,
)


class FisherOptions(HeldOut, LayerProbeOptions, MissingAlpha, total=False):
    """Options of ``probe fisher``."""

    data: Required[Annotated[Path | str, DATA]]
    measure: Annotated[
        bool, Option(False, "Truncate each layer alone, to compare F with; implied by --eval.")
    ]
    ranks: Annotated[Sequence[int], RANKS]
    labels: Annotated[Labels, LABELS]
    seed: Annotated[int, SEED]


FEATURE = Feature(
    __name__,
    "probe fisher",
    "Research",
    commands=(
        Command(
            help="Loss change from truncation, by Fisher information.",
            examples=(
                "probe fisher base/ full_ft/ --data text.txt --eval held_out.txt --ranks 8,16 -o "
                "fisher.jsonl",
            ),
            arguments=(BASE_ARGUMENT, TUNED_ARGUMENT),
            options=(FisherOptions,),
            hints=(
                Hint(
                    "allocate SPECTRUM.jsonl --params 10M --layer-weights {output}",
                    "ranks by the loss",
                ),
                SAVE_PROBE,
            ),
        ),
    ),
    records=(".record:Fisher",),
    functions=(".measure:probe_fisher",),
    statements=".show:fisher_lines",
    grids=".show:fisher_grids",
    section=Section("Expected cost of truncation (Fisher)", per="layer", order=16),
    questions=(("at_rank", "In which layers does truncation cost most?"),),
    figures=(
        Figure(
            "fisher",
            "how well predictors rank layers by the cost of truncation",
            made_by="loradiag probe fisher BASE TUNED --data FILE --measure -o fisher.jsonl",
            by_color=False,
        ),
    ),
)
