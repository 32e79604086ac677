"""``probe fisher``, registration and options: Fisher information of the part that a truncation discards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Required

from lora_diag.feature import Feature, Figure, Section
from lora_diag.running.options import DATA, LABELS, RANKS, SEED, HeldOut, LayerProbeOptions, MissingAlpha, Option

FEATURE = Feature(
    __name__,
    "probe fisher",
    command=".command:fisher",
    records=(".record:Fisher",),
    functions=(".measure:probe_fisher",),
    statements=".show:fisher_lines",
    grids=".show:fisher_grids",
    section=Section(
        "Expected cost of truncation (Fisher)",
        per="layer",
        order=16,
        losses=True,
    ),
    questions=(("at_rank", "In which layers does truncation cost most?"),),
    figures=(
        Figure(
            "fisher",
            "how well predictors rank layers by the cost of truncation",
            panels=(".figures:fisher",),
            made_by="loradiag probe fisher BASE TUNED --data FILE --measure -o fisher.jsonl",
            by_color=False,
        ),
    ),
)


class FisherOptions(HeldOut, LayerProbeOptions, MissingAlpha, total=False):
    """Options of ``probe fisher``."""

    data: Required[Annotated[Path | str, DATA]]
    measure: Annotated[bool, Option(False, "Truncate each layer alone, to compare F with; implied by --eval.")]
    ranks: Annotated[Sequence[int], RANKS]
    labels: Annotated[str, LABELS]
    seed: Annotated[int, SEED]
