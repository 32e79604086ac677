"""Declaration and options of ``residual``: the distance of adapters from a full fine-tune."""

from pathlib import Path
from typing import Annotated

from lora_diag.feature import BASE_ARGUMENT, Argument, Command, Feature, Figure, Hint
from lora_diag.running.options import ACTIVATIONS, RECOVER, REFERENCE, LayerOptions


class ResidualOptions(LayerOptions, total=False):
    """Options of ``residual``."""

    reference: Annotated[str | Path | None, REFERENCE]
    activations: Annotated[Path | str | None, ACTIVATIONS]
    recover: Annotated[bool, RECOVER]


FEATURE = Feature(
    __name__,
    "residual",
    "Understand",
    commands=(
        Command(
            help="Distance of adapters to a full fine-tune, layer by layer.",
            examples=("residual base/ full_ft/ lora_r8/ lora_r64/ -o residual.jsonl",),
            arguments=(
                BASE_ARGUMENT,
                Argument("tuned", "The full fine-tune."),
                Argument(
                    "adapters",
                    "Adapters, or checkpoints with one merged in.",
                    "ADAPTER",
                    many=True,
                    optional=True,
                ),
            ),
            options=(ResidualOptions,),
            hints=(
                Hint(
                    "probe outputs {base} {tuned} {adapters} --eval held_out.txt",
                    "whether the distance costs loss",
                ),
            ),
        ),
    ),
    records=(".record:Residual",),
    functions=(".measure:residual",),
    statements=".show:residual_lines",
    grids=".show:residual_grids",
    questions=(
        ("low_rank", "Is the update low-rank?"),
        ("resolved", "Do the files resolve the update?"),
        ("limited_by", "What limits the adapter?"),
        ("distance", "What limits the adapter?"),
        ("interpretation", "What limits the adapter?"),
    ),
    figures=(
        Figure(
            "residual",
            "ε and its floor, layer by layer, by cause",
            made_by="loradiag residual BASE TUNED ADAPTER -o residual.jsonl",
            by_color=False,
        ),
    ),
    named_by=("base", "tuned"),
)
