"""Which table shows which results: ``inspect`` shows them again as the command did that measured them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_diag.decisions.allocate.summary import allocation_table
from lora_diag.decisions.extract.summary import extraction_table
from lora_diag.decisions.gate.summary import verdict_table
from lora_diag.diagnostics.fleet.summary import fleet_table
from lora_diag.diagnostics.interference.summary import interference_table
from lora_diag.diagnostics.intruders.summary import intruders_table
from lora_diag.diagnostics.overlap.table import overlap_table
from lora_diag.diagnostics.residual.summary import residual_table
from lora_diag.diagnostics.spectrum.table import spectrum_table
from lora_diag.diagnostics.verify_merge.summary import merge_table
from lora_diag.errors import InputError
from lora_diag.probes.curvature.summary import curvature_table
from lora_diag.probes.fisher.summary import fisher_table
from lora_diag.probes.intrinsic.summary import intrinsic_table
from lora_diag.probes.outputs.summary import outputs_table
from lora_diag.probes.sensitivity.summary import sensitivity_table
from lora_diag.probes.sweep.summary import sweep_table
from lora_diag.probes.truncation.summary import truncation_table
from lora_diag.records import Results

# The command of a run, and the table that shows its results. One line a command.
TABLES: tuple[tuple[str, Callable[..., str]], ...] = (
    ("spectrum", spectrum_table),
    ("residual", residual_table),
    ("extract", extraction_table),
    ("overlap", overlap_table),
    ("interference", interference_table),
    ("intruders", intruders_table),
    ("spectrum --adapters", fleet_table),
    ("allocate", allocation_table),
    ("probe truncation", truncation_table),
    ("probe curvature", curvature_table),
    ("probe fisher", fisher_table),
    ("probe intrinsic", intrinsic_table),
    ("probe outputs", outputs_table),
    ("probe sweep", sweep_table),
    ("probe sensitivity", sensitivity_table),
    ("verify-merge", merge_table),
    ("gate", verdict_table),
)


def table(results: Results[Any], width: int = 80, color: bool = False, per: str = "type") -> str:
    """Return the table and the summary of any results.

    Args:
        results: What was measured.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: ``type`` for one row a module type, ``layer`` for one row a layer.

    Raises:
        InputError: They come from a command that this version does not know.
    """
    for command, show in TABLES:
        if results.run.command == command:
            return show(results, width, color, per=per)
    raise InputError(f"results of loradiag {results.run.command}: this version has no table for them")
