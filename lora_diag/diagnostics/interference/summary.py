"""The terminal's answer to ``interference``: the pairs, what their sum needs, what merges lose, and a summary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from rich.console import Group

from lora_diag.diagnostics.interference.record import Interference, MergeLoss, Relation, Union
from lora_diag.records import Agreement, Results
from lora_diag.records.names import module_type_of
from lora_diag.rendering.columns import Column, Grid, title_of
from lora_diag.rendering.lines import called
from lora_diag.rendering.statements import Statement, compared, ending, left_out, say, summary_of
from lora_diag.rendering.text import number, percent, short, to_text

# So many pairs get a table each; more share one, a row a pair.
_TABLES = 3

# So many layers or pairs are named in a sentence.
_NAMED = 3

# The rank whose overlaps are shown: the measured one that is nearest.
_SHOWN_RANK = 8

# Below this, ‖sum − merge‖/‖sum‖ is rounding.
_EXACT = 1e-9

# What merges are called, in the order of the columns; ``cat`` is exact and has none.
MERGES = {"linear": "linear", "ties": "ties", "ties_dense": "TIES of ΔW"}

_SPARED_PAIRS = ("2 in 1", "1 in 2", "row space", "n")
_SPARED_UNION = ("STI", "aligned", "signs", "‖S‖²", "for all 99%", "n")

R = TypeVar("R", Interference, Union)


@dataclass(frozen=True, slots=True)
class _Sums:
    """One row of what the updates need and lose together: layers changed by at least two."""

    name: str
    records: tuple[Union, ...]


def interference_table(
    results: Results[Interference | Union],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    then: str | None = None,
) -> str:
    """Return the tables and the summary of an interference run.

    Args:
        results: What was measured.
        width: Columns of the terminal; 80 are enough, 140 are used.
        color: Whether to use ANSI colours.
        per: ``type`` for one row a module type, ``layer`` for one row a layer.
        then: The command that a user would run next.

    Returns:
        Lines of text, without a newline at the end.
    """
    tables = [part for grid in interference_grids(results, per) for part in grid.shown(width)]
    return to_text(Group(*tables, summary_of(interference_lines(results), then)), width, color)


def interference_grids(results: Results[Interference | Union], per: str = "type") -> list[Grid]:
    """Return the tables: of each pair, or one of all; of what the sum needs; of what merges lose."""
    pairs, unions = pairs_of(results), shared(results)
    grids = _pair_grids(pairs, per)
    if unions:
        rows = [_Sums(short(name), tuple(group)) for name, group in _grouped(unions, per)]
        grids += [_union_grid(rows, per), _merge_grid(rows, per)]
    return grids


def pairs_of(results: Results[Interference | Union]) -> list[tuple[str, str, list[Interference]]]:
    """Return the records of each pair by the shortest names of its updates, in the order of the inputs."""
    paths = [given.path for given in results.run.inputs if given.role != "base"]
    names = dict(zip(paths, called(paths), strict=True))
    groups: dict[tuple[str, str], list[Interference]] = {}
    for record in results:
        if isinstance(record, Interference):
            groups.setdefault((record.first, record.second), []).append(record)
    order = {path: i for i, path in enumerate(paths)}
    ordered = sorted(groups.items(), key=lambda item: (order.get(item[0][0], 0), order.get(item[0][1], 0)))
    return [(names.get(first, first), names.get(second, second), found) for (first, second), found in ordered]


def shared(results: Results[Interference | Union]) -> list[Union]:
    """Return the unions of layers that at least two updates change."""
    return [record for record in results if isinstance(record, Union) and len(record.updates) > 1]


def _grouped(records: Iterable[R], per: str) -> list[tuple[str, list[R]]]:
    groups: dict[str, list[R]] = {}
    for record in records:
        groups.setdefault(module_type_of(record.layer) if per == "type" else record.layer, []).append(record)
    return list(groups.items())


def _pair_grids(pairs: Sequence[tuple[str, str, list[Interference]]], per: str) -> list[Grid]:
    if len(pairs) > _TABLES:
        names = [f"{first} × {second}" for first, second, _ in pairs]
        return [_pair_grid("pairs", "pair", names, [found for *_, found in pairs], False)]
    grids = []
    for first, second, found in pairs:
        rows = _grouped(found, per)
        rows.sort(key=lambda row: -abs(pooled_cosine(row[1])))
        names, groups = [short(name) for name, _ in rows], [group for _, group in rows]
        grids.append(_pair_grid(f"1 {first}, 2 {second}", title_of(per), names, groups, per == "layer"))
    return grids


def pooled_cosine(records: Sequence[Interference]) -> float:
    """Return the cosine of two updates over several layers taken together."""
    first, second = (math.hypot(*norms) for norms in zip(*((r.first_fro, r.second_fro) for r in records), strict=True))
    along = math.fsum(record.cosine * record.first_fro * record.second_fro for record in records)
    return along / first / second


def _pair_grid(
    caption: str, title: str, names: Sequence[str], groups: Sequence[Sequence[Interference]], alone: bool
) -> Grid:
    rank = shown_rank([record for group in groups for record in group])

    def column(name: str, cell: Callable[[Sequence[Interference]], str]) -> Column:
        return Column(name, tuple(map(cell, groups)))

    columns = [
        column("n", lambda group: str(len(group))),
        column("cosine", lambda group: number(round(pooled_cosine(group), 4))),
        column(f"col space {rank}", lambda group: _agreement([_at(r.columns, rank) for r in group])),
        column(f"row space {rank}", lambda group: _agreement([_at(r.rows, rank) for r in group])),
        column("1 in 2", lambda group: percent(median(_at(r.energy, rank).first_in_second for r in group))),
        column("2 in 1", lambda group: percent(median(_at(r.energy, rank).second_in_first for r in group))),
        Column("relation", tuple(map(_relations, groups)), "left"),
    ]
    spared = [name if name != "row space" else f"row space {rank}" for name in _SPARED_PAIRS]
    kept = tuple(column for column in columns if not (alone and column.title == "n"))
    return Grid(caption, title, tuple(names), kept, tuple(spared))


V = TypeVar("V")


def _at(table: dict[str, V], rank: int) -> V:
    """Return what a record says of a rank; of the nearest one that both updates have directions for."""
    return table[min(table, key=lambda key: abs(int(key) - rank))]


def shown_rank(records: Sequence[Interference]) -> int:
    """Return the rank whose overlaps are shown."""
    ranks = {int(key) for record in records for key in record.columns}
    return min(ranks, key=lambda rank: abs(rank - _SHOWN_RANK))


def _agreement(spaces: Sequence[Agreement]) -> str:
    return f"{median(s.overlap for s in spaces):.2f} ({median(s.random for s in spaces):.2f})"


def _relations(group: Sequence[Interference]) -> str:
    counts = Counter(record.relation for record in group)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{word} {number_of}" for word, number_of in counts.most_common())


def _union_grid(rows: Sequence[_Sums], per: str) -> Grid:
    def column(name: str, cell: Callable[[Sequence[Union]], str]) -> Column:
        return Column(name, tuple(cell(row.records) for row in rows))

    columns = [
        column("n", lambda group: str(len(group))),
        column("apart", lambda group: _middle([r.parts_rank_at["0.9"] for r in group], whole=True)),
        column("sum 90%", lambda group: _middle([r.spectrum.rank_at["0.9"] for r in group], whole=True)),
        column("additive", lambda group: _middle([r.additive["0.9"] for r in group])),
        column("for all 90%", lambda group: _middle([r.rank_for_all.get("0.9") for r in group], whole=True)),
        column("for all 99%", lambda group: _middle([r.rank_for_all.get("0.99") for r in group], whole=True)),
        column("‖S‖²", lambda group: _middle([r.energy_ratio for r in group])),
        column("signs", lambda group: _against([(r.trimmed_conflicts, r.trimmed_conflicts_random) for r in group])),
        column("aligned", lambda group: _against([(r.alignment, r.alignment_random) for r in group])),
        column("STI", lambda group: _against([(r.sti_relative, r.sti_random) for r in group])),
    ]
    return _grid("the sum of all", rows, columns, per, _SPARED_UNION)


def _merge_grid(rows: Sequence[_Sums], per: str) -> Grid:
    ranks = _lossy_ranks([record for row in rows for record in row.records])
    columns = [Column("n", tuple(str(len(row.records)) for row in rows))]
    for key, title in MERGES.items():
        found = [merge_residual(row.records, key) for row in rows]
        if any(value is not None for value in found):
            columns.append(Column(title, tuple("-" if value is None else number(value) for value in found)))
    columns += [
        Column(f"svd {rank}", tuple(number(recompressed_residual(row.records, rank)) for row in rows)) for rank in ranks
    ]
    spared = ("n", *(f"svd {rank}" for rank in reversed(ranks)))
    return _grid("merges: ‖sum − merge‖ / ‖sum‖", rows, columns, per, spared)


def _grid(caption: str, rows: Sequence[_Sums], columns: Sequence[Column], per: str, spared: Sequence[str]) -> Grid:
    kept = tuple(column for column in columns if per == "type" or column.title != "n")
    return Grid(caption, title_of(per), tuple(row.name for row in rows), kept, tuple(spared))


def merge_residual(records: Sequence[Union], merge: str) -> float | None:
    """Return ‖S − M‖/‖S‖ over several layers taken together; None if one of them cannot be merged so."""
    losses: list[MergeLoss | None] = [r.merges.get(merge) for r in records if r.fro > 0]
    known = [loss for loss in losses if loss is not None]
    if not known or len(known) < len(losses):
        return None
    fro = [r.fro for r in records if r.fro > 0]
    return math.hypot(*(loss.residual * f for loss, f in zip(known, fro, strict=True))) / math.hypot(*fro)


def recompressed_residual(records: Sequence[Union], rank: int) -> float:
    """Return ‖S − S_r‖/‖S‖ over several layers taken together; where r was not measured, of all that were kept."""
    gaps = [(r.recompressed.get(str(rank)) or 0.0) * r.fro for r in records]
    return math.hypot(*gaps) / (math.hypot(*(r.fro for r in records)) or 1.0)


def _lossy_ranks(records: Sequence[Union]) -> list[int]:
    """Return the ranks to which the sums were cut, up to the first that holds all of every sum."""
    ranks = sorted({int(rank) for record in records for rank in record.recompressed})
    lossless = [rank for rank in ranks if recompressed_residual(records, rank) < _EXACT]
    return [rank for rank in ranks if rank <= min(lossless, default=rank)]


def _middle(values: Sequence[float | None], whole: bool = False) -> str:
    known = sorted(value for value in values if value is not None)
    if whole:
        # A rank that does not exist lies beyond all that do.
        middle = len(values) // 2
        return f"{known[middle]:.0f}" if middle < len(known) else "-"
    return number(median(known)) if known else "-"


def _against(values: Sequence[tuple[float | None, float | None]]) -> str:
    """Show a median, and in brackets that of chance."""
    known = [(value, chance) for value, chance in values if value is not None and chance is not None]
    if not known:
        return "-"
    return f"{median(v for v, _ in known):.2f} ({median(c for _, c in known):.2f})"


def interference_lines(results: Results[Interference | Union]) -> list[Statement]:
    """Return the summary."""
    lines = [compared(results)]
    pairs, unions = pairs_of(results), shared(results)
    if pairs:
        lines.append(say("interfere", "Interference", *(_interfere(*pair) for pair in _strongest(pairs))))
    if unions:
        lines += [
            say("rank_needed", "Rank needed", _rank_needed(unions)),
            say("merge", "Merge", *_merge(unions)),
        ]
        lines.append(_resolved(unions))
    else:
        why = "not measured: no layer is left" if results.unmeasured else "no layer is changed by two updates"
        lines.append(say("interfere", "Interference", why))
    lines.append(
        say(
            "interpretation",
            "Interpretation",
            "weights alone do not say whether skills fight: a held-out loss of each task does",
        )
    )
    return [*lines, left_out(results), *ending(results)]


def _strongest(pairs: Sequence[tuple[str, str, list[Interference]]]) -> list[tuple[str, str, list[Interference]]]:
    return sorted(pairs, key=lambda pair: -abs(pooled_cosine(pair[2])))[:_NAMED]


def _interfere(first: str, second: str, records: list[Interference]) -> str:
    """Say what two updates have in common, and where most."""
    counts = Counter(record.relation for record in records)
    words: dict[Relation, str] = {
        "apart": "no more in common than chance",
        "share": "sharing directions",
        "reinforce": "reinforcing each other",
        "cancel": "cancelling each other",
        "noise": "that the files cannot show",
    }
    told = ", ".join(f"{counts[word]} {text}" for word, text in words.items() if counts[word])
    cosine = number(round(pooled_cosine(records), 4))
    sentence = f"{first} and {second}: {told}, of {len(records)} layers; cosine {cosine}"
    worst = sorted((r for r in records if r.relation == "cancel"), key=lambda r: r.cosine)[:_NAMED]
    named = f"; most in {', '.join(f'{short(r.layer)} ({number(round(r.cosine, 3))})' for r in worst)}"
    return sentence + (named if worst else "")


def _rank_needed(unions: Sequence[Union]) -> str:
    """Say what rank the sum needs against the parts, and one that keeps every part."""
    apart = sum(record.parts_rank_at["0.9"] for record in unions)
    together = sum(record.spectrum.rank_at["0.9"] or 0 for record in unions)
    share = number(together / apart) if apart else "-"
    sentence = f"90% of the sum's energy takes Σr = {together}, {share} of the {apart} of the updates apart"
    kept = [record.weakest_kept["0.9"] for record in unions if record.weakest_kept.get("0.9") is not None]
    known = [value for value in kept if value is not None]
    if known:
        sentence += f", but keeps a median {percent(median(known))} of the update that suffers most"
    ranks = [record.rank_for_all.get("0.9") for record in unions]
    reached = [rank for rank in ranks if rank is not None]
    if len(reached) == len(ranks) and reached:
        sentence += f"; 90% of every update takes Σr = {sum(reached)}, at most r = {max(reached)} in a layer"
    elif reached:
        missing = len(ranks) - len(reached)
        sentence += f"; in {missing} of {len(ranks)} layers no rank of the sum keeps 90% of every update"
    return sentence


def _merge(unions: Sequence[Union]) -> list[str]:
    """Say what each merge loses."""
    lines = []
    if merge_residual(unions, "cat") is not None:
        ranks = max(sum(rank or 0 for rank in record.ranks) for record in unions)
        lines.append(f"cat (factors side by side) is exact, at r = {ranks}")
    lossy = [(rank, recompressed_residual(unions, rank)) for rank in _lossy_ranks(unions)]
    if lossy:
        told = ", ".join(f"{percent(loss**2)} at r = {rank}" for rank, loss in lossy)
        lines.append(f"svd (the sum, cut to rank r) loses {told} of the energy")
    linear, ties, dense = (merge_residual(unions, name) for name in ("linear", "ties", "ties_dense"))
    if linear is not None:
        lines.append(f"PEFT's linear adds A and B apart: its cross terms are {number(linear)} times the sum's norm")
    elif any(None not in record.ranks for record in unions):
        lines.append("PEFT's linear and ties need adapters of one rank, with a known scale, in every layer")
    if ties is not None:
        lines.append(f"PEFT's ties (of A and B apart) is {number(ties)} of the sum's norm away from it")
    if dense is not None:
        best = [loss.best_scale for r in unions if (loss := r.merges.get("ties_dense")) and loss.best_scale]
        lines.append(
            f"TIES of ΔW is {number(dense)} away; nearest to the sum when scaled by about {number(median(best))}"
            if best
            else f"TIES of ΔW is {number(dense)} away"
        )
    return lines


def _resolved(unions: Sequence[Union]) -> Statement:
    seen = Counter(record.resolution.verdict for record in unions if record.fro > 0)
    if set(seen) <= {"resolved"}:
        return say("resolved", "Resolution", "yes: rounding plays no part in the sums")
    parts = [f"{seen[word]} {word}" for word in ("unresolved", "floor-limited") if seen[word]]
    told = f"of {sum(seen.values())} sums {' and '.join(parts)}: overlaps there may be those of the files' rounding"
    return say("resolved", "Resolution", told, level="warning")
