"""Declaration and options of ``portability``: the ΔW that each serving program applies."""

from collections.abc import Sequence
from typing import Annotated, TypedDict

from lora_diag.feature import Argument, Command, Feature, Figure, Section
from lora_diag.running.options import INPUTS, OUTPUT, Option, RunOptions


class PortabilityOptions(RunOptions, total=False):
    """Options of ``portability``."""

    consumers: Annotated[
        Sequence[str],
        Option(
            (),
            "Programs, e.g. vllm or vllm==0.31; default: those for the format.",
            "NAME,...",
            panel=INPUTS,
        ),
    ]
    require: Annotated[
        Sequence[str],
        Option(
            (),
            "Exit with 1 unless these programs apply the intended ΔW; default: none.",
            "NAME,...",
        ),
    ]
    intended: Annotated[
        str | None,
        Option(None, "Program whose ΔW is intended; default: PEFT or the format's rule.", "NAME"),
    ]
    max_lora_rank: Annotated[
        int | None, Option(None, "Largest rank that servers accept; default: any.", "R")
    ]


class FixOptions(TypedDict, total=False):
    """Options of the command for writing a portable adapter, and for the rules of all programs."""

    fix: Annotated[
        bool, Option(False, "Write to -o an adapter that all programs scale alike.", panel=OUTPUT)
    ]
    format: Annotated[
        str | None,
        Option(
            None,
            "With --fix: format; default: that of ADAPTER.",
            "peft|kohya|diffusers|mlx|gguf",
            panel=OUTPUT,
        ),
    ]
    dora_to_lora: Annotated[
        bool,
        Option(
            False,
            "With --fix: replace DoRA by the nearest LoRA of its rank; needs BASE.",
            panel=OUTPUT,
        ),
    ]
    leave_out: Annotated[
        bool,
        Option(False, "With --fix: leave out biases and weights stored in full.", panel=OUTPUT),
    ]
    rules: Annotated[
        bool,
        Option(False, "Print what each program does with each feature, and stop.", panel=OUTPUT),
    ]


FEATURE = Feature(
    __name__,
    "portability",
    "Ship",
    commands=(
        Command(
            run=".measure:judge_or_fix",
            help="The ΔW that each serving program applies, and its error.",
            question="Do serving programs apply the same ΔW?",
            examples=("portability lora_r16/ --consumers vllm,llamacpp --require vllm",),
            arguments=(
                Argument("base", "Base checkpoint, or an adapter alone.", optional=True),
                Argument("adapter", "Adapter that will be served.", optional=True),
            ),
            options=(PortabilityOptions, FixOptions),
            suggest=".show:suggest_next",
            table=".show:rules_table",
            exit_code=".show:exit_code",
        ),
    ),
    records=(".record:Portability",),
    functions=(".measure:portability", ".measure:make_portable"),
    statements=".show:portability_lines",
    grids=".show:portability_grids",
    section=Section("Portability", order=45),
    figures=(
        Figure(
            "portability",
            "error ε of each weight of an adapter in each serving program",
            made_by="loradiag portability ADAPTER -o portability.jsonl",
            by_color=False,
        ),
    ),
    questions=(("portable", "Do serving programs apply the intended update?"),),
)
