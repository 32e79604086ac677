"""``probe gain``, registration and options: layers and directions of an update that carry its gain
in loss.
"""

from pathlib import Path
from typing import Annotated, Required

from lora_diag.feature import (
    BASE_ARGUMENT,
    SAVE_PROBE,
    TUNED_ARGUMENT,
    Command,
    Feature,
    Figure,
    Section,
)
from lora_diag.running.options import (
    DATA,
    LayerProbeOptions,
    MissingAlpha,
    Option,
    Shifted,
)

NODES = Option(
    5, "Points W + t·ΔW at which gradients are computed: odd, 3 to 15.", "K", least=3, most=15
)
LARGEST = Option(
    None, "Split only the K largest singular directions of a layer; default: all.", "K", least=1
)
MEASURE = Option(False, "Also measure the loss without each row's update, and with it alone.")
BY = Option("type", "Rows: module types or layers.", "type|layer")


class GainOptions(Shifted, LayerProbeOptions, MissingAlpha, total=False):
    """Options of ``probe gain``."""

    data: Required[Annotated[Path | str, DATA]]
    measure: Annotated[bool, MEASURE]
    by: Annotated[str, BY]
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
                "probe gain base/ adapter/ --data text.txt --eval held_out.txt -o gain.jsonl",
            ),
            arguments=(BASE_ARGUMENT, TUNED_ARGUMENT),
            options=(GainOptions,),
            shows=("json", "quiet", "verbose"),
            suggest=".show_losses:suggest_next",
            hints=(SAVE_PROBE,),
        ),
    ),
    records=(".record:LayerGain", ".record:Gain", ".record:GainLoss"),
    functions=(".measure:probe_gain",),
    statements=".show:gain_lines",
    grids=".show:gain_grids",
    section=Section("Gain by layer and direction", per="layer", order=12),
    figures=(
        Figure(
            "gain",
            "where the gain in loss is: by directions, layers and depth",
            needs="layer_gain",
            made_by="loradiag probe gain BASE TUNED --data FILE --eval FILE -o gain.jsonl",
            by_color=False,
        ),
    ),
    questions=(("where", "Which layers and directions carry the gain?"),),
)
