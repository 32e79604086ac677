"""``plan``: parameters, memory and FLOPs of LoRA at each rank; its declaration and options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from lora_diag.feature import Argument, Command, Feature
from lora_diag.running import options
from lora_diag.running.options import ModelOptions, Option, list_options


class PlanOptions(TypedDict, total=False):
    """Options of ``plan``."""

    ranks: Annotated[Sequence[int], options.RANKS.by((4, 8, 16, 64))]
    layers: Annotated[str | None, options.TARGETS]
    exclude: Annotated[str | None, options.EXCLUDE]
    params: Annotated[str | int | None, options.PARAMS]
    memory_budget: Annotated[str | int | None, options.MEMORY_BUDGET]
    optimizer: Annotated[str, options.OPTIMIZER]
    adapter_dtype: Annotated[str, options.ADAPTER_DTYPE]
    cost: Annotated[
        bool, Option(False, "Also estimate the run time of spectrum, by timing this machine.")
    ]
    top: Annotated[
        int,
        options.TOP.by(
            64, help="With --cost: second estimate, for the K largest singular values only."
        ),
    ]
    data: Annotated[Path | str | None, options.DATA.by(None)]
    tokens: Annotated[
        str | int | None,
        Option(None, "Predicted tokens of the training data; default: those in --data.", "N"),
    ]
    tokenizer: Annotated[str, list_options(ModelOptions)["tokenizer"][1]]
    length: Annotated[int | None, list_options(ModelOptions)["length"][1]]


FEATURE = Feature(
    __name__,
    "plan",
    "Train",
    commands=(
        Command(
            help="Parameters, memory and FLOPs of LoRA at each rank.",
            examples=("plan base/ --layers 'q_proj|v_proj' --params 10M",),
            arguments=(
                Argument("base", "Checkpoint (only headers are read), or a model's config.json."),
            ),
            options=(PlanOptions,),
            shows=("json", "quiet", "verbose"),
            suggest=".show:suggest_next",
            table=".show:plan_table",
        ),
    ),
    functions=(".measure:plan",),
)
