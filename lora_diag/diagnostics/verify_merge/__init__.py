"""``verify-merge``: whether a merged checkpoint holds what the adapter says."""

from lora_diag.feature import Feature, Section

FEATURE = Feature(
    __name__,
    "verify-merge",
    command=".command:verify_merge",
    records=(".record:Merge",),
    functions=(".run:verify_merge",),
    table=".summary:merge_table",
    section=Section("Merge", ".summary:merge_lines", ".summary:merge_grids", order=40),
    questions=(("correct", "Did the merge do what the adapter says?"),),
)
