"""Table and summary of ``probe truncation``: losses by rank, and the fraction of the gain that each rank keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_diag.records import Probe, Results, Run
from lora_diag.records.probe import Subject, set_names
from lora_diag.rendering.losses import both_ends, gap, gap_half, on_set, probe_summary, share
from lora_diag.rendering.statements import Statement
from lora_diag.rendering.tables import Column, Grid, columns_of
from lora_diag.rendering.text import fraction, short

# Fraction of the change of the loss that is enough.
SUFFICIENT_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table: the same weights on every set."""

    name: str
    energy: float | None
    by_set: dict[str, Probe]


def _make_rows(records: Sequence[Probe]) -> list[_Row]:
    groups: dict[tuple[str | None, int | None, Subject], list[Probe]] = {}
    for record in records:
        key = (record.layer or record.module_type, record.rank, record.subject)
        groups.setdefault(key, []).append(record)
    ordered = [key for key in groups if key[2] == "base"]
    ordered += [key for key in groups if key[2] == "truncated"] + [key for key in groups if key[2] == "tuned"]
    rows = []
    for part, rank, subject in ordered:
        name = subject.upper() if rank is None else f"r={rank}"
        of_row = groups[part, rank, subject]
        rows.append(
            _Row(f"{short(part)} {name}" if part else name, of_row[0].energy, {record.set: record for record in of_row})
        )
    return rows


def truncation_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table, if any: energy; for every set the loss, its gap to TUNED with error, and the fraction kept."""
    records = results.whole_of(Probe)
    sets, rows = set_names(records), _make_rows(records)
    if not rows:
        return []
    energies = tuple("-" if row.energy is None else fraction(row.energy) for row in rows)
    columns = [Column("C(r)", energies)] if set(energies) != {"-"} else []
    for name in sets:
        shown = (replace(field, head=short(name)) if field.path == "loss" else field for field in Probe.shown)
        of_set = [(row.name, [row.by_set[name]] if name in row.by_set else []) for row in rows]
        columns += columns_of(shown, of_set)
    return [Grid("", "truncated to", tuple(row.name for row in rows), tuple(columns))]


def truncation_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: for each set, the sufficient rank, and the costliest layers or types truncated alone."""
    records = results.whole_of(Probe)
    statements = [
        _describe_set(name, [record for record in records if record.set == name]) for name in set_names(records)
    ]
    return probe_summary(results, *statements, reading=_interpret(results.run))


def _describe_set(name: str, records: Sequence[Probe]) -> Statement:
    together = [record for record in records if record.layer is None and record.module_type is None]
    alone = [record for record in records if record not in together]
    ends = {record.subject: record for record in together if record.subject in {"base", "tuned"}}
    shifted = bool(together) and together[0].shifted
    if len(ends) < 2:
        return on_set(name, "not measured yet", shifted=shifted)
    base, tuned = ends["base"], ends["tuned"]
    ranks = sorted((record for record in together if record.rank is not None), key=lambda record: record.rank or 0)
    lines = _describe_ranks(ranks, tuned.nats < base.nats) if ranks else []
    lines += [_describe_costliest(alone)] if alone else []
    return on_set(name, both_ends(base, tuned), *lines, shifted=shifted, answer=lines[0] if lines else "")


def _describe_ranks(by_rank: Sequence[Probe], is_gain: bool) -> list[str]:
    """State which rank is sufficient for a fraction of the change, and which is not distinguishable from TUNED."""
    word = "gain" if is_gain else "rise of the loss"
    lines = []
    if record := next((r for r in by_rank if r.kept is not None and r.kept >= SUFFICIENT_SHARE), None):
        lines.append(
            f"r={record.rank} keeps {share(record)} of the {word}, and C({record.rank}) = {_format_energy(record)}"
        )
    else:
        last = by_rank[-1]
        lines.append(
            f"no measured rank keeps {SUFFICIENT_SHARE:.0%} of the {word}: r={last.rank} {share(last)}, C = "
            f"{_format_energy(last)}"
        )
    equal = next((r for r in by_rank if r.gap is not None and (half := gap_half(r)) and abs(r.gap) <= half), None)
    lines.append(
        f"the gap to TUNED is first not significant at r={equal.rank}"
        if equal
        else f"the gap to TUNED is significant at every rank, up to r={by_rank[-1].rank}"
    )
    if by_rank[0].rank == 0:
        lines.append(f"r=0, only what is not truncated, {'gives' if is_gain else 'brings'} {share(by_rank[0])}")
    return lines


def _format_energy(record: Probe) -> str:
    return "-" if record.energy is None else fraction(record.energy)


def _describe_costliest(alone: Sequence[Probe]) -> str:
    """Name the parts with the largest cost of truncation alone, at the smallest measured rank."""
    smallest = min(record.rank or 0 for record in alone)
    costliest = sorted((r for r in alone if r.rank == smallest), key=lambda record: -(record.gap or 0.0))[:3]
    named = ", ".join(f"{short(r.layer or r.module_type or '')} {gap(r)}" for r in costliest)
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
