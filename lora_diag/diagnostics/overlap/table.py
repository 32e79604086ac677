"""Terminal output of ``overlap``: κ of every module type or layer over the steps, and a summary."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.text import Text

from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.overlap.summary import lines
from lora_diag.diagnostics.overlap.tracks import Track, near, steps_of, tracks, trend
from lora_diag.records import Results
from lora_diag.rendering.columns import WIDE, Column, Grid, rows_of
from lora_diag.rendering.tables import Rows, columns_of, grid_of, grids_table
from lora_diag.rendering.text import middle, shade, small_fraction, span, strip

# Maximum number of steps with a column each, in the narrow and in the wide table. With more steps, this many have
# columns, and a strip of this many characters shows all.
_STEPS, _WIDE_STEPS = 5, 10
_SOME, _WIDE_SOME = 3, 6
_STRIP, _WIDE_STRIP = 8, 24

# Marks a κ near its baseline.
NEAR_MARK = "*"


def overlap_table(
    results: Results[Overlap],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    next_command: str | None = None,
    rank: int | None = None,
) -> str:
    """Return the table and the summary of an overlap run.

    Args:
        results: The results.
        width: Width of the terminal in columns; the layout adapts from 80 to 140.
        color: Whether to shade κ with ANSI colours.
        per: ``type`` for one row per module type (medians over its layers), ``layer`` for one row per layer.
        next_command: The suggested next command, printed last.
        rank: The rank to show; default 16, or the adapter's own.

    Returns:
        Lines of text, without a trailing newline.
    """
    tracked = tracks(results, rank)
    grids = [_make_grid(rows_of(tracked, per), steps_of(tracked), width, per)] if tracked else []
    return grids_table(grids, lines(results, tracked), width, color, next_command)


def _make_grid(rows: Rows, steps: Sequence[int], width: int, per: str) -> Grid:
    wide = width >= WIDE
    max_steps, sample_count = (_WIDE_STEPS, _WIDE_SOME) if wide else (_STEPS, _SOME)
    column_steps = _spread(steps, sample_count if len(steps) > max_steps else max_steps)
    ranks = {track.rank for _, group in rows for track in group}
    last = [(name, [track.last for track in group]) for name, group in rows]
    columns: list[Column] = []
    for field in Overlap.shown:
        if field.path == "kappa":
            columns += [_make_step_column(rows, step, "step " * (step == column_steps[0])) for step in column_steps]
            columns += (
                [_make_strip_column(rows, steps, _WIDE_STRIP if wide else _STRIP)]
                if len(steps) > len(column_steps)
                else []
            )
            columns += [Column("trend", tuple(trend(_ends(group)) for _, group in rows), "left")] if steps[1:] else []
        elif field.path != "rank" or len(ranks) > 1:
            columns += columns_of([field], last)
    caption = f"κ = ‖UᵀGV‖/‖G‖ at r={span(ranks)}, by training step"
    return grid_of((), rows, per, f"{caption} ({NEAR_MARK} near random)", extra=columns)


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """Return at most this many steps, evenly spaced, including the first and the last."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _make_step_column(rows: Rows, step: int, before: str) -> Column:
    """Return the median κ of a step, shaded by its distance from random to 1, and marked if it is near random."""
    cells: list[str | Text] = []
    for _, group in rows:
        known = [record for record in _select_step(group, step) if record.kappa is not None]
        if not known:
            cells.append("-")
            continue
        kappa = median(record.kappa or 0.0 for record in known)
        random = median(record.kappa_random for record in known)
        mark = NEAR_MARK if sum(map(near, known)) > len(known) / 2 else " "
        style = shade(max(0.0, kappa - random) / max(1e-9, 1 - random))
        cells.append(Text(f"{small_fraction(kappa)}{mark}", style=style))
    return Column(f"{before}{step}", tuple(cells))


def _select_step(group: Sequence[Track], step: int) -> list[Overlap]:
    return [record for track in group for record in track.records if record.step == step]


def _ends(group: Sequence[Track]) -> tuple[float, float] | None:
    ends = [track.ends for track in group]
    first, last = (middle([end[i] if end else None for end in ends]) for i in (0, 1))
    return None if first is None or last is None else (first, last)


def _make_strip_column(rows: Rows, steps: Sequence[int], width: int) -> Column:
    """Draw the median κ over all steps, in bins; full height is the largest κ of the table."""
    highest = max((r.kappa or 0.0 for _, group in rows for track in group for r in track.records), default=0.0)
    drawn = []
    for _, group in rows:
        kappas = [middle([record.kappa for record in _select_step(group, step)]) for step in steps]
        drawn.append(strip([None if kappa is None or not highest else kappa / highest for kappa in kappas], width))
    return Column("over steps", tuple(drawn), "left", drop=3)
