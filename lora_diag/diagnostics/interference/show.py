"""Terminal output of ``interference``: pairs, rank of the sum, losses of merges, and a summary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

from lora_diag.diagnostics.interference.record import Interference, Relation, Union, pooled_cosine
from lora_diag.feature import Hint
from lora_diag.records import Results
from lora_diag.records.base import Shown
from lora_diag.rendering.statements import (
    Statement,
    describe_resolution,
    make_statement,
    short_paths,
    summarize,
)
from lora_diag.rendering.tables import Grid, grid_of, rows_of
from lora_diag.rendering.text import list_counts, number, percent, quantity, short

# Maximum number of pairs with a table each; more share one table with a row per pair.
_MAX_PAIR_TABLES = 3

# Maximum number of layers or pairs named in a sentence.
_MAX_NAMED = 3

# Below this, ‖sum − merge‖/‖sum‖ is rounding.
_EXACT = 1e-9

# Names of merges in the order of the columns; ``cat`` is exact and has no column.
MERGES = {"linear": "linear", "ties": "ties", "ties_dense": "TIES of ΔW"}


def interference_grids(results: Results[Interference | Union], per: str = "type") -> list[Grid]:
    """Return the tables: one per pair or one of all pairs; the rank of the sum; the losses of
    merges.
    """
    grids = _make_pair_grids(group_pairs(results), per)
    if unions := select_shared(results):
        rows = rows_of(unions, per)
        losses = _make_loss_columns(unions)
        union = grid_of(Union.shown, rows, per, "the sum of all")
        merges = grid_of(losses, rows, per, "merges: ‖sum − merge‖ / ‖sum‖")
        grids += [replace(union, detail=True), replace(merges, detail=True)]
    return grids


def group_pairs(
    results: Results[Interference | Union],
) -> list[tuple[str, str, list[Interference]]]:
    """Return the short names of each pair of updates and its records, in the order of
    the inputs.
    """
    paths = [run_input.path for run_input in results.run.inputs if run_input.role != "base"]
    names = dict(zip(paths, short_paths(paths), strict=True))
    groups: dict[tuple[str, str], list[Interference]] = {}
    for record in results:
        if isinstance(record, Interference):
            groups.setdefault((record.first, record.second), []).append(record)
    return [
        (names[pair[0]], names[pair[1]], groups[pair])
        for pair in combinations(paths, 2)
        if pair in groups
    ]


def select_shared(results: Results[Interference | Union]) -> list[Union]:
    """Return the unions of layers that at least two updates change."""
    return [record for record in results if isinstance(record, Union) and len(record.updates) > 1]


def _make_pair_grids(pairs: Sequence[tuple[str, str, list[Interference]]], per: str) -> list[Grid]:
    """Return a table for each pair; one table with a row for each if there are many."""
    if len(pairs) > _MAX_PAIR_TABLES:
        rows = [(f"{first} × {second}", records) for first, second, records in pairs]
        shown = Interference.shown_of({}, [record for _, _, records in pairs for record in records])
        return [replace(grid_of(shown, rows, "type", "pairs"), title="pair")]
    grids = []
    for first, second, records in pairs:
        layers = sorted(rows_of(records, per), key=lambda row: -abs(pooled_cosine(row[1])))
        shown = Interference.shown_of({}, records)
        grids.append(grid_of(shown, layers, per, f"1 {first}, 2 {second}"))
    return grids


def _make_loss_columns(unions: Sequence[Union]) -> Iterator[Shown]:
    """Yield a column for each merge but ``cat``, and for each rank of
    ``_list_truncation_ranks``.
    """
    for key, title in MERGES.items():
        error = partial(merge_residual, merge=key)
        yield Shown(f"merges.{key}", title, "‖S − M‖/‖S‖", pool=error, terminal=True)
    for rank in _list_truncation_ranks(unions):
        pool = partial(recompressed_residual, rank=rank)
        yield Shown(
            f"recompressed.{rank}", f"svd {rank}", "‖S − S_r‖/‖S‖", pool=pool, drop=2, main=True
        )


def merge_residual(records: Sequence[Union], merge: str) -> float | None:
    """Return ‖S − M‖/‖S‖ over the layers with S ≠ 0; None if one of them does not have the merge,
    or without any.
    """
    sums = [record for record in records if record.fro > 0]
    gaps = []
    for record in sums:
        loss = record.merges.get(merge)
        if loss is None:
            return None
        gaps.append(loss.residual * record.fro)
    if not gaps:
        return None
    return math.hypot(*gaps) / math.hypot(*(record.fro for record in sums))


def recompressed_residual(records: Sequence[Union], rank: int) -> float:
    """Return ‖S − S_r‖/‖S‖ over several layers; a layer without a measurement at r counts as
    lossless.
    """
    gaps = [(r.recompressed.get(str(rank)) or 0.0) * r.fro for r in records]
    return math.hypot(*gaps) / (math.hypot(*(r.fro for r in records)) or 1.0)


def _list_truncation_ranks(records: Sequence[Union]) -> list[int]:
    """Return the measured truncation ranks, up to and including the first without loss in every
    sum.
    """
    ranks = sorted({int(rank) for record in records for rank in record.recompressed})
    lossless = [rank for rank in ranks if recompressed_residual(records, rank) < _EXACT]
    return [rank for rank in ranks if rank <= min(lossless, default=rank)]


def suggest_next(results: Results[Any], values: Mapping[str, Any]) -> Hint | None:
    """Return the command that compares merges of these updates by their loss; None without BASE."""
    if values["spectrum"] or all(each.role != "base" for each in results.run.inputs):
        return None
    return Hint(
        "merge {inputs} --method all --eval held_out.txt -o merged/", "compares merges by the loss"
    )


def interference_lines(results: Results[Interference | Union]) -> list[Statement]:
    """Return the statements of the summary."""
    unions = select_shared(results)
    if not unions:
        why = "no layer is changed by two updates"
        if results.unmeasured:
            why = "not measured: every layer was left out"
        return summarize(results, make_statement("interfere", "Interference", why))
    pairs = sorted(group_pairs(results), key=lambda pair: -abs(pooled_cosine(pair[2])))
    lines = [_describe_interference(*pair) for pair in pairs[:_MAX_NAMED]]
    return summarize(
        results,
        make_statement("interfere", "Interference", *lines, priority=0),
        _describe_length(results, unions),
        make_statement("rank_needed", "Rank needed", *_describe_rank_needed(unions)),
        make_statement("merge", "Merge error", *_describe_merges(unions)),
        describe_resolution(
            [record.resolution.verdict for record in unions if record.fro > 0],
            "yes: rounding plays no part in the sums",
            "overlaps there may be those of the files' rounding",
            noun="sum",
        ),
    )


_RELATIONS: dict[Relation, str] = {
    "cancel": "cancel",
    "reinforce": "reinforce",
    "share": "share directions",
    "apart": "have no more in common than chance",
    "noise": "are not resolved by the files",
}


def _describe_interference(first: str, second: str, records: list[Interference]) -> str:
    """State what two updates have in common, and in which layer they cancel most, if they do."""
    counts = ", ".join(list_counts((record.relation for record in records), _RELATIONS))
    cosine = number(round(pooled_cosine(records), 4))
    layers = quantity(len(records), "layer")
    text = f"{first} and {second}: cosine {cosine}; of {layers} {counts}"
    worst = min(records, key=lambda record: record.cosine)
    if worst.relation == "cancel":
        text += f"; lowest in {short(worst.layer)} ({number(round(worst.cosine, 3))})"
    return text


def compare_lengths(unions: Sequence[Union]) -> float:
    """Return ‖Σ w_kΔW_k‖ over the largest ‖w_kΔW_k‖, over the layers that several updates change; 0
    if those are 0.
    """
    norms: dict[str, list[float]] = {}
    for record in unions:
        for path, fro in zip(record.updates, record.parts_fro, strict=True):
            norms.setdefault(path, []).append(fro)
    longest = max(math.hypot(*own) for own in norms.values())
    return math.hypot(*(record.fro for record in unions)) / longest if longest else 0.0


def _describe_length(results: Results[Interference | Union], unions: Sequence[Union]) -> Statement:
    """State the lengths of the sum and, with unit weights, of the mean; warn of a sum longer than
    √K updates.
    """
    ratio = compare_lengths(unions)
    count = len({path for record in unions for path in record.updates})
    text = f"‖sum‖ is {number(ratio)} times that of the longest update"
    if set(results.run.settings.get("weights", ())) != {1.0}:
        return make_statement("length", "Length", text)
    text += f", ‖mean‖ {number(ratio / count)}"
    limit = math.sqrt(count)  # orthogonal updates of one norm have √K
    if ratio <= limit * (1 + 1e-6):
        return make_statement("length", "Length", text)
    text += (
        f": more than √K = {number(limit)}, as the updates reinforce each other; merge their mean"
    )
    return make_statement("length", "Length", text, level="warning")


def _describe_rank_needed(unions: Sequence[Union]) -> list[str]:
    """State the ranks that the sum and the updates need, and the one that keeps every update."""
    separate_rank = sum(record.parts_rank_at["0.9"] for record in unions)
    sum_rank = sum(record.spectrum.rank_at["0.9"] or 0 for record in unions)
    holds = f"Σr = {sum_rank} holds 90% of the sum's energy"
    lead = f"{holds}; the updates need {separate_rank} separately"
    all_ranks = [record.rank_for_all.get("0.9") for record in unions]
    ranks = [rank for rank in all_ranks if rank is not None]
    if len(ranks) == len(unions):
        every = f"Σr = {sum(ranks)} keeps 90% of every update, at most r = {max(ranks)} in a layer"
        return [lead, every]
    without = f"{len(unions) - len(ranks)} of {len(unions)} layers"
    return [lead, f"in {without} no rank of the sum keeps 90% of every update"]


def _describe_merges(unions: Sequence[Union]) -> Iterator[str]:
    """Yield the errors of all merges, then, if it exists, the rank of the exact one."""
    errors = {name: merge_residual(unions, merge) for merge, name in MERGES.items()}
    for rank in _list_truncation_ranks(unions):
        errors[f"svd r={rank}"] = recompressed_residual(unions, rank)
    losses = [f"{name} {percent(error)}" for name, error in errors.items() if error is not None]
    yield f"of ‖sum‖: {', '.join(losses)}" if losses else ""
    if merge_residual(unions, "cat") is not None:
        rank = max(sum(rank or 0 for rank in record.ranks) for record in unions)
        yield f"cat (concatenated factors) is exact, with r = {rank}"
