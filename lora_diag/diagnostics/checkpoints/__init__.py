"""Declaration and options of ``checkpoints``: a training run, at all its checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from lora_diag.feature import Argument, Command, Feature, Hint
from lora_diag.running.options import BASE, RANKS, TOP, LayerOptions, Option


class CheckpointsOptions(LayerOptions, total=False):
    """Options of ``checkpoints``."""

    base: Annotated[str | Path | None, BASE]
    ranks: Annotated[Sequence[int], RANKS.by((1, 4, 16))]
    directions: Annotated[int, Option(4, "Largest singular directions whose spaces are compared.", "K", least=1)]
    top: Annotated[int | None, TOP]


FEATURE = Feature(
    __name__,
    "checkpoints",
    "Train",
    commands=(
        Command(
            help="A training run over its checkpoints: growth, collapse, dead layers.",
            notes="Reads the outputs of transformers, TRL, axolotl, LLaMA-Factory and torchtune. Full checkpoints need "
            "BASE, after the run's folder or with --base.",
            examples=("checkpoints out/ -o run.jsonl", "checkpoints out/ base/", "checkpoints step_*/ --base base/"),
            run=".measure:measure_run",
            arguments=(Argument("inputs", "A run's folder, or its checkpoints.", "RUN_DIR [BASE]", many=True),),
            options=(CheckpointsOptions,),
            hints=(Hint("-o run.jsonl", "saves these results"),),
        ),
    ),
    records=(".record:CheckpointLayer", ".record:Checkpoint"),
    functions=(".measure:trajectory",),
    statements=".show:checkpoints_lines",
    grids=".show:checkpoints_grids",
)
