"""``probe activations``, registration and options: second moments of the layers' inputs."""

from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import BASE_ARGUMENT, Command, Feature
from lora_diag.running.options import (
    DATA,
    LABELS,
    OUTPUT,
    REQUIRED,
    SEED,
    Labels,
    Option,
    RecordModelOptions,
)


class ActivationsOptions(RecordModelOptions, total=False):
    """Options of ``probe activations``."""

    output_gradients: Annotated[
        bool, Option(False, "Also record E[ggᵀ] of output gradients, for --kfac.")
    ]
    labels: Annotated[Labels, LABELS]
    seed: Annotated[int, SEED]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]


class ActivationsInputs(TypedDict, total=False):
    """Input and output of the command."""

    data: Annotated[Path, DATA]
    output: Annotated[Path, Option(REQUIRED, "Safetensors file to write.", "FILE", "-o", OUTPUT)]


FEATURE = Feature(
    __name__,
    "probe activations",
    "Research",
    functions=(".measure:probe_activations",),
    commands=(
        Command(
            help="Second moments of layer inputs, for --activations.",
            examples=("probe activations base/ --data text.txt -o activations.safetensors",),
            arguments=(BASE_ARGUMENT,),
            options=(ActivationsInputs, ActivationsOptions),
            suggest=".show:suggest_next",
            table=".show:activations_table",
        ),
    ),
)
