"""``plan-merge``: fraction of an adapter's update that storage in a format keeps, before a merge.

Its declaration and options.
"""

from typing import Annotated

from lora_diag.feature import BASE_ARGUMENT, Argument, Command, Feature, Section
from lora_diag.running.options import REQUIRED, Option, RunOptions


class PlanMergeOptions(RunOptions, total=False):
    """Options of ``plan-merge``."""

    to: Annotated[
        str,
        Option(
            REQUIRED,
            "Format of the merged weights.",
            "bf16|fp16|fp8|mxfp4|nvfp4|int4|q8_0|q5_0|q5_1|q4_0|q4_1",
        ),
    ]
    group_size: Annotated[
        int | None, Option(None, "Inputs that share a scale of int4; default: 128.", "N")
    ]
    fp8_scale: Annotated[
        str | None,
        Option(
            None,
            "Scales of fp8: one per row (default) or one per tensor.",
            "row|tensor",
            former="scale",
        ),
    ]


FEATURE = Feature(
    __name__,
    "plan-merge",
    "Ship",
    commands=(
        Command(
            help="How much of ΔW survives a merge into a storage format.",
            examples=("plan-merge base/ lora_r16/ --to mxfp4",),
            arguments=(BASE_ARGUMENT, Argument("adapter", "The adapter to merge.")),
            options=(PlanMergeOptions,),
            suggest=".show:suggest_next",
        ),
    ),
    records=(".record:PlannedMerge",),
    functions=(".measure:plan_merge",),
    statements=".show:plan_lines",
    section=Section("Merge plan"),
    questions=(("conclusion", "Should the adapter be merged or served unmerged?"),),
)
