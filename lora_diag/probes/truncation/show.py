"""Table and summary of ``probe truncation``: losses by rank, and the fraction of the gain that each rank keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_diag.feature import Hint
from lora_diag.records import Probe, Results, Run
from lora_diag.records.probe import Subject, set_names
from lora_diag.rendering.losses import describe_losses, format_gap, format_kept, gap_half, on_set, probe_summary
from lora_diag.rendering.statements import Statement
from lora_diag.rendering.tables import Column, Grid, columns_of
from lora_diag.rendering.text import format_shown, fraction, short

# Fraction of the change of the loss that is enough.
SUFFICIENT_SHARE = 0.9


# One configuration of the weights: its name, the energy kept, and its records by set.
_Row = tuple[str, float | None, dict[str, Probe]]


def _make_rows(records: Sequence[Probe]) -> list[_Row]:
    """Return the rows of the table: BASE, the truncations, and TUNED."""
    groups: dict[tuple[str | None, int | None, Subject], list[Probe]] = {}
    for record in records:
        key = (record.layer or record.module_type, record.rank, record.subject)
        groups.setdefault(key, []).append(record)
    rows = []
    order = ("base", "truncated", "tuned")
    for (part, rank, subject), group in sorted(groups.items(), key=lambda item: order.index(item[0][2])):
        name = subject.upper() if rank is None else f"r={rank}"
        by_set = {record.set: record for record in group}
        rows.append((f"{short(part)} {name}" if part else name, group[0].energy, by_set))
    return rows


def truncation_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table, if any: energy; for every set the loss, its gap to TUNED with error, and the fraction kept."""
    records = results.whole_of(Probe)
    rows = _make_rows(records)
    if not rows:
        return []
    energies = tuple(format_shown(energy, fraction) for _, energy, _ in rows)
    columns = [Column("C(r)", energies)] if set(energies) != {"-"} else []
    for name in set_names(records):
        shown = (replace(field, head=short(name)) if field.path == "loss" else field for field in Probe.shown)
        columns += columns_of(shown, [(row, [by_set[name]] if name in by_set else []) for row, _, by_set in rows])
    return [Grid("", "truncated to", tuple(name for name, _, _ in rows), tuple(columns))]


def truncation_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: for each set, the sufficient rank, and the costliest layers or types truncated alone."""
    records = results.whole_of(Probe)
    statements = [
        _describe_set(name, [record for record in records if record.set == name]) for name in set_names(records)
    ]
    return probe_summary(results, *statements, reading=_interpret(results.run))


def _describe_set(name: str, records: Sequence[Probe]) -> Statement:
    """State the losses of BASE and TUNED, the sufficient rank, and the costliest parts truncated alone."""
    together = [record for record in records if record.layer is None and record.module_type is None]
    alone = [record for record in records if record.layer or record.module_type]
    ends = {record.subject: record for record in together}
    shifted = any(record.shifted for record in together)
    if not {"base", "tuned"} <= set(ends):
        return on_set(name, "not measured yet", shifted=shifted)
    base, tuned = ends["base"], ends["tuned"]
    ranks = sorted((record for record in together if record.rank is not None), key=lambda record: record.rank or 0)
    lines = _describe_ranks(ranks, tuned.nats < base.nats) if ranks else []
    lines += [_describe_costliest(alone)] if alone else []
    losses = describe_losses(base, tuned)
    # Without a significant change, fractions of it decide nothing.
    is_clear = base.gap is None or (half := gap_half(base)) is None or abs(base.gap) > half
    return on_set(name, *([*lines, losses] if is_clear else [losses, *lines]), shifted=shifted)


def suggest_next(results: Results[Any], values: Mapping[str, Any]) -> Hint | None:
    """Return the next step: an adapter of the sufficient rank on the first set; None without one."""
    records = results.whole_of(Probe)
    on_first = (r for r in records if r.set == records[0].set and r.layer is None and r.module_type is None and r.rank)
    sufficient = [r.rank for r in on_first if r.rank and r.kept is not None and r.kept >= SUFFICIENT_SHARE]
    if not sufficient:
        return None
    return Hint(f"extract {{base}} {{tuned}} --rank {min(sufficient)} -o adapter/", "an adapter of the sufficient rank")


def _describe_ranks(by_rank: Sequence[Probe], is_gain: bool) -> list[str]:
    """State which rank is sufficient, the first not distinguishable from TUNED, and the fraction kept at r=0."""
    word = "gain" if is_gain else "rise of the loss"
    last = by_rank[-1]
    sufficient = next((r for r in by_rank if r.kept is not None and r.kept >= SUFFICIENT_SHARE), None)
    equal = next((r for r in by_rank if r.gap is not None and (half := gap_half(r)) and abs(r.gap) <= half), None)
    lines = [
        f"r={sufficient.rank} keeps {format_kept(sufficient)} of the {word}, and C({sufficient.rank}) = "
        f"{format_shown(sufficient.energy, fraction)}"
        if sufficient
        else f"no measured rank keeps {SUFFICIENT_SHARE:.0%} of the {word}: r={last.rank} {format_kept(last)}, C = "
        f"{format_shown(last.energy, fraction)}",
        f"the gap to TUNED is first not significant at r={equal.rank}"
        if equal
        else f"the gap to TUNED is significant at every rank, up to r={last.rank}",
    ]
    if by_rank[0].rank == 0:
        lines.append(f"r=0, only what is not truncated, {'gives' if is_gain else 'brings'} {format_kept(by_rank[0])}")
    return lines


def _describe_costliest(alone: Sequence[Probe]) -> str:
    """Name the parts with the largest cost of truncation alone, at the smallest measured rank."""
    smallest = min(record.rank or 0 for record in alone)
    costliest = sorted((r for r in alone if r.rank == smallest), key=lambda record: -(record.gap or 0.0))[:3]
    named = ", ".join(f"{short(r.layer or r.module_type or '')} {format_gap(r)}" for r in costliest)
    return f"truncated alone to r={smallest}, the loss rises most for {named}"


def _interpret(run: Run) -> str:
    reading = {
        "tuned": "norms, biases, embeddings and head are as in TUNED",
        "base": "norms, biases, embeddings and head are as in BASE, so even the full rank need not reach TUNED",
    }[run.settings["rest"]]
    return (
        f"{reading}; errors allow for dependence of nearby sequences only; results are for compression of this "
        "update, not for training at a rank"
    )
