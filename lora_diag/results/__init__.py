"""The records and the file they live in.

The rule on the door: a record is plain, frozen, schema-numbered data, and everything shown, judged or planned later is
a function of records alone. This room opens no checkpoint and imports neither torch nor NumPy.
"""

from lora_diag.results.reading import is_results_file, read_results, read_results_of
from lora_diag.results.records import (
    SCHEMA,
    AdaptedWeight,
    Agreement,
    Allocation,
    AnyRecord,
    Baseline,
    Certificate,
    Distance,
    End,
    Extraction,
    Interference,
    Inventory,
    LayerRecord,
    LeftOut,
    Merge,
    Overlap,
    Residual,
    Resolution,
    Run,
    RunInput,
    Spectrum,
    StoredTensor,
    Tail,
    Union,
    Verdict,
    WholeRecord,
)
from lora_diag.results.results import Results, to_line, totals
from lora_diag.results.writing import ResultsWriter

__all__ = [
    "SCHEMA",
    "AdaptedWeight",
    "Agreement",
    "Allocation",
    "AnyRecord",
    "Baseline",
    "Certificate",
    "Distance",
    "End",
    "Extraction",
    "Interference",
    "Inventory",
    "LayerRecord",
    "LeftOut",
    "Merge",
    "Overlap",
    "Residual",
    "Resolution",
    "Results",
    "ResultsWriter",
    "Run",
    "RunInput",
    "Spectrum",
    "StoredTensor",
    "Tail",
    "Union",
    "Verdict",
    "WholeRecord",
    "is_results_file",
    "read_results",
    "read_results_of",
    "to_line",
    "totals",
]
