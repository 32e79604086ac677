"""``loradiag nuclear``: the nuclear norm of every update, and its share by depth."""

from lora_diag.feature import Feature, Figure, Section

FEATURE = Feature(
    __name__,
    "nuclear",
    command=".command:nuclear",
    records=(".record:Nuclear",),
    functions=(".run:nuclear",),
    statements=".summary:statements",
    section=Section(
        "Nuclear norms",
    ),
    questions=(("where", "Where is the nuclear norm of the update?"),),
    figures=(Figure("nuclear", "share of the nuclear norm by depth"),),
)
