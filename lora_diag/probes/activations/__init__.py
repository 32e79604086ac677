"""``probe activations``, registration and options: second moments of the layers' inputs."""

from typing import Annotated

from lora_diag.feature import Feature
from lora_diag.running.options import LABELS, OUTPUT, SEED, Option, RecordModelOptions

FEATURE = Feature(
    __name__, "probe activations", command=".command:activations", functions=(".measure:probe_activations",)
)


class ActivationsOptions(RecordModelOptions, total=False):
    """Options of ``probe activations``."""

    output_gradients: Annotated[bool, Option(False, "Also record E[ggᵀ] of output gradients, for --kfac.")]
    labels: Annotated[str, LABELS]
    seed: Annotated[int, SEED]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]
