"""Table and summary of ``probe truncation``: losses by rank, and the fraction of the gain that each
rank keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_diag.feature import Hint
from lora_diag.metrics.statistics import paired_difference, paired_half
from lora_diag.records import Probe, Results
from lora_diag.records.probe import set_names
from lora_diag.rendering.losses import (
    describe_losses,
    format_gap,
    format_kept,
    gap_half,
    on_set,
    probe_summary,
)
from lora_diag.rendering.statements import Statement
from lora_diag.rendering.tables import Column, Grid, columns_of
from lora_diag.rendering.text import format_shown, fraction, short, with_limits

# Fraction of the change of the loss that is enough.
SUFFICIENT_SHARE = 0.9


def truncation_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table, if any: energy; for every set the loss, its gap to TUNED with error, and
    the fraction kept.
    """
    records, order = results.whole_of(Probe), ("base", "truncated", "tuned")
    groups: dict[str, list[Probe]] = {}
    for record in sorted(records, key=lambda record: order.index(record.subject)):
        name, part = (
            record.subject.upper() if record.rank is None else f"r={record.rank}",
            name_part(record),
        )
        name += " at ‖ΔW‖" if record.match_norm else ""
        groups.setdefault(f"{short(part)} {name}" if part else name, []).append(record)
    if not groups:
        return []
    energies = tuple(format_shown(group[0].energy, fraction) for group in groups.values())
    columns = [Column("C(r)", energies)] if set(energies) != {"-"} else []
    for name in set_names(records):
        shown = (
            replace(field, head=short(name)) if field.path == "loss" else field
            for field in Probe.shown
        )
        rows = [
            (row, [record for record in group if record.set == name])
            for row, group in groups.items()
        ]
        columns += columns_of(shown, rows)
    return [Grid("", "truncated to", tuple(groups), tuple(columns))]


def name_part(record: Probe) -> str:
    """Return the layer or module type that was truncated alone; empty for other records."""
    return record.layer or record.module_type or ""


def truncation_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: for each set, the sufficient rank, and the costliest layers or types
    truncated alone.
    """
    records = results.whole_of(Probe)
    statements = [
        _describe_set(name, [record for record in records if record.set == name])
        for name in set_names(records)
    ]
    return probe_summary(
        results, *statements, reading=_READINGS[results.run.settings["untruncated"]] + _READING
    )


_READINGS = {
    "tuned": "norms, biases, embeddings and head are as in TUNED",
    "base": "norms, biases, embeddings and head are as in BASE, so even the full rank need not "
    "reach TUNED",
}
_READING = (
    "; errors allow for dependence of nearby sequences only; results are for compression of this "
    "update, not for training at a rank"
)


def _describe_set(name: str, records: Sequence[Probe]) -> Statement:
    """State the losses of BASE and TUNED, the sufficient rank, and the costliest parts truncated
    alone.
    """
    matched = [record for record in records if record.match_norm]
    plain = [record for record in records if not record.match_norm]
    alone = [record for record in plain if name_part(record)]
    ends = {record.subject: record for record in records if record.rank is None}
    if len(ends) < 2:
        return on_set(name, "not measured yet", shifted=records[0].shifted)
    base, tuned = ends["base"], ends["tuned"]
    ranks = sorted(
        (r for r in plain if r.rank is not None and not name_part(r)), key=lambda r: r.rank or 0
    )
    lines = (
        _describe_ranks(ranks, "gain" if tuned.nats < base.nats else "rise of the loss")
        if ranks
        else []
    )
    lines[1:1] = [_describe_length(ranks, matched, base.predictions)] if matched and ranks else []
    lines += [_describe_costliest(alone)] if alone else []
    losses = describe_losses(base, tuned)
    # Without a significant change, fractions of it decide nothing.
    is_clear = base.gap is None or (half := gap_half(base)) is None or abs(base.gap) > half
    return on_set(name, *([*lines, losses] if is_clear else [losses, *lines]), shifted=base.shifted)


def suggest_next(results: Results[Any], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step: an adapter of the sufficient rank on the first set; None
    without one.
    """
    records = results.whole_of(Probe)
    of_first = [
        r for r in records if r.set == records[0].set and not name_part(r) and not r.match_norm
    ]
    rank = min(
        (r.rank for r in of_first if r.rank and (r.kept or 0.0) >= SUFFICIENT_SHARE), default=None
    )
    if rank is None:
        return None
    return Hint(
        f"extract {{base}} {{tuned}} --rank {rank} -o adapter/", "an adapter of the sufficient rank"
    )


def _describe_ranks(by_rank: Sequence[Probe], word: str) -> list[str]:
    """State which rank keeps enough of the change, a ``word``, and the first that is not
    distinguishable from TUNED.
    """
    last = by_rank[-1]
    sufficient = next(
        (r for r in by_rank if r.kept is not None and r.kept >= SUFFICIENT_SHARE), None
    )
    equal = next(
        (r for r in by_rank if r.gap is not None and (half := gap_half(r)) and abs(r.gap) <= half),
        None,
    )
    named = sufficient or last
    kept = f"r={named.rank} keeps {format_kept(named)} of the {word}, and C({named.rank}) = "
    kept += format_shown(named.energy, fraction)
    return [
        kept if sufficient else f"no measured rank keeps {SUFFICIENT_SHARE:.0%}: {kept}",
        f"the gap to TUNED is first not significant at r={equal.rank}"
        if equal
        else f"the gap to TUNED is significant at every rank, up to r={last.rank}",
    ]


def _describe_length(
    ranks: Sequence[Probe], matched: Sequence[Probe], predictions: Sequence[int]
) -> str:
    """State, at each rank, how the loss changes where ΔW_r is lengthened to ‖ΔW‖, with its paired
    interval.
    """
    by_rank, changes = {record.rank: record for record in ranks}, []
    for record in sorted(matched, key=lambda record: record.rank or 0):
        if record.rank in by_rank and not name_part(record):
            change, error = paired_difference(record.nll, by_rank[record.rank].nll, predictions)
            half = paired_half(error, len(predictions))
            is_clear = half is not None and abs(change) > half
            doubt = "" if is_clear else " (not significant)"
            changes.append(f"r={record.rank} {with_limits(change, half)}{doubt}")
    return (
        f"length restored to ‖ΔW‖ changes the loss by {', '.join(changes)}; what remains of a "
        "gap is direction"
    )


def _describe_costliest(alone: Sequence[Probe]) -> str:
    """Name the parts whose truncation alone raises the loss most, at the smallest measured rank, if
    significantly.
    """
    smallest = min(record.rank or 0 for record in alone)
    rising = [r for r in alone if r.rank == smallest and (r.gap or 0.0) > (gap_half(r) or 0.0)]
    costliest = sorted(rising, key=lambda record: -(record.gap or 0.0))[:3]
    named = ", ".join(f"{short(name_part(r))} {format_gap(r)}" for r in costliest)
    rises = f"the loss rises most for {named}" if named else "none raises the loss significantly"
    return f"truncated alone to r={smallest}, {rises}"
