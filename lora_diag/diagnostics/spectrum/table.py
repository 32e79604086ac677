"""The terminal's answer to ``spectrum``: a table by module type or layer, and a summary to read in ten seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.diagnostics.spectrum.summary import summary_lines
from lora_diag.records import Results
from lora_diag.rendering.columns import WIDE, Column, rows_of, table_of, title_of
from lora_diag.rendering.statements import summary_of
from lora_diag.rendering.text import fraction, middle, middle_rank, shade, shape_of, shown, spark, strip, to_text

# Which columns go first where there is too little room; after these, C(r) at all but the smallest rank.
_SPARED = ("eff.", "stable", "r@95%", "r@99%", "shape", "by depth", "σ decay", "signal")

# Columns that only a wide terminal shows.
_OF_WIDE = {"shape", "r@95%", "r@99%", "stable", "eff."}


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table: a layer, or all layers of a module type."""

    name: str
    records: tuple[Spectrum, ...]


def spectrum_table(
    results: Results[Spectrum], width: int = 80, color: bool = False, per: str = "type", then: str | None = None
) -> str:
    """Return the table and the summary of a spectrum run.

    Args:
        results: What was measured.
        width: Columns of the terminal; 80 are enough, 140 are used.
        color: Whether to shade C(r) with ANSI colours.
        per: ``type`` for one row a module type (medians over its layers), ``layer`` for one row a layer.
        then: The command that a user would run next.

    Returns:
        Lines of text, without a newline at the end.
    """
    rows = [_Row(*row) for row in rows_of(results, per)]
    told = summary_of(summary_lines(results), then)
    return to_text(Group(_table(rows, results.run.settings["ranks"], width, per), told) if rows else told, width, color)


def _table(rows: Sequence[_Row], ranks: Sequence[int], width: int, per: str) -> Table:
    usual = [rank for rank in ranks if rank in {8, 16, 64}] or sorted({ranks[0], ranks[len(ranks) // 2], ranks[-1]})
    first = list(ranks)[:8]
    columns = _columns(rows, first if width >= WIDE else sorted({*first, *usual}), usual[0], width >= WIDE, per)
    energies = [column.title for column in columns if column.title.endswith(")")]
    of_wide = _OF_WIDE | {f"C({rank})" for rank in first if rank not in usual}
    return table_of(
        title_of(per), [row.name for row in rows], columns, width, (*_SPARED, *reversed(energies[1:])), of_wide
    )


def _columns(rows: Sequence[_Row], at: Sequence[int], usual: int, wide: bool, per: str) -> list[Column]:
    weighed = any(record.metric != "weights" for row in rows for record in row.records)
    moved = "moved" if weighed else "‖ΔW‖/‖W‖"

    def column(title: str, cell: Callable[[_Row], str | Text], justify: Literal["left", "right"] = "right") -> Column:
        return Column(title, tuple(map(cell, rows)), justify)

    columns = [
        column("n", lambda row: str(len(row.records))),
        column("shape", lambda row: shape_of(record.shape for record in row.records)),
        column(moved, _moved),
        *(column(f"C({rank})", partial(_energy, rank)) for rank in at),
        column("r@90%", partial(_rank_at, "0.9")),
        column("signal", _signal),
        column("r@95%", partial(_rank_at, "0.95")),
        column("r@99%", partial(_rank_at, "0.99")),
        column("stable", lambda row: shown(middle([record.stable_rank for record in row.records]))),
        column("eff.", lambda row: shown(middle([record.effective_rank for record in row.records]))),
        column("σ decay", _spark, "left"),
        column(f"C({at[0]}) by depth", _by_depth(at[0], 24), "left")
        if wide
        else column("by depth", _by_depth(usual, 8), "left"),
    ]
    left_out = {"n", columns[-1].title} if per == "layer" else set()
    left_out |= {moved} if any(record.stack for row in rows for record in row.records) else set()
    return [column for column in columns if column.title not in left_out]


def _moved(row: _Row) -> str:
    return shown(middle([record.relative for record in row.records]))


def _energy(rank: int, row: _Row) -> str | Text:
    shares = [share for record in row.records if (share := record.energy[str(rank)]) is not None]
    return Text(fraction(median(shares)), style=shade(median(shares))) if shares else "-"


def _rank_at(threshold: str, row: _Row) -> str:
    return middle_rank([record.rank_at[threshold] for record in row.records], _kept(row))


def _signal(row: _Row) -> str:
    """Show the median number of singular values above the rounding noise, and a mark by the worst verdict."""
    verdicts = {record.resolution.verdict for record in row.records if record.fro > 0}
    mark = "!" if "unresolved" in verdicts else "~" if "floor-limited" in verdicts else ""
    return middle_rank([record.resolution.signal_rank for record in row.records], _kept(row)) + mark


def _kept(row: _Row) -> int:
    """Return how many singular values were kept of a layer."""
    return max(len(record.s) for record in row.records)


def _spark(row: _Row) -> str:
    """Show the spectrum of the layer with the median stable rank, over all values that it has."""
    record = sorted(row.records, key=lambda record: record.stable_rank or 0)[len(row.records) // 2]
    return spark(record.s, len(record.s) if record.complete else min(record.shape), 7)


def _by_depth(rank: int, width: int) -> Callable[[_Row], str]:
    return lambda row: strip([record.energy[str(rank)] for record in row.records], width)
