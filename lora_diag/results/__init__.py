"""The records and the file they live in.

The rule on the door: a record is plain, frozen, schema-numbered data, and everything shown, judged or planned later is
a function of records alone. This room opens no checkpoint and imports neither torch nor NumPy.
"""

from lora_diag.results.file import Results, ResultsWriter, is_results_file, read_results, totals
from lora_diag.results.records import (
    SCHEMA,
    AdaptedWeight,
    AnyRecord,
    End,
    Inventory,
    LeftOut,
    Resolution,
    Run,
    RunInput,
    Spectrum,
    StoredTensor,
    Tail,
)

__all__ = [
    "SCHEMA",
    "AdaptedWeight",
    "AnyRecord",
    "End",
    "Inventory",
    "LeftOut",
    "Resolution",
    "Results",
    "ResultsWriter",
    "Run",
    "RunInput",
    "Spectrum",
    "StoredTensor",
    "Tail",
    "is_results_file",
    "read_results",
    "totals",
]
