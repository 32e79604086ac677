"""Terminal output of ``fleet``: outliers, near-duplicates, and a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from lora_diag.diagnostics.fleet.record import Fleet
from lora_diag.metrics.statistics import (
    MIN_NEAR_COSINE,
    MIN_SPACE_OVERLAP,
    OVER_RANKED_BELOW,
    SPIKED_FROM,
    NearDuplicate,
    OutlierKind,
    find_near_duplicates,
    find_norm_outliers,
    find_outlier_kinds,
    order_by_rarity,
)
from lora_diag.records import Results
from lora_diag.records.base import Shown
from lora_diag.rendering.statements import Statement, make_statement, unfinished
from lora_diag.rendering.tables import Column, Grid, grid_of, grids_table
from lora_diag.rendering.text import list_counts, number, percent, quantity, safe, span

# Maximum number of rows of a table, and of items named in a sentence; the records have all.
_MAX_ROWS, _MAX_NAMED = 20, 3

_RELATION_TEXTS = {
    "same": "the same update, up to scale",
    "near": "nearly the same update",
    "space": "same column spaces, different update",
}


def fleet_table(
    results: Results[Fleet], width: int = 80, color: bool = False, per: str = "type", next_command: str | None = None
) -> str:
    """Return the tables and the summary of a fleet.

    Args:
        results: The results.
        width: Width of the terminal in columns; the layout adapts from 80 to 140.
        color: Whether to use ANSI colours.
        per: ``layer`` for one row per adapter, ``type`` for outliers only.
        next_command: The suggested next command, printed last.

    Returns:
        Lines of text, without a trailing newline.
    """
    pairs = pairs_of(results)
    return grids_table(fleet_grids(results, per, pairs), fleet_lines(results, pairs), width, color, next_command)


def pairs_of(results: Results[Fleet]) -> list[NearDuplicate]:
    """Return the pairs of near-duplicate adapters."""
    return find_near_duplicates([record.update for record in results], [record.space for record in results])


def fleet_grids(results: Results[Fleet], per: str = "type", pairs: Sequence[NearDuplicate] | None = None) -> list[Grid]:
    """Return the tables: outliers, or every adapter; and near-duplicates, found anew without ``pairs``."""
    pairs = pairs_of(results) if pairs is None else pairs
    records = list(results)
    names, notes = short_names([record.adapter for record in records]), remarks(records)
    outliers = order_by_rarity(find_outlier_kinds(records))
    indices = [*outliers, *(i for i in range(len(records)) if not notes[i])] if per == "layer" else outliers
    rows_shown = len(indices) if per == "layer" else _MAX_ROWS
    caption = "all adapters" if per == "layer" else "outliers"
    grids = [_make_adapters_grid(caption, records, names, notes, indices[:rows_shown])] if indices else []
    return [*grids, _make_duplicates_grid(names, pairs[:_MAX_ROWS])] if pairs else grids


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the paths without their common leading folders, escaped for the terminal.

    >>> short_names(["runs/a/lora", "runs/b/lora"]), short_names(["runs/a"])
    (['a/lora', 'b/lora'], ['a'])
    """
    split = [path.split("/") for path in paths]
    common = 0
    while all(len(parts) > common + 1 for parts in split) and len({tuple(parts[: common + 1]) for parts in split}) == 1:
        common += 1
    return [safe("/".join(parts[common:])) for parts in split]


def remarks(records: Sequence[Fleet]) -> list[list[str]]:
    """Return, for each adapter, a description of every kind of outlier that it is."""
    ratios = find_norm_outliers([record.fro for record in records])
    descriptions = []
    for record, ratio, kinds in zip(records, ratios, find_outlier_kinds(records), strict=True):
        texts: dict[OutlierKind, str] = {
            "dead": "dead" if record.dead == record.modules else f"{record.dead} of {record.modules} dead",
            "norm": f"norm {number(ratio or 0.0)}× the median",
        }
        descriptions.append([texts.get(kind, kind) for kind in kinds])
    return descriptions


def _make_adapters_grid(
    caption: str, records: Sequence[Fleet], names: Sequence[str], notes: Sequence[list[str]], indices: Sequence[int]
) -> Grid:
    rows = [(names[i], [records[i]]) for i in indices]
    cells = tuple(", ".join(notes[i]) or "-" for i in indices)
    return grid_of(Fleet.shown, rows, "adapter", caption, extra=[Column("remark", cells, "left")])


_DUPLICATE_COLUMNS = (
    Shown("cosine", "cosine", "of the updates, estimated", main=True, form=".3f"),
    Shown("overlap", "col space", "of the column spaces, estimated", main=True, form=".2f", pool="max", drop=1),
)


def _make_duplicates_grid(names: Sequence[str], pairs: Sequence[NearDuplicate]) -> Grid:
    rows = [(f"{names[pair.first]} × {names[pair.second]}", [pair]) for pair in pairs]
    column = Column("is", tuple(_RELATION_TEXTS[pair.relation] for pair in pairs), "left")
    return grid_of(_DUPLICATE_COLUMNS, rows, "pair", "near-duplicates", extra=[column])


def fleet_lines(results: Results[Fleet], pairs: Sequence[NearDuplicate] | None = None) -> list[Statement]:
    """Return the statements of the summary.

    Args:
        results: The results.
        pairs: Its near-duplicates; found anew without them.
    """
    records = results.layers
    failed = [f"{safe(item.layer)}: {safe(item.detail)}" for item in results.left_out if item.reason == "unreadable"]
    remaining = f"and {len(failed) - _MAX_NAMED} more" if len(failed) > _MAX_NAMED else ""
    lines = [make_statement("not_measured", "Not measured", *failed[:_MAX_NAMED], remaining, level="failure")]
    if records:
        families = Counter(record.family for record in records).most_common(_MAX_NAMED)
        text = ", ".join(f"{number_of} {safe(family)}" for family, number_of in families)
        near_duplicates = pairs_of(results) if pairs is None else pairs
        lines = [
            make_statement("adapters", "Adapters", f"{len(records)}: {text}"),
            make_statement("rank", "Rank", _describe_rank(records)),
            make_statement("stand_out", "Outliers", _describe_outliers(records)),
            make_statement("alike", "Near-duplicates", _describe_pairs(near_duplicates)),
            *lines,
        ]
    return [*(line for line in lines if line.lead), *unfinished(results, "adapters measured so far")]


def _describe_rank(records: Sequence[Fleet]) -> str:
    ranked = [record for record in records if record.used is not None and record.fro]
    if not ranked:
        return "no adapter has a rank"
    used_fraction = sum(record.total_rank_99 for record in ranked) / sum(record.total_rank or 0 for record in ranked)
    median_rank = median(record.total_rank_99 / record.modules for record in ranked)
    return (
        f"r = {span((record.rank for record in ranked if record.rank is not None), ' to ')}; 99% of the energy needs a "
        f"median r of {number(median_rank)} per layer, {percent(used_fraction)} of all ranks"
    )


_OUTLIERS: dict[OutlierKind, str] = {
    "dead": "with dead layers (ΔW = 0)",
    "over-ranked": f"over-ranked (99% of the energy in at most {OVER_RANKED_BELOW:.0%} of the rank)",
    "spiked": f"spiked (one direction per layer has {SPIKED_FROM:.0%})",
    "norm": "with an outlying norm",
}


def _describe_outliers(records: Sequence[Fleet]) -> str:
    kinds = [kind for kinds in find_outlier_kinds(records) for kind in kinds]
    return ", ".join(list_counts(kinds, _OUTLIERS)) or "none"


def _describe_pairs(pairs: Sequence[NearDuplicate]) -> str:
    counts = Counter(pair.relation for pair in pairs)
    texts = [f"{quantity(counts[key], 'pair')}: {text}" for key, text in _RELATION_TEXTS.items() if counts[key]]
    return (
        f"{', '.join(texts) or 'none'} (|cosine| ≥ {MIN_NEAR_COSINE} or column spaces with an overlap ≥ "
        f"{MIN_SPACE_OVERLAP}, both estimated from sketches)"
    )
