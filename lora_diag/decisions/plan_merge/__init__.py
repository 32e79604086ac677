"""``plan-merge``: fraction of an adapter's update that storage in a format keeps, before a merge."""

from lora_diag.feature import Feature, Section

FEATURE = Feature(
    __name__,
    "plan-merge",
    command=".command:plan_merge",
    records=(".record:PlannedMerge",),
    functions=(".run:plan_merge",),
    statements=".summary:plan_lines",
    section=Section("Merge plan"),
    questions=(("conclusion", "Should the adapter be merged or served unmerged?"),),
)
