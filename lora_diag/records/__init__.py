"""The records and the file they live in.

The rule on the door: a record is plain, frozen, schema-numbered data, and everything shown, judged or planned later is
a function of records alone. This room opens no checkpoint and imports neither torch nor NumPy.
"""

from lora_diag.records.allocation import Allocation, Baseline, Certificate
from lora_diag.records.base import SCHEMA
from lora_diag.records.curvature import Curvature, LossBound
from lora_diag.records.extraction import Extraction, OnData
from lora_diag.records.fisher import Effect, Fisher
from lora_diag.records.fleet import Fleet
from lora_diag.records.interference import Interference, Union
from lora_diag.records.intrinsic import Intrinsic
from lora_diag.records.intruders import Direction, Intruders
from lora_diag.records.inventory import AdaptedWeight, Inventory, StoredTensor
from lora_diag.records.merge import Merge
from lora_diag.records.overlap import Overlap
from lora_diag.records.probe import Probe
from lora_diag.records.reading import is_results_file, read_results, read_results_of
from lora_diag.records.records import AnyRecord, LayerRecord, WholeRecord
from lora_diag.records.residual import Agreement, Distance, Residual
from lora_diag.records.results import Results, to_line, totals
from lora_diag.records.run import End, LeftOut, Run, RunInput
from lora_diag.records.sensitivity import FirstOrder, Sensitivity
from lora_diag.records.spectrum import Resolution, Spectrum, Tail
from lora_diag.records.verdict import Verdict
from lora_diag.records.writing import ResultsWriter

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
    "read_results",
    "read_results_of",
    "to_line",
    "totals",
]
