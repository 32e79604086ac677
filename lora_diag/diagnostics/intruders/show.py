"""Terminal output of ``intruders``: number and location of new directions, with a random baseline."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from lora_diag.diagnostics.intruders.record import Intruders
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


def intruders_lines(results: Results[Intruders]) -> list[Statement]:
    """Return the statements of the summary."""
    findings = []
    if records := results.layers:
        level: Level = "warning" if any(record.intruders for record in records) else "note"
        findings = [
            make_statement("intruders", "Intruders", _describe_intruders(records), level=level),
            make_statement("rotated", "Rotated", _describe_rotated(records)),
            make_statement("chance", "Random baseline", _describe_chance(records)),
        ]
    interpretation = (
        "intruders were found together with forgetting (arXiv 2410.21228); a loss on data from before the fine-tune "
        "shows whether this model forgot"
    )
    return summarize(results, *findings, make_statement("interpretation", "Interpretation", interpretation))


def _describe_intruders(records: Sequence[Intruders]) -> str:
    """State the number of intruders, and the layers with the most."""
    tested = sum(record.k for record in records)
    total = sum(record.intruders for record in records)
    k, epsilon = records[0].k, records[0].epsilon
    criterion = f"the {k} largest directions of each weight, similarity below {number(epsilon)}"
    unchanged = sum(record.fro == 0 for record in records)
    unchanged_text = f"; {quantity(unchanged, 'weight')} did not change" if unchanged else ""
    if not total:
        return f"none in {len(records)} layers ({criterion}){unchanged_text}"
    affected = sorted((r for r in records if r.intruders), key=lambda r: (-r.intruders, r.similarity_lowest or 0.0))
    examples = ", ".join(f"{short(r.layer)} ({r.intruders})" for r in affected[:_MAX_NAMED])
    layers = f"in {len(affected)} of {len(records)} layers"
    return f"{total} of {tested} directions, {layers} ({criterion}){unchanged_text}: {examples}"


def _describe_rotated(records: Sequence[Intruders]) -> str:
    """State how many directions rotate, which the published count includes."""
    rotated, count = sum(record.rotated for record in records), sum(record.count for record in records)
    near = number(records[0].window * 100)
    if not rotated:
        return f"none: the published count is also {count}"
    return (
        f"{rotated} more have no single match but lie in the span of directions of BASE with singular values within "
        f"{near}%, which can rotate freely. The published count, {count}, includes them"
    )


def _describe_chance(records: Sequence[Intruders]) -> str:
    """State the similarity of random directions, and how many of them would count."""
    similarity = median(record.similarity_random for record in records)
    count, tested = sum(record.count_random for record in records), sum(record.k for record in records)
    return (
        f"a random direction has a similarity of about {similarity:.2f}, so about {count:.0f} of {tested} would "
        "count: an intruder is a direction that BASE does not have, not one that is significant against chance"
    )
