"""``extract``: write the best adapter of given ranks in PEFT's format."""

from lora_diag.feature import Feature

FEATURE = Feature(
    __name__,
    "extract",
    command=".command:extract",
    records=(".record:Extraction",),
    functions=(".run:extract",),
    table=".summary:extraction_table",
)
