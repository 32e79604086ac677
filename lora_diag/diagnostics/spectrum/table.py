"""Terminal output of ``spectrum``: a table by module type or layer, and a short summary."""

from __future__ import annotations

from collections.abc import Sequence

from lora_diag.diagnostics.spectrum.record import Spectrum, usual_ranks
from lora_diag.diagnostics.spectrum.summary import summary_lines
from lora_diag.records import Results
from lora_diag.rendering.columns import WIDE, Column, rows_of
from lora_diag.rendering.tables import grid_of, grids_table
from lora_diag.rendering.text import spark, strip


def spectrum_table(
    results: Results[Spectrum], width: int = 80, color: bool = False, per: str = "type", next_command: str | None = None
) -> str:
    """Return the table and the summary of a spectrum run.

    Args:
        results: The results.
        width: Width of the terminal in columns; the layout adapts from 80 to 140.
        color: Whether to shade C(r) with ANSI colours.
        per: ``type`` for one row per module type (medians over its layers), ``layer`` for one row per layer.
        next_command: The suggested next command, printed last.

    Returns:
        Lines of text, without a trailing newline.
    """
    rows = rows_of(results, per)
    extra = [Column("σ decay", tuple(_draw_spark(group) for _, group in rows), "left", drop=4)]
    if per == "type":
        extra.append(_make_depth_column(rows, usual_ranks(results.run.settings["ranks"])[0], width))
    shown = Spectrum.shown_of(results.run.settings, results.layers)
    grids = [grid_of(shown, rows, per, extra=extra)] if rows else []
    return grids_table(grids, summary_lines(results), width, color, next_command)


def _draw_spark(records: Sequence[Spectrum]) -> str:
    """Show the spectrum of the layer with the median stable rank, over all its values."""
    record = sorted(records, key=lambda record: record.stable_rank or 0)[len(records) // 2]
    return spark(record.s, len(record.s) if record.complete else min(record.shape), 7)


def _make_depth_column(rows: Sequence[tuple[str, Sequence[Spectrum]]], rank: int, width: int) -> Column:
    """Show C(r) from the first to the last layer of each row."""
    title, bins = (f"C({rank}) by depth", 24) if width >= WIDE else ("by depth", 8)
    cells = tuple(strip([record.energy[str(rank)] for record in group], bins) for _, group in rows)
    return Column(title, cells, "left", drop=5)
