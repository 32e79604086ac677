"""Terminal output of ``intruders``: number and location of new directions, with a
random baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_diag.diagnostics.intruders.record import Intruders
from lora_diag.feature import Hint
from lora_diag.records import Results
from lora_diag.rendering.statements import Level, Statement, make_statement, summarize
from lora_diag.rendering.tables import Grid, grid_of, rows_of
from lora_diag.rendering.text import list_layers, number, quantity


def intruders_grids(results: Results[Intruders], per: str = "type") -> list[Grid]:
    """Return the table, the rows with the most intruders first."""
    rows = sorted(
        rows_of(results, per), key=lambda row: -sum(record.intruders for record in row[1])
    )
    return [grid_of(Intruders.shown, rows, per)]


def suggest_next(results: Results[Intruders], values: Mapping[str, Any]) -> Hint:
    """Return the next step: the loss on earlier data, of an adapter or of a fine-tune without
    factors.
    """
    probe = "probe truncation {base} {tuned} --ranks 0"
    if any(side.role == "adapter" for side in results.run.inputs):
        probe = "probe outputs {base} {tuned}"
    return Hint(f"{probe} --eval earlier_data.txt", "whether the model forgot")


def intruders_lines(results: Results[Intruders]) -> list[Statement]:
    """Return the statements of the summary."""
    records = results.layers
    findings = []
    if records:
        found = describe_intruders(records)
        level: Level = "warning" if any(record.intruders for record in records) else "note"
        findings.append(make_statement("intruders", "Intruders", *found, level=level, priority=0))
        random = sum(record.count_random for record in records)
        tested = sum(record.k for record in records)
        chance = (
            f"about {random:.0f} of {tested} random directions would count: intruders are "
            "new, not significant"
        )
        findings.append(make_statement("chance", "Random baseline", chance, priority=2))
    meaning = (
        "other studies found intruders together with forgetting (arXiv 2410.21228); only the loss "
        "shows it here"
    )
    findings.append(make_statement("interpretation", "Interpretation", meaning))
    return summarize(results, *findings)


def describe_intruders(records: Sequence[Intruders]) -> list[str]:
    """State the number of intruders, the layers with the most, and the criterion."""
    criterion = (
        f"of the {records[0].k} largest directions of each weight, those with a similarity to BASE "
        f"below {number(records[0].epsilon)}"
    )
    layers = quantity(len(records), "layer")
    affected = [record for record in records if record.intruders]
    if not affected:
        return [f"none in {layers}", criterion]
    affected.sort(key=lambda record: -record.intruders)
    total = sum(record.intruders for record in affected)
    tested = sum(record.k for record in records)
    where = f"{len(affected)} of {layers}: {list_layers(affected)}"
    return [f"{total} of {tested} directions, in {where}", criterion]
