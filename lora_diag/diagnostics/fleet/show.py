"""Terminal output of ``fleet``: outliers, near-duplicates, and a summary."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lora_diag.diagnostics.fleet.record import Fleet
from lora_diag.feature import Hint
from lora_diag.metrics import statistics
from lora_diag.records import Results
from lora_diag.records.base import Shown
from lora_diag.rendering.statements import Statement, final_statements, make_statement, short_paths
from lora_diag.rendering.tables import Column, Grid, grid_of
from lora_diag.rendering.text import list_counts, number, percent, quantity, span

# Maximum number of outliers or pairs in a table, and of adapters in a suggested command.
_MAX_ROWS, _MAX_NAMED = 20, 3

_RELATION_TEXTS = {
    "same": "the same update, up to scale",
    "near": "nearly the same update",
    "space": "same column spaces, different update",
}


_DUPLICATE_COLUMNS = (
    Shown("cosine", "cosine", "Of the updates, estimated", main=True, form=".3f"),
    Shown(
        "overlap",
        "col space",
        "Of the column spaces, estimated",
        main=True,
        form=".2f",
        pool="max",
        drop=1,
    ),
)


def fleet_grids(results: Results[Fleet], per: str = "type") -> list[Grid]:
    """Return the tables: the rarest outliers, with ``per`` = ``layer`` every adapter; and the
    nearest near-duplicates.

    A table without rows is omitted.
    """
    records = results.layers
    names = short_paths([record.adapter for record in records])
    remarks = describe_outliers(records)
    indices = statistics.order_by_rarity(statistics.find_outlier_kinds(records))
    if per == "layer":
        indices += [i for i in range(len(records)) if not remarks[i]]
    else:
        indices = indices[:_MAX_ROWS]
    grids = []
    if indices:
        rows = [(names[i], [records[i]]) for i in indices]
        remark = Column("remark", tuple(remarks[i] or "-" for i in indices), "left")
        caption = "all adapters" if per == "layer" else "outliers"
        grids.append(grid_of(Fleet.shown, rows, "adapter", caption, extra=[remark]))
    if pairs := _find_pairs(records)[:_MAX_ROWS]:
        pair_rows = [(f"{names[pair.first]} × {names[pair.second]}", [pair]) for pair in pairs]
        relation = Column("is", tuple(_RELATION_TEXTS[pair.relation] for pair in pairs), "left")
        caption = "near-duplicates"
        grids.append(grid_of(_DUPLICATE_COLUMNS, pair_rows, "pair", caption, extra=[relation]))
    return grids


def _find_pairs(records: Sequence[Fleet]) -> list[statistics.NearDuplicate]:
    """Return the pairs of near-duplicate adapters, the most similar first."""
    updates = [record.update for record in records]
    return statistics.find_near_duplicates(updates, [record.space for record in records])


def describe_outliers(records: Sequence[Fleet]) -> list[str]:
    """Return, for each adapter, a description of every kind of outlier that it is; empty if it is
    none.
    """
    ratios = statistics.find_norm_outliers([record.fro for record in records])
    all_kinds = statistics.find_outlier_kinds(records)
    descriptions = []
    for record, ratio, kinds in zip(records, ratios, all_kinds, strict=True):
        texts: list[str] = []
        for kind in kinds:
            if kind == "dead" and record.dead < record.modules:
                texts.append(f"{record.dead} of {record.modules} dead")
            elif kind == "norm":
                texts.append(f"norm {number(ratio or 0.0)}× the median")
            else:
                texts.append(kind)
        descriptions.append(", ".join(texts))
    return descriptions


def suggest_next(results: Results[Fleet], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step, an exact comparison of the nearest near-duplicates or of few adapters;
    else None.
    """
    compared = [record.adapter for record in results.layers]
    if pairs := _find_pairs(results.layers):
        compared = [compared[pairs[0].first], compared[pairs[0].second]]
    if not 1 < len(compared) <= _MAX_NAMED:
        return None
    return Hint(shlex.join(["interference", *compared]), "what they share, and what a merge loses")


def fleet_lines(results: Results[Fleet]) -> list[Statement]:
    """Return the statements of the summary."""
    records = results.layers
    final = final_statements(results, "adapters measured so far")
    if not records:
        return final
    kinds = [kind for kinds in statistics.find_outlier_kinds(records) for kind in kinds]
    outliers = ", ".join(list_counts(kinds, _OUTLIERS))
    outliers = outliers or f"none of {quantity(len(records), 'adapter')}"
    if len(records) < 3:
        outliers += "; norms are compared only among three or more adapters"
    relations = {relation: f"with {text}" for relation, text in _RELATION_TEXTS.items()}
    pairs = list_counts([pair.relation for pair in _find_pairs(records)], relations)
    duplicates = f"{', '.join(pairs) or 'none'}, estimated from sketches"
    rule = (
        f"a pair has |cosine| ≥ {statistics.MIN_NEAR_COSINE}, or an overlap of the column spaces ≥ "
        f"{statistics.MIN_SPACE_OVERLAP}"
    )
    return [
        make_statement("stand_out", "Outliers", outliers, priority=0),
        make_statement("alike", "Near-duplicates", duplicates, rule, priority=0),
        make_statement("rank", "Rank", _describe_rank(records)),
        *final,
    ]


def _describe_rank(records: Sequence[Fleet]) -> str:
    """State the ranks of nonzero adapters that have one, and the fraction that 99% of their energy
    needs.
    """
    ranked = [record for record in records if record.used is not None and record.fro]
    if not ranked:
        return "no adapter has a rank"
    needed = sum(record.total_rank_99 for record in ranked)
    total = sum(record.total_rank or 0 for record in ranked)
    ranks = span((record.rank for record in ranked if record.rank is not None), " to ")
    return f"{ranks}; 99% of the energy needs {percent(needed / total)} of it"


_OUTLIERS: dict[statistics.OutlierKind, str] = {
    "dead": "with dead layers (ΔW = 0)",
    "over-ranked": f"over-ranked (99% of the energy in at most {statistics.OVER_RANKED_BELOW:.0%} "
    "of the rank)",
    "spiked": f"spiked (one direction per layer has {statistics.SPIKED_FROM:.0%})",
    "norm": "with an outlying norm",
}
