"""``lint``: what will go wrong in training, before the first step; its declaration and options."""

from collections.abc import Sequence
from typing import Annotated

from lora_diag.feature import Argument, Command, Feature
from lora_diag.running.amounts import MAX_RATE
from lora_diag.running.options import ADAPTER_DTYPE, INPUTS, RANK, STEPS, Option, VerdictOutputs


class LintOptions(VerdictOutputs, total=False):
    """Options of ``lint``: they replace what CONFIG says, or stand for it."""

    finetuning_type: Annotated[
        str | None, Option(None, "Train LoRA or all weights.", "lora|full", panel=INPUTS)
    ]
    lr: Annotated[
        float | None, Option(None, "Peak learning rate.", "X", panel=INPUTS, between=(0, MAX_RATE))
    ]
    rank: Annotated[int | None, RANK.by(None, panel=INPUTS, least=1)]
    alpha: Annotated[float | None, Option(None, "lora_alpha.", "A", panel=INPUTS)]
    dtype: Annotated[
        str | None,
        ADAPTER_DTYPE.by(None, help="Dtype of the trained weights.", former="", panel=INPUTS),
    ]
    optimizer: Annotated[str | None, Option(None, "Optimizer, e.g. adamw.", "NAME", panel=INPUTS)]
    steps: Annotated[
        int | None, STEPS.by(None, help="Training steps, to simulate the path.", panel=INPUTS)
    ]
    tokens: Annotated[
        str | int | None, Option(None, "Predicted tokens of the training data.", "N", panel=INPUTS)
    ]
    gpu_memory: Annotated[
        str | None, Option(None, "Memory of the GPU, e.g. 24GB.", "SIZE", panel=INPUTS)
    ]
    consumers: Annotated[
        Sequence[str], Option((), "Programs that must serve the adapter.", "NAME,...", panel=INPUTS)
    ]
    fail_on: Annotated[str, Option("error", "Least severity that fails.", "error|warning|note")]


FEATURE = Feature(
    __name__,
    "lint",
    "Train",
    commands=(
        Command(
            help="What will go wrong in training, before the first step.",
            question="What will go wrong in training, before the first step?",
            notes="CONFIG is an adapter's folder or adapter_config.json, a configuration of "
            "axolotl, LLaMA-Factory, "
            "TRL or torchtune, or a Trainer's training_args.bin. Exit codes: 0 no finding of the "
            "severity of --fail-on "
            "or above, 1 findings, 3 unreadable.",
            examples=(
                "lint base/ train.yaml",
                "lint base/ --finetuning-type full --lr 1e-6 --dtype bfloat16",
            ),
            arguments=(
                Argument(
                    "base",
                    "Base checkpoint, of which little is read, or its config.json.",
                    optional=True,
                ),
                Argument(
                    "config", "Training configuration or adapter; may be left out.", optional=True
                ),
            ),
            options=(LintOptions,),
            shows=("json", "quiet", "verbose"),
            suggest=".show:suggest_next",
            exit_code=".show:exit_code",
            annotations=".show:list_annotations",
        ),
    ),
    records=(".record:LintFinding", ".record:StepShare"),
    functions=(".run:lint",),
    statements=".show:lint_lines",
    table=".show:lint_table",
)
