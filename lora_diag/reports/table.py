"""The terminal's answer to ``spectrum``: a table by module type or layer, and a summary to read in ten seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_diag.reports.summary import summary
from lora_diag.reports.text import crop, number, shade, short, spark, strip, to_text
from lora_diag.results import Results, Spectrum
from lora_diag.results.names import module_type_of, part_of

# The wide table needs this many columns.
WIDE = 120

# In which order people expect the types of one block; what is not here comes after, in the order of the file.
_ORDER = ("qkv", "c_attn", "q_proj", "query", "k_proj", "key", "v_proj", "value", "o_proj", "gate", "up_proj", "down")


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table: a layer, or all layers of a module type."""

    name: str
    records: tuple[Spectrum, ...]


@dataclass(frozen=True, slots=True)
class _Column:
    """One column: its title, its width, its side, and what it shows of a row."""

    title: str
    width: int
    cell: Callable[[_Row], str | Text]
    justify: Literal["left", "right"] = "right"


def spectrum_table(
    results: Results, width: int = 80, color: bool = False, per: str = "type", then: str | None = None
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
    rows = _types(results) if per == "type" else [_Row(short(record.layer), (record,)) for record in results]
    digits = len(str(max((len(row.records) for row in rows), default=1)))
    columns = _columns(results.run.settings["ranks"], width >= WIDE, per, digits)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, header_style="bold")
    room = width - sum(column.width + 1 for column in columns) - 2
    table.add_column("module type" if per == "type" else "layer", no_wrap=True, width=_name_width(rows, room))
    for column in columns:
        table.add_column(column.title, justify=column.justify, no_wrap=True, width=column.width)
    for row in rows:
        table.add_row(crop(row.name, room), *(column.cell(row) for column in columns))
    return to_text(Group(table, summary(results, then)), width, color)


def _name_width(rows: Sequence[_Row], room: int) -> int:
    return min(room, max(len("module type"), *(len(row.name) for row in rows)) if rows else room)


def _types(results: Results) -> list[_Row]:
    """Group the layers by module type, attention before MLP before vocabulary tables."""
    groups: dict[str, list[Spectrum]] = {}
    for record in results:
        groups.setdefault(module_type_of(record.layer), []).append(record)

    def order(name: str) -> tuple[bool, bool, int]:
        known = [i for i, word in enumerate(_ORDER) if word in name]
        vocabulary = part_of(groups[name][0].layer) == "vocabulary"
        return vocabulary, "mlp" in name or "expert" in name, min(known, default=len(_ORDER))

    return [_Row(short(name), tuple(groups[name])) for name in sorted(groups, key=order)]


def _columns(ranks: Sequence[int], wide: bool, per: str, digits: int) -> list[_Column]:
    usual = [rank for rank in ranks if rank in {8, 16, 64}] or sorted({ranks[0], ranks[len(ranks) // 2], ranks[-1]})
    shown = list(ranks)[:8] if wide else usual
    strip_width = 24 if wide else 8
    columns = [
        _Column("n", digits, lambda row: str(len(row.records))),
        _Column("shape", 11, _shape),
        _Column("‖ΔW‖/‖W‖", 9, _moved),
        *(_Column(f"C({rank})", 4 + (rank > 9) + (rank > 99), _energy(rank)) for rank in shown),
        _Column("r@90%", 5, _rank_at("0.9")),
        _Column("signal", 6, _signal),
        _Column("r@95%", 5, _rank_at("0.95")),
        _Column("r@99%", 5, _rank_at("0.99")),
        _Column("stable", 6, lambda row: _middle([record.stable_rank for record in row.records])),
        _Column("eff.", 5, lambda row: _middle([record.effective_rank for record in row.records])),
        _Column("σ decay", 7, _spark, "left"),
        _Column(
            f"C({shown[0]}) by depth" if wide else "by depth", strip_width, _by_depth(shown[0], strip_width), "left"
        ),
    ]
    left_out = set() if wide else {"shape", "r@95%", "r@99%", "stable", "eff."}
    left_out |= {"n", columns[-1].title} if per == "layer" else set()
    return [column for column in columns if column.title not in left_out]


def _shape(row: _Row) -> str:
    shapes = {"×".join(map(str, record.shape)) for record in row.records}
    return shapes.pop() if len(shapes) == 1 else "various"


def _moved(row: _Row) -> str:
    return _middle([record.relative for record in row.records])


def _energy(rank: int) -> Callable[[_Row], str | Text]:
    def cell(row: _Row) -> str | Text:
        shares = [share for record in row.records if (share := record.energy[str(rank)]) is not None]
        return Text(f"{median(shares):.2f}", style=shade(median(shares))) if shares else "-"

    return cell


def _rank_at(threshold: str) -> Callable[[_Row], str]:
    """Show the median rank at a threshold; "> K" where it lies beyond the K values kept."""

    def cell(row: _Row) -> str:
        beyond = max(len(record.s) for record in row.records) + 1
        ranks = sorted(beyond if (rank := record.rank_at[threshold]) is None else rank for record in row.records)
        middle = ranks[len(ranks) // 2]
        return f"> {beyond - 1}" if middle == beyond else str(middle)

    return cell


def _signal(row: _Row) -> str:
    """Show the median number of singular values above the rounding noise, and a mark by the worst verdict."""
    verdicts = {record.resolution.verdict for record in row.records if record.fro > 0}
    mark = "!" if "unresolved" in verdicts else "~" if "floor-limited" in verdicts else ""
    ranks = [record.resolution.signal_rank for record in row.records]
    known = sorted(len(row.records[0].s) + 1 if rank is None else rank for rank in ranks)
    middle = known[len(known) // 2]
    return f"> {middle - 1}{mark}" if None in ranks and middle > len(row.records[0].s) else f"{middle}{mark}"


def _middle(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(median(known)) if known else "-"


def _spark(row: _Row) -> str:
    """Show the spectrum of the layer with the median stable rank."""
    return spark(sorted(row.records, key=lambda record: record.stable_rank or 0)[len(row.records) // 2].s, 7)


def _by_depth(rank: int, width: int) -> Callable[[_Row], str]:
    return lambda row: strip([record.energy[str(rank)] or 0.0 for record in row.records], width)
