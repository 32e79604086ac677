"""Terminal output of ``intruders``: number and location of new directions, with a random baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_diag.diagnostics.intruders.record import Intruders
from lora_diag.feature import Hint
from lora_diag.records import Results
from lora_diag.rendering.statements import Level, Statement, make_statement, summarize
from lora_diag.rendering.tables import Grid, grid_of, rows_of
from lora_diag.rendering.text import number, quantity, short

# Maximum number of layers named in a sentence.
_MAX_NAMED = 3


def intruders_grids(results: Results[Intruders], per: str = "type") -> list[Grid]:
    """Return the table, the rows with the most intruders first."""
    rows = sorted(rows_of(results, per), key=lambda row: -sum(record.intruders for record in row[1]))
    return [grid_of(Intruders.shown, rows, per)]


def suggest_next(results: Results[Intruders], values: Mapping[str, Any]) -> Hint:
    """Return the next step: the loss on earlier data, of an adapter or of a fine-tune without factors."""
    is_adapter = any(side.role == "adapter" for side in results.run.inputs)
    probe = "probe outputs {base} {tuned}" if is_adapter else "probe truncation {base} {tuned} --ranks 0"
    return Hint(f"{probe} --eval earlier_data.txt", "whether the model forgot")


def intruders_lines(results: Results[Intruders]) -> list[Statement]:
    """Return the statements of the summary."""
    records, findings = results.layers, []
    if records:
        level: Level = "warning" if any(record.intruders for record in records) else "note"
        random, tested = sum(record.count_random for record in records), sum(record.k for record in records)
        chance = (
            f"about {random:.0f} of {tested} random directions would count: an intruder is a direction that BASE does "
            "not have, which is not a test of significance"
        )
        findings = [
            make_statement("intruders", "Intruders", *_describe_intruders(records), level=level, priority=0),
            make_statement("rotated", "Rotated", _describe_rotated(records), priority=2),
            make_statement("chance", "Random baseline", chance, priority=2),
        ]
    interpretation = (
        "other studies found intruders together with forgetting (arXiv 2410.21228); only the loss shows it here"
    )
    return summarize(results, *findings, make_statement("interpretation", "Interpretation", interpretation))


def _describe_intruders(records: Sequence[Intruders]) -> list[str]:
    """State the number of intruders, the layers with the most, and the criterion."""
    total, affected = sum(record.intruders for record in records), [record for record in records if record.intruders]
    unchanged = sum(record.fro == 0 for record in records)
    criterion = (
        f"of the {records[0].k} largest directions of each weight, those with a similarity to BASE below "
        f"{number(records[0].epsilon)}"
    )
    criterion += f"; {quantity(unchanged, 'weight')} did not change" if unchanged else ""
    if not total:
        return [f"none in {quantity(len(records), 'layer')}", criterion]
    affected.sort(key=lambda record: (-record.intruders, record.similarity_lowest or 0.0))
    examples = ", ".join(f"{short(record.layer)} ({record.intruders})" for record in affected[:_MAX_NAMED])
    tested = sum(record.k for record in records)
    lead = f"{total} of {tested} directions, in {len(affected)} of {quantity(len(records), 'layer')}: {examples}"
    return [lead, criterion]


def _describe_rotated(records: Sequence[Intruders]) -> str:
    """State how many directions rotate, which the published count includes."""
    rotated, published = sum(record.rotated for record in records), sum(record.count for record in records)
    near = number(records[0].window * 100)
    if not rotated:
        return f"none: the published count is also {published}"
    return (
        f"{rotated} more only rotate among directions of BASE whose singular values are within {near}%; the published "
        f"count, {published}, includes them"
    )
