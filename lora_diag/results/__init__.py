"""The records and the file they live in.

The rule on the door: a record is plain, frozen, schema-numbered data, and everything shown, judged or planned later is
a function of records alone. This room opens no checkpoint and imports neither torch nor NumPy.
"""

from lora_diag.results.allocation import Allocation, Baseline, Certificate
from lora_diag.results.base import SCHEMA
from lora_diag.results.curvature import Curvature, LossBound
from lora_diag.results.extraction import Extraction, OnData
from lora_diag.results.fisher import Effect, Fisher
from lora_diag.results.fleet import Fleet
from lora_diag.results.interference import Interference, Union
from lora_diag.results.intrinsic import Intrinsic
from lora_diag.results.intruders import Direction, Intruders
from lora_diag.results.inventory import AdaptedWeight, Inventory, StoredTensor
from lora_diag.results.merge import Merge
from lora_diag.results.overlap import Overlap
from lora_diag.results.probe import Probe
from lora_diag.results.reading import is_results_file, read_results, read_results_of
from lora_diag.results.records import AnyRecord, LayerRecord, WholeRecord
from lora_diag.results.residual import Agreement, Distance, Residual
from lora_diag.results.results import Results, lines_of, to_line, totals
from lora_diag.results.run import End, LeftOut, Run, RunInput
from lora_diag.results.sensitivity import FirstOrder, Sensitivity
from lora_diag.results.spectrum import Resolution, Spectrum, Tail
from lora_diag.results.verdict import Verdict
from lora_diag.results.writing import ResultsWriter

__all__ = [
    "SCHEMA",
    "AdaptedWeight",
    "Agreement",
    "Allocation",
    "AnyRecord",
    "Baseline",
    "Certificate",
    "Curvature",
    "Direction",
    "Distance",
    "Effect",
    "End",
    "Extraction",
    "FirstOrder",
    "Fisher",
    "Fleet",
    "Interference",
    "Intrinsic",
    "Intruders",
    "Inventory",
    "LayerRecord",
    "LeftOut",
    "LossBound",
    "Merge",
    "OnData",
    "Overlap",
    "Probe",
    "Residual",
    "Resolution",
    "Results",
    "ResultsWriter",
    "Run",
    "RunInput",
    "Sensitivity",
    "Spectrum",
    "StoredTensor",
    "Tail",
    "Union",
    "Verdict",
    "WholeRecord",
    "is_results_file",
    "lines_of",
    "read_results",
    "read_results_of",
    "to_line",
    "totals",
]
