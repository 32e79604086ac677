"""Records, and the results file that holds them.

A record is plain, frozen, schema-numbered data; all tables, verdicts and plans are functions of
records alone. A file holds one run: its ``run`` record, the records of its layers, those about the
whole run, the skipped tensors, and its ``end`` record. Independent of features; opens no
checkpoint, imports neither torch nor NumPy.
"""

from lora_diag.records.base import LayerRecord, Record, WholeRecord
from lora_diag.records.file import ResultsWriter, is_results_file
from lora_diag.records.probe import Probe
from lora_diag.records.results import Results, lines_of, to_line, totals
from lora_diag.records.run import AnyRecord, End, LeftOut, Run, RunInput
from lora_diag.records.vocabulary import Agreement, Resolution, Tail

__all__ = [
    "Agreement",
    "AnyRecord",
    "End",
    "LayerRecord",
    "LeftOut",
    "Probe",
    "Record",
    "Resolution",
    "Results",
    "ResultsWriter",
    "Run",
    "RunInput",
    "Tail",
    "WholeRecord",
    "is_results_file",
    "lines_of",
    "to_line",
    "totals",
]
