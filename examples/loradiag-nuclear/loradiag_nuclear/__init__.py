"""``loradiag nuclear``: the nuclear norm of every update, and its share by depth."""

from lora_diag.feature import BASE_ARGUMENT, TUNED_ARGUMENT, Command, Feature, Figure, Section
from lora_diag.running.options import LayerOptions

FEATURE = Feature(
    __name__,
    "nuclear",
    "Understand",
    commands=(
        Command(
            help="Nuclear norm of every update, and its share by depth.",
            arguments=(BASE_ARGUMENT, TUNED_ARGUMENT),
            options=(LayerOptions,),
        ),
    ),
    records=(".record:Nuclear",),
    functions=(".run:nuclear",),
    statements=".summary:statements",
    section=Section("Nuclear norms"),
    questions=(("where", "Where is the nuclear norm of the update?"),),
    figures=(Figure("nuclear", "share of the nuclear norm by depth"),),
)
