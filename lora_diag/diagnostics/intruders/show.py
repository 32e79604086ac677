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
    is_adapter = any(side.role == "adapter" for side in results.run.inputs)
    probe = (
        "probe outputs {base} {tuned}"
        if is_adapter
        else "probe truncation {base} {tuned} --ranks 0"
    )
    return Hint(f"{probe} --eval earlier_data.txt", "whether the model forgot")


def intruders_lines(results: Results[Intruders]) -> list[Statement]:
    """Return the statements of the summary."""
    records, findings = results.layers, []
    if records:
        level: Level = "warning" if any(record.intruders for record in records) else "note"
        random, tested = (
            sum(record.count_random for record in records),
            sum(record.k for record in records),
        )
        chance = (
            f"about {random:.0f} of {tested} random directions would count: intruders are "
            "new, not significant"
        )
        findings = [
            make_statement(
                "intruders", "Intruders", *describe_intruders(records), level=level, priority=0
            ),
            make_statement("chance", "Random baseline", chance, priority=2),
        ]
    meaning = (
        "other studies found intruders together with forgetting (arXiv 2410.21228); only the loss "
        "shows it here"
    )
    return summarize(
        results, *findings, make_statement("interpretation", "Interpretation", meaning)
    )


def describe_intruders(records: Sequence[Intruders]) -> list[str]:
    """State the number of intruders, the layers with the most, and the criterion."""
    total, tested = sum(record.intruders for record in records), sum(record.k for record in records)
    k, epsilon = records[0].k, number(records[0].epsilon)
    criterion = (
        f"of the {k} largest directions of each weight, those with a similarity to BASE "
        f"below {epsilon}"
    )
    if not total:
        return [f"none in {quantity(len(records), 'layer')}", criterion]
    affected = sorted(
        (record for record in records if record.intruders), key=lambda record: -record.intruders
    )
    layers = f"{len(affected)} of {quantity(len(records), 'layer')}"
    return [f"{total} of {tested} directions, in {layers}: {list_layers(affected)}", criterion]
