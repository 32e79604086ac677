"""``inspect``: the contents of a checkpoint, an adapter or a results file."""

from lora_diag.feature import Argument, Command, Feature
from lora_diag.running.options import MissingAlpha

FEATURE = Feature(
    __name__,
    "inspect",
    "Show",
    commands=(
        Command(
            help="Show a results file, or list a checkpoint.",
            run=".run:inspect_any",
            examples=("inspect results.jsonl --by layer",),
            arguments=(Argument("path", "Checkpoint, adapter or results file."),),
            options=(MissingAlpha,),
            table=".run:inventory_table",
        ),
    ),
    functions=(".run:inspect",),
)
