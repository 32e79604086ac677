"""``verify-merge``: check whether a merged checkpoint equals BASE plus the adapter."""

from lora_diag.feature import BASE_ARGUMENT, Argument, Command, Feature, Hint, Section
from lora_diag.running.options import RunOptions

FEATURE = Feature(
    __name__,
    "verify-merge",
    "Ship",
    commands=(
        Command(
            help="Compare a merged checkpoint with BASE plus the adapter.",
            question="Is the merged checkpoint correct?",
            notes="Exit codes: 0 if every entry of MERGED is W + ΔW up to rounding, 1 if not, 5 "
            "inconclusive.",
            examples=("verify-merge base/ lora_r16/ merged/",),
            arguments=(
                BASE_ARGUMENT,
                Argument("adapter", "The adapter that was merged."),
                Argument("merged", "Merged checkpoint."),
            ),
            options=(RunOptions,),
            hints=(
                Hint("gate --policy merge {output}", "judges these results"),
                Hint("-o merge.jsonl", "saves these results, for gate"),
            ),
            suggest=".show:suggest_next",
            exit_code=".record:exit_code",
        ),
    ),
    records=(".record:Merge",),
    functions=(".measure:verify_merge",),
    statements=".show:merge_lines",
    grids=".show:merge_grids",
    section=Section("Merge", order=40),
    questions=(("correct", "Is the merge correct?"),),
)
