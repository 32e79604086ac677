"""Terminal output of ``checkpoints``: a table of the checkpoints, and a summary."""

from __future__ import annotations

from lora_diag.diagnostics.checkpoints.record import Checkpoint, CheckpointLayer
from lora_diag.records import Results
from lora_diag.rendering.statements import Statement, make_statement, summarize
from lora_diag.rendering.tables import Grid, grid_of, rows_of

MEANING = "weights do not show quality: compare the checkpoints' held-out losses before one is chosen"


def checkpoints_grids(results: Results[CheckpointLayer], per: str = "type") -> list[Grid]:
    """Return the table of the checkpoints; with ``per`` = ``layer`` also that of the layers of the last one."""
    checkpoints = results.whole_of(Checkpoint)
    rows = [(str(record.step), [record]) for record in checkpoints]
    grids = [grid_of(Checkpoint.shown, rows, "step")] if rows else []
    if per == "layer" and checkpoints:
        last = [record for record in results if record.step == checkpoints[-1].step]
        grids.append(grid_of(CheckpointLayer.shown, rows_of(last, per), per, f"step {checkpoints[-1].step}"))
    return grids


def checkpoints_lines(results: Results[CheckpointLayer]) -> list[Statement]:
    """Return the statements of the summary."""
    return summarize(results, make_statement("interpretation", "Interpretation", MEANING))
