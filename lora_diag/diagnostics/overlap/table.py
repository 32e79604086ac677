"""The terminal's answer to ``overlap``: κ of every module type or layer over the steps, and a summary to read it by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.overlap.summary import lines
from lora_diag.diagnostics.overlap.tracks import Track, near, steps_of, tracks, trend
from lora_diag.records import Results
from lora_diag.rendering.columns import WIDE, Column, rows_of, table_of, title_of
from lora_diag.rendering.statements import summary_of
from lora_diag.rendering.text import middle, shade, shape_of, span, strip, to_text

# Up to so many steps have a column of their own each, in the narrow and in the wide table. Of more steps, so many have
# one, and a strip of so many characters shows all.
_STEPS, _WIDE_STEPS = 5, 10
_SOME, _WIDE_SOME = 3, 6
_STRIP, _WIDE_STRIP = 8, 24

# Marks a κ near its baseline.
NEAR = "*"

# Which columns go first where there is too little room.
_SPARED = ("shape", "right (random)", "left (random)", "over steps", "n", "tangent (random)")


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table: a layer, or all layers of a module type."""

    name: str
    tracks: tuple[Track, ...]

    def at(self, step: int) -> list[Overlap]:
        """Return what was measured at a step."""
        return [record for track in self.tracks for record in track.records if record.step == step]


def overlap_table(
    results: Results[Overlap],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    then: str | None = None,
    rank: int | None = None,
) -> str:
    """Return the table and the summary of an overlap run.

    Args:
        results: What was measured.
        width: Columns of the terminal; 80 are enough, 140 are used.
        color: Whether to shade κ with ANSI colours.
        per: ``type`` for one row a module type (medians over its layers), ``layer`` for one row a layer.
        then: The command that a user would run next.
        rank: The rank to show; default 16, or the adapter's own.

    Returns:
        Lines of text, without a newline at the end.
    """
    tracked = tracks(results, rank)
    told = summary_of(lines(results, tracked), then)
    if not tracked:
        return to_text(told, width, color)
    ranks = sorted({track.rank for track in tracked})
    words = f"r={ranks[0]}" if len(ranks) == 1 else f"r={ranks[0]} to {ranks[-1]}"
    title = Text(f"κ = ‖UᵀGV‖/‖G‖ at {words}, by step of training ({NEAR} near random)", style="bold")
    rows = [_Row(*row) for row in rows_of(tracked, per)]
    return to_text(Group(title, _table(rows, steps_of(tracked), width, per), told), width, color)


def _table(rows: Sequence[_Row], steps: Sequence[int], width: int, per: str) -> Table:
    wide = width >= WIDE
    most, some = (_WIDE_STEPS, _WIDE_SOME) if wide else (_STEPS, _SOME)
    own = _spread(steps, some if len(steps) > most else most)
    highest = max(record.kappa or 0.0 for row in rows for track in row.tracks for record in track.records)
    strips = tuple(_strip(row, steps, _WIDE_STRIP if wide else _STRIP, highest) for row in rows)

    def column(title: str, cell: Callable[[_Row], str | Text]) -> Column:
        return Column(title, tuple(map(cell, rows)))

    columns = [
        column("n", lambda row: str(len(row.tracks))),
        column("shape", lambda row: shape_of(track.last.shape for track in row.tracks)),
        column("r", lambda row: span(track.rank for track in row.tracks)),
        column("random", lambda row: _share(middle([track.last.kappa_random for track in row.tracks]))),
        *(column(f"step {step}" if step == own[0] else str(step), _kappa_at(step)) for step in own),
        Column("over steps", strips, "left"),
        Column("trend", tuple(trend(_ends(row)) for row in rows), "left"),
        column("tangent (random)", lambda row: _beside(row, "tangent")),
        column("left (random)", lambda row: _beside(row, "left")),
        column("right (random)", lambda row: _beside(row, "right")),
    ]
    dropped = {"n"} if per == "layer" else set()
    dropped |= {"r"} if len({track.rank for row in rows for track in row.tracks}) == 1 else set()
    dropped |= set() if len(steps) > len(own) else {"over steps"}
    dropped |= {"trend"} if len(steps) == 1 else set()
    left = [column for column in columns if column.title not in dropped]
    return table_of(
        title_of(per), [row.name for row in rows], left, width, _SPARED, {"shape", "left (random)", "right (random)"}
    )


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _kappa_at(step: int) -> Callable[[_Row], str | Text]:
    """Return the cell of a step: the median κ, shaded by how far it is from random to 1, marked where it is near."""

    def cell(row: _Row) -> str | Text:
        known = [record for record in row.at(step) if record.kappa is not None]
        kappa = middle([record.kappa for record in known])
        if kappa is None:
            return "-"
        random = middle([record.kappa_random for record in known]) or 0.0
        mark = NEAR if sum(map(near, known)) > len(known) / 2 else " "
        return Text(f"{_share(kappa)}{mark}", style=shade(max(0.0, kappa - random) / max(1e-9, 1 - random)))

    return cell


def _share(value: float | None) -> str:
    """Return a share in four or five characters; small ones keep two digits that mean something.

    >>> _share(0.4123), _share(0.0312), _share(0.00391), _share(None)
    ('0.41', '0.031', '0.0039', '-')
    """
    if value is None:
        return "-"
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def _beside(row: _Row, name: str) -> str:
    """Show a share at the last step, and in brackets what a random subspace has."""
    value = middle([getattr(track.last, name) for track in row.tracks])
    random = middle([getattr(track.last, f"{name}_random") for track in row.tracks])
    return f"{_share(value)} ({_share(random)})"


def _ends(row: _Row) -> tuple[float, float] | None:
    ends = [track.ends for track in row.tracks]
    first, last = (middle([end[i] if end else None for end in ends]) for i in (0, 1))
    return None if first is None or last is None else (first, last)


def _strip(row: _Row, steps: Sequence[int], width: int, most: float) -> str:
    """Draw the median κ over all steps, in bins; the full height is the largest κ of the table."""
    kappas = [middle([record.kappa for record in row.at(step)]) for step in steps]
    return strip([None if kappa is None or not most else kappa / most for kappa in kappas], width)
