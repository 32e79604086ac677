"""Terminal output of ``residual``: one table per adapter or reference, sorted by the limiting
factor; a summary.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from lora_diag.diagnostics.residual.record import SEEDS, Residual
from lora_diag.metrics.subspaces import Distances, pool_distances
from lora_diag.records import Results
from lora_diag.records.base import Shown
from lora_diag.rendering.statements import (
    Statement,
    describe_lineage,
    describe_resolution,
    make_statement,
    short_paths,
    summarize,
)
from lora_diag.rendering.tables import Grid, grid_of, rows_of
from lora_diag.rendering.text import format_shown, number, percent, quantity, safe

# What limits a layer, in the order of the table.
_LIMITS = ("rank", "scale", "direction", "noise", "exact", "not adapted", None)


def residual_grids(results: Results[Residual], per: str = "type") -> list[Grid]:
    """Return the tables, one for each adapter and reference."""
    return [_make_grid(name, records, per) for name, records in _group_by_adapter(results)]


def _group_by_adapter(results: Results[Residual]) -> list[tuple[str, list[Residual]]]:
    """Return the short name and the records of each adapter and reference, in the order of the
    records.
    """
    groups: dict[str, list[Residual]] = {}
    for record in results:
        groups.setdefault(record.adapter, []).append(record)
    return list(zip(short_paths([*groups]), groups.values(), strict=True))


def _make_grid(name: str, records: Sequence[Residual], per: str) -> Grid:
    """Return the table of one adapter or reference."""
    rows = _make_rows(records, per)
    total = _pool_gap(records) or 1.0
    share = Shown(
        "epsilon",
        "of ε²",
        "Fraction of the total ‖ΔW_full − ΔW_adapter‖²",
        main=True,
        form="percent",
        pool=lambda group: (_pool_gap(group) / total) ** 2,
    )
    *first, last = Residual.shown
    caption = f"{name}, {records[0].role}, compared with TUNED"
    return grid_of([*first, share, last], rows, per, caption)


def _make_rows(records: Sequence[Residual], per: str) -> list[tuple[str, Sequence[Residual]]]:
    """Return rows of the adapted matrices, sorted by their limiting factor, and rows for the other
    layers.

    The other layers are those that are not adapted, and norms and biases: one row for each of the
    two.
    """
    other_groups: dict[str, list[Residual]] = {"not adapted": [], "1-D tensors": []}
    adapted = []
    for record in records:
        if not record.rank and record.adapter_fro == 0:
            other_groups["not adapted"].append(record)
        elif len(record.shape) < 2:
            other_groups["1-D tensors"].append(record)
        else:
            adapted.append(record)
    rows: list[tuple[str, Sequence[Residual]]] = sorted(
        rows_of(adapted, per),
        key=lambda row: (_LIMITS.index(_find_main_limit(row[1])), -_pool_gap(row[1])),
    )
    for name, group in other_groups.items():
        if group:
            rows.append((name if per == "type" else f"{name}: {len(group)}", group))
    return rows


def _pool_gap(records: Sequence[Residual]) -> float:
    """Return ‖D − X‖_F of several layers together."""
    return math.hypot(*(record.gap for record in records))


def _find_main_limit(records: Sequence[Residual]) -> str | None:
    """Return the limiting factor with the largest sum of ‖D − X‖² over its layers; None for layers
    without one.
    """
    shares: Counter[str | None] = Counter()
    for record in records:
        shares[record.limited_by] += record.gap**2  # type: ignore[assignment]  # a Counter of floats
    return shares.most_common(1)[0][0]


def residual_lines(results: Results[Residual]) -> list[Statement]:
    """Return the statements of the summary; adapters are in descending order of their cosine with
    TUNED.
    """
    findings = [describe_lineage(results)]
    tuned = results.run.inputs[1:2]
    if tuned and tuned[0].role == "adapter":
        note = (
            f"TUNED, {safe(tuned[0].path)}, is an adapter: ε is relative to its update; the order "
            "is BASE TUNED ADAPTER"
        )
        findings.append(make_statement("note", "Note", note, level="warning"))
    groups = [
        (name, records, pool_distances(records)) for name, records in _group_by_adapter(results)
    ]
    # Not by ε, which depends on the norm that the learning rate gave an adapter.
    groups.sort(
        key=lambda group: -1.0 if group[2].cosine is None else group[2].cosine, reverse=True
    )
    adapters = [(name, records) for name, records, _ in groups if records[0].role == "adapter"]
    limits = (f"{name}: {_describe_limit(records)}" for name, records in adapters)
    rank_limits = (f"{name}: {_describe_rank_limit(records)}" for name, records in adapters)
    groups.sort(key=lambda group: group[1][0].role, reverse=True)
    findings += [
        make_statement("limited_by", "Limited by", *limits, priority=0),
        make_statement("distance", "Distance", *itertools.starmap(_describe_distance, groups)),
        make_statement("low_rank", "Rank limit", *rank_limits, priority=2),
    ]
    if groups:
        findings.append(_describe_resolution(groups[0][1]))
        meaning = [
            "ε is the distance to this one solution, not quality: the held-out loss shows which "
            "model is better"
        ]
        if len(adapters) == len(groups):
            meaning.append(f"{SEEDS}; --reference TUNED2 measures that of your own seeds")
        findings.append(make_statement("interpretation", "Interpretation", *meaning, priority=2))
    return summarize(results, *findings)


def _describe_resolution(records: Sequence[Residual]) -> Statement:
    verdicts = [
        record.resolution.verdict
        for record in records
        if record.resolution is not None and record.fro > 0
    ]
    yes = "yes: rounding plays no part in TUNED's update"
    noise = "ε there includes rounding noise"
    return describe_resolution(verdicts, yes, noise, owner=" of TUNED")


def _describe_distance(name: str, records: Sequence[Residual], whole: Distances) -> str:
    """State the distance from the whole update, and the cosine with it."""
    title = f"{name}, another full fine-tune" if records[0].role == "reference" else name
    if whole.epsilon is None:
        return f"{title}: TUNED changes nothing, so there is no ε"
    return f"{title}: ε = {number(whole.epsilon)}, cosine {format_shown(whole.cosine)}"


def _describe_limit(records: Sequence[Residual]) -> str:
    """State what limits an adapter, in how many tensors; the fraction of ‖ΔW‖² not adapted; and a
    better scale.
    """
    acting = [record for record in records if record.adapter_fro > 0]
    counts = Counter(record.limited_by for record in acting if record.limited_by)
    clauses = [
        f"{limit} in {tensors} of {quantity(len(acting), 'tensor')}"
        for limit, tensors in counts.most_common()
    ]
    if unchanged := _pool_fro(record for record in records if record.adapter_fro == 0):
        clauses.append(f"{percent((unchanged / _pool_fro(records)) ** 2)} of ‖ΔW‖² not adapted")
    if scaled := [record for record in acting if record.limited_by == "scale"]:
        best = format_shown(pool_distances(scaled).best_scale)
        clauses.append(f"{best} times its α is best where scale limits")
    return "; ".join(clauses) or "nothing"


def _describe_rank_limit(records: Sequence[Residual]) -> str:
    """State how much of TUNED's update is beyond the ranks of the adapter."""
    ranked = [record for record in records if record.rank and record.epsilon_min is not None]
    if not ranked:
        return "no layer with a known rank was compared with TUNED"
    beyond = math.hypot(*(record.floor for record in ranked)) / _pool_fro(records)
    return f"{percent(beyond**2)} of ‖ΔW‖² is beyond the adapter's ranks"


def _pool_fro(records: Iterable[Residual]) -> float:
    """Return ‖D‖_F of several layers together."""
    return math.hypot(*(record.fro for record in records))
