"""``probe gain``, registration and options: layers and directions of an update that carry its gain
in loss.
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
    Section,
)
from lora_diag.running.options import (
    DATA,
    SHIFTED,
    LayerProbeOptions,
    MissingAlpha,
    Option,
)

NODES = Option(
    5, "Points W + t·ΔW at which gradients are computed: odd, 3 to 15.", "K", least=3, most=15
)
LARGEST = Option(
    None, "Split only the K largest singular directions of a layer; default: all.", "K", least=1
)


class GainOptions(LayerProbeOptions, MissingAlpha, total=False):
    """Options of ``probe gain``."""

    data: Required[Annotated[Path | str, DATA]]
    shifted: Annotated[Sequence[Path | str], SHIFTED]
    nodes: Annotated[int, NODES]
    top: Annotated[int | None, LARGEST]


FEATURE = Feature(
    __name__,
    "probe gain",
    "Understand",
    commands=(
        Command(
            help="Gain in loss of each layer and direction of the update.",
            question="Which layers and directions carry the gain?",
            examples=(
                "probe gain base/ adapter/ --data text.txt --shifted other.txt -o gain.jsonl",
            ),
            arguments=(BASE_ARGUMENT, TUNED_ARGUMENT),
            options=(GainOptions,),
            hints=(SAVE_PROBE,),
        ),
    ),
    records=(".record:LayerGain", ".record:Gain"),
    functions=(".measure:probe_gain",),
    statements=".show:gain_lines",
    grids=".show:gain_grids",
    section=Section("Gain by layer and direction", per="layer", order=12),
    questions=(("where", "Which layers and directions carry the gain?"),),
)
