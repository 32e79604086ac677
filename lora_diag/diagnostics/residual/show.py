"""Terminal output of ``residual``: one table per adapter, sorted by the limiting factor, and a summary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from lora_diag.diagnostics.residual.record import SEEDS, Residual, describe_parts
from lora_diag.metrics.subspaces import Distances, pool_distances
from lora_diag.records import Agreement, Results
from lora_diag.records.base import Shown
from lora_diag.rendering.statements import Statement, describe_resolution, make_statement, short_paths, summarize
from lora_diag.rendering.tables import Grid, grid_of, rows_of
from lora_diag.rendering.text import format_shown, list_names, percent, quantity, safe

# What limits a layer, in the order of the table.
_LIMITS = ("rank", "scale", "direction", "noise", "exact", "not adapted", None)


def residual_grids(results: Results[Residual], per: str = "type") -> list[Grid]:
    """Return the tables, one for each adapter and reference."""
    return [_make_grid(name, records, per) for name, records in _group_by_adapter(results)]


def _group_by_adapter(results: Results[Residual]) -> list[tuple[str, list[Residual]]]:
    """Return the records of each adapter and reference by its shortest name, in the given order."""
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
        "fraction of the total ‖ΔW_full − ΔW_adapter‖²",
        main=True,
        form="percent",
        pool=lambda group: (_pool_gap(group) / total) ** 2,
    )
    *first, last = Residual.shown
    return grid_of([*first, share, last], rows, per, f"{name}, {records[0].role}, compared with TUNED")


def _make_rows(records: Sequence[Residual], per: str) -> list[tuple[str, Sequence[Residual]]]:
    """Return rows of the adapted matrices, sorted by their limiting factor, and rows for the other layers.

    The other layers are those that are not adapted, and norms and biases: one row for each of the two.
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
    rows = sorted(rows_of(adapted, per), key=lambda row: (_LIMITS.index(_find_main_limit(row[1])), -_pool_gap(row[1])))
    others = [
        (name if per == "type" else f"{name}: {len(group)}", group) for name, group in other_groups.items() if group
    ]
    return [*rows, *others]


def _pool_gap(records: Sequence[Residual]) -> float:
    """Return ‖D − X‖_F of several layers together."""
    return math.hypot(*(record.gap for record in records))


def _find_main_limit(records: Sequence[Residual]) -> str | None:
    """Return the limiting factor with the largest sum of ‖D − X‖² over its layers; None for layers without one."""
    shares: Counter[str | None] = Counter()
    for record in records:
        shares[record.limited_by] += record.gap**2  # type: ignore[assignment]  # a Counter of floats
    return shares.most_common(1)[0][0]


def _describe_agreement(spaces: Sequence[Agreement | None]) -> str:
    """Return the median overlap, with the random baseline in brackets; ``-`` without any."""
    known = [space for space in spaces if space is not None]
    if not known:
        return "-"
    return f"{median(space.overlap for space in known):.2f} ({median(space.random for space in known):.2f})"


def residual_lines(results: Results[Residual]) -> list[Statement]:
    """Return the statements of the summary."""
    findings = []
    if len(results.run.inputs) > 1 and (tuned := results.run.inputs[1]).role == "adapter":
        note = (
            f"{safe(tuned.path)}, given as TUNED, is an adapter, not a full fine-tune, so ε is relative to its update. "
            "The order is BASE TUNED ADAPTER..."
        )
        findings.append(make_statement("note", "Note", note))
    groups = _group_by_adapter(results)
    adapters = [(name, records) for name, records in groups if records[0].role == "adapter"]
    findings += [
        make_statement("distance", "Distance", *(f"{name}: {_describe_distance(rows)}" for name, rows in adapters)),
        make_statement(
            "limited_by", "Limiting factor", *(f"{name}: {_describe_limits(rows)}" for name, rows in adapters)
        ),
        make_statement("low_rank", "Low rank", *(f"{name}: {_describe_rank_limit(rows)}" for name, rows in adapters)),
    ]
    if groups:
        verdicts = [r.resolution.verdict for r in groups[0][1] if r.resolution is not None and r.fro > 0]
        resolved = describe_resolution(
            verdicts,
            "yes: rounding plays no part in TUNED's update",
            "ε relative to rounding noise has no meaning there (limited by: noise)",
            owner=" of TUNED",
        )
        if not verdicts:
            resolved = replace(resolved, lead="no matrix of TUNED changed", level="warning")
        findings += [resolved, make_statement("interpretation", "Interpretation", *_interpret(groups))]
    return summarize(results, *findings)


def _describe_distance(records: Sequence[Residual]) -> str:
    """State the distance from the whole update, and from the part that the adapter changes."""
    whole, acting = pool_distances(records), [record for record in records if record.adapter_fro > 0]
    if whole.epsilon is None:
        return "TUNED changes nothing, so there is no ε"
    if not acting:
        return "changes nothing that TUNED changes: ε = 1"
    where_acting = pool_distances(acting)
    clauses = [f"ε = {format_shown(whole.epsilon)} for the whole model"]
    if len(acting) < len(records) and where_acting.epsilon is not None:
        clauses.append(f"{format_shown(where_acting.epsilon)} where it acts")
    clauses.append(
        f"there its norm is {format_shown(where_acting.norm_ratio)} times that of TUNED's update, with cosine "
        f"{format_shown(where_acting.cosine)}"
    )
    return "; ".join(clauses)


def _describe_limits(records: Sequence[Residual]) -> str:
    """State in how many tensors each factor limits the adapter, how many it does not change, and the parts of ε²."""
    total = math.hypot(*(record.fro for record in records)) or 1.0
    acting = [record for record in records if record.adapter_fro > 0]
    counts = Counter(record.limited_by for record in acting if record.limited_by)
    unchanged = [record for record in records if record.adapter_fro == 0]
    clauses = [
        f"{limit} in {layer_count} of {quantity(len(acting), 'tensor')}" for limit, layer_count in counts.most_common()
    ]
    if unchanged:
        share = percent((math.hypot(*(record.fro for record in unchanged)) / total) ** 2)
        clauses.append(f"{quantity(len(unchanged), 'tensor')} not adapted, with {share} of ‖ΔW‖²")
    if scaled := [record for record in acting if record.limited_by == "scale"]:
        clauses.append(
            f"the best α of the {quantity(len(scaled), 'tensor')} limited by scale is "
            f"{format_shown(pool_distances(scaled).best_scale)} times theirs"
        )
    return "; ".join([*clauses, *([describe_parts(records)] if any(record.fro for record in records) else [])])


def _describe_rank_limit(records: Sequence[Residual]) -> str:
    """State where the rank is the limit, and its cost."""
    total = math.hypot(*(record.fro for record in records)) or 1.0
    ranked = [record for record in records if record.rank and record.epsilon_min is not None]
    if not ranked:
        return "no layer with a known rank was compared with TUNED"
    out_of_reach = percent((math.hypot(*(record.floor for record in ranked)) / total) ** 2)
    bound = [record for record in ranked if record.limited_by == "rank"]
    if not bound:
        return f"rank limits no layer, though {out_of_reach} of ‖ΔW‖² is beyond the ranks of its layers"
    cost = percent((math.hypot(*(record.floor for record in bound)) / total) ** 2)
    worst = list_names([record.layer for record in sorted(bound, key=lambda record: -record.floor)])
    return f"is the limit in {len(bound)} of {len(ranked)} layers, at a cost of {cost} of ‖ΔW‖²: {worst}"


def _interpret(groups: Sequence[tuple[str, list[Residual]]]) -> list[str]:
    """Interpret ε: against another full fine-tune if there is one, else in general."""
    lines = []
    for name, records in groups:
        if records[0].role == "reference":
            total = pool_distances(records)
            columns = _describe_agreement([record.column_space for record in records])
            rows = _describe_agreement([record.row_space for record in records])
            lines.append(
                f"another full fine-tune, {name}, has ε = {format_shown(total.epsilon)} and cosine "
                f"{format_shown(total.cosine)}; its top directions overlap {columns} in the column space and {rows} in "
                "the row space (in brackets: random)"
            )
            lines += [
                _compare_with_reference(other, pool_distances(others), total)
                for other, others in groups
                if others[0].role == "adapter"
            ]
    if lines:
        return [*lines, "ε is the distance to one solution; the held-out loss shows which is better"]
    return [
        f"ε is the distance to this one solution, not quality: it exceeds 1 where ‖X‖/‖ΔW‖ > 2·cosine; {SEEDS}. "
        "--reference TUNED2 measures that of two of your seeds; the held-out loss shows which is better"
    ]


def _compare_with_reference(name: str, adapter: Distances, reference: Distances) -> str:
    """State whether an adapter is nearer to TUNED than the reference, and better aligned."""
    if adapter.epsilon is None or reference.epsilon is None or adapter.cosine is None or reference.cosine is None:
        return f"{name} has no known distance"
    nearer = "no farther than the reference" if adapter.epsilon <= reference.epsilon else "farther than the reference"
    angle = "at least as aligned" if adapter.cosine >= reference.cosine else "less aligned"
    return (
        f"{name} is {nearer} (ε = {format_shown(adapter.epsilon)}) and {angle} (cosine {format_shown(adapter.cosine)})"
    )
