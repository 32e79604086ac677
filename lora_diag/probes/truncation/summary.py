"""The terminal's answers to ``probe``: losses by rank, by adapter, by run, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group

from lora_diag.records import Probe, Results, Run
from lora_diag.records.probe import Subject
from lora_diag.rendering.columns import Column, Grid
from lora_diag.rendering.lines import answers, inputs, left_out_line, notes
from lora_diag.rendering.text import fraction, percent, short, to_text

# A share of the loss that is called nearly all: printed with the numbers it stands on.
ENOUGH = 0.9


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table: the same weights on every set."""

    name: str
    energy: float | None
    by_set: dict[str, Probe]


def truncation_table(
    results: Results[Any], width: int = 80, color: bool = False, per: str = "type", then: str | None = None
) -> str:
    """Return the table and the summary of ``probe truncation``.

    Args:
        results: What was measured.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: Not used: a row is what the run truncated at once.
        then: The command that a user would run next.
    """
    told = answers([*truncation_lines(results), *([("Next", then)] if then else [])])
    return to_text(
        Group(*(part for grid in truncation_grids(results) for part in grid.shown(width)), told), width, color
    )


def probes(results: Results[Any]) -> list[Probe]:
    """Return the probe records of a run."""
    return [record for record in results.whole if isinstance(record, Probe)]


def names_of(records: Sequence[Probe]) -> list[str]:
    """Return the names of the sets, in the order of the run."""
    return list(dict.fromkeys(record.set for record in records))


def _truncation_rows(records: Sequence[Probe]) -> list[_Row]:
    groups: dict[tuple[str | None, int | None, Subject], list[Probe]] = {}
    for record in records:
        key = (record.layer or record.module_type, record.rank, record.subject)
        groups.setdefault(key, []).append(record)
    ordered = [key for key in groups if key[2] == "base"]
    ordered += [key for key in groups if key[2] == "truncated"] + [key for key in groups if key[2] == "tuned"]
    rows = []
    for what, rank, subject in ordered:
        name = subject.upper() if rank is None else f"r={rank}"
        found = groups[what, rank, subject]
        rows.append(
            _Row(f"{short(what)} {name}" if what else name, found[0].energy, {record.set: record for record in found})
        )
    return rows


def truncation_grids(results: Results[Any]) -> list[Grid]:
    """Return the table: for every set the loss, its gap to TUNED with the standard error, and the share kept."""
    records = probes(results)
    sets, rows = names_of(records), _truncation_rows(records)
    if not rows:
        return []
    columns = []
    if any(row.energy is not None for row in rows):
        columns.append(Column("C(r)", tuple("-" if row.energy is None else fraction(row.energy) for row in rows)))
    for name in sets:
        columns += [
            Column(short(name), _cells(rows, name, lambda record: f"{record.nats:.4f}")),
            Column("to TUNED", _cells(rows, name, gap)),
            Column("kept", _cells(rows, name, lambda record: "-" if record.kept is None else f"{record.kept:.2f}")),
        ]
    return [Grid("", "truncated to", tuple(row.name for row in rows), tuple(columns))]


def _cells(rows: Sequence[_Row], name: str, cell: Callable[[Probe], str]) -> tuple[str, ...]:
    return tuple(cell(row.by_set[name]) if name in row.by_set else "-" for row in rows)


def gap(record: Probe) -> str:
    """Return the gap to TUNED and its standard error; nothing for TUNED itself."""
    if record.gap is None or record.subject == "tuned":
        return ""
    error = "" if record.gap_error is None else f" ±{record.gap_error:.2g}" if record.gap_error >= 1e-4 else " ±<1e-4"
    return f"{record.gap:+.4f}{error}"


def truncation_lines(results: Results[Any]) -> list[tuple[str, str]]:
    """Return the summary: set by set, which rank keeps how much of what TUNED changed."""
    records = probes(results)
    sets = names_of(records)
    told = [("Compared", "\n".join([*inputs(results.run), *notes(results.run)])), ("Measured", measured(results.run))]
    together = [record for record in records if record.layer is None and record.module_type is None]
    for name in sets:
        mine = [record for record in together if record.set == name]
        alone = [record for record in records if record.set == name and record not in mine]
        shifted = "shifted: " if mine and mine[0].shifted and name != "shifted" else ""
        told.append((f"On {short(name)}", shifted + _verdict(mine, alone)))
    told.append(("Read it so", _reading(results.run)))
    return [*told, *ending(results)]


def beyond_grid(tried: Iterable[float | None], grid: Sequence[float] | None, option: str) -> list[str]:
    """Say which learning rates were tried beyond those that were asked for, because the best was at their edge.

    >>> beyond_grid([None, 1e-3, 1e-2, 3.3e-2], [1e-3, 1e-2], "--lr")
    ['beyond --lr, whose edge was the best somewhere, 0.033 was tried, too']
    """
    further = sorted({rate for rate in tried if rate is not None} - set(grid)) if grid else []
    if not further:
        return []
    listed = ", ".join(f"{rate:g}" for rate in further)
    verb = "were" if len(further) > 1 else "was"
    return [f"beyond {option}, whose edge was the best somewhere, {listed} {verb} tried, too"]


def ending(results: Results[Any]) -> list[tuple[str, str]]:
    """Return what was left out, and a warning where the run did not finish."""
    told = [("Left out", left_out_line(results.left_out))]
    if results.end is None:
        told.append(("Warning", "the run did not finish: these are the records so far"))
    return told


def measured(run: Run) -> str:
    """Say how a probe ran the model."""
    settings = run.settings
    return (
        f"sequences of up to {settings['length']} tokens, {settings['dtype']} on {settings['device']}; "
        f"{settings['tokens']}"
    )


def _verdict(together: Sequence[Probe], alone: Sequence[Probe]) -> str:
    ends = {record.subject: record for record in together if record.subject in {"base", "tuned"}}
    if len(ends) < 2:
        return "not measured yet"
    base, tuned = ends["base"], ends["tuned"]
    lines = [f"loss {base.nats:.3f} of BASE → {tuned.nats:.3f} of TUNED{noise(base)}"]
    ranks = sorted((record for record in together if record.rank is not None), key=lambda record: record.rank or 0)
    if ranks:
        lines += _by_rank(ranks, tuned.nats < base.nats)
    if alone:
        lines.append(_most_hurt(alone))
    return "\n".join(lines)


def noise(base: Probe) -> str:
    """Warn where the fine-tune's own effect is within its error."""
    if base.gap is None or base.gap_error is None or abs(base.gap) > 2 * base.gap_error:
        return ""
    return f": within two standard errors (±{base.gap_error:.3f}) of nothing, so that shares kept mean little"


def _by_rank(ranks: Sequence[Probe], gains: bool) -> list[str]:
    """Say which rank is enough: for a share of the change, and to be told from TUNED no more."""
    word = "gain" if gains else "rise of the loss"
    lines = []
    if enough := next((r for r in ranks if r.kept is not None and r.kept >= ENOUGH), None):
        lines.append(f"r={enough.rank} keeps {share(enough)} of the {word}, and C({enough.rank}) = {_energy(enough)}")
    else:
        last = ranks[-1]
        lines.append(
            f"no rank measured keeps {ENOUGH:.0%} of the {word}: r={last.rank} {share(last)}, C = {_energy(last)}"
        )
    same = next((r for r in ranks if r.gap is not None and r.gap_error and abs(r.gap) <= 2 * r.gap_error), None)
    lines.append(
        f"from r={same.rank} on the gap to TUNED is first within two standard errors"
        if same
        else f"at every rank, r={ranks[-1].rank} too, the gap to TUNED is more than two standard errors"
    )
    if ranks[0].rank == 0:
        lines.append(f"r=0, what is not truncated, {'gives' if gains else 'brings'} {share(ranks[0])} by itself")
    return lines


def share(record: Probe) -> str:
    """Return the share of TUNED's change of the loss that is there."""
    if record.kept is None:
        return "-"
    if abs(record.kept) > 1:
        return f"{record.kept:.0%}"
    return ("-" if record.kept < 0 else "") + percent(abs(record.kept))


def _energy(record: Probe) -> str:
    return "-" if record.energy is None else fraction(record.energy)


def _most_hurt(alone: Sequence[Probe]) -> str:
    """Name where truncation alone costs most, at the smallest rank measured."""
    smallest = min(record.rank or 0 for record in alone)
    found = sorted((r for r in alone if r.rank == smallest), key=lambda record: -(record.gap or 0.0))[:3]
    named = ", ".join(f"{short(r.layer or r.module_type or '')} {gap(r)}" for r in found)
    return f"truncated alone to r={smallest}, the loss rises most for {named}"


def _reading(run: Run) -> str:
    rest = {
        "tuned": "norms, biases, embeddings and head are as in TUNED",
        "base": "norms, biases, embeddings and head are as in BASE, so that no rank need reach TUNED",
    }[run.settings["rest"]]
    return (
        f"{rest}; errors take sequences as independent, which those of one text are not quite; "
        "what a rank keeps is about compressing this update, not about training at that rank"
    )
