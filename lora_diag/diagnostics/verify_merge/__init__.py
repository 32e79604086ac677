"""``verify-merge``: check whether a merged checkpoint equals BASE plus the adapter."""

from lora_diag.feature import Feature, Section

FEATURE = Feature(
    __name__,
    "verify-merge",
    command=".command:verify_merge",
    records=(".record:Merge",),
    functions=(".measure:verify_merge",),
    statements=".show:merge_lines",
    grids=".show:merge_grids",
    section=Section("Merge", order=40),
    questions=(("correct", "Is the merge correct?"),),
)
